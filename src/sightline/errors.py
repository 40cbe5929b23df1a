"""Every error a user can cause. Each message names the value, what is allowed, and the mend."""

from __future__ import annotations

import sys
import warnings

INNER = ("sightline", "torch", "transformers")  # packages whose lines no warning of ours points at


class SightlineError(Exception):
    """Base of all errors that sightline raises on purpose. The command line prints it as one line, exit code 2."""


class ParameterError(SightlineError, ValueError):
    """A parameter of a system, function or command is outside its range."""


class InputError(SightlineError, ValueError):
    """A picture, question, file or folder given by the user cannot be used."""


class UnknownNameError(SightlineError, LookupError):
    """A system, model, task or host name is not known; the message suggests the nearest known names."""


class ModelError(SightlineError, RuntimeError):
    """A model cannot be found, loaded, or does not suit what is asked of it."""


class HostError(SightlineError, TypeError):
    """The model's class is not a known host, or the host lacks what a system needs."""


class AttachError(SightlineError, RuntimeError):
    """Systems cannot be attached: the model already carries some, or two of them conflict."""


class SizeError(SightlineError, MemoryError):
    """Something asked for would not fit (for example full attention maps of a long sequence)."""


class MissingExtraError(SightlineError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""


class SightlineWarning(UserWarning):
    """Something works, but not as one might think; `look` prints it as one line."""


def warn(message: str) -> None:
    """Give a SightlineWarning that points at the user's line: the nearest one outside this package and the model's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, SightlineWarning, stacklevel=level)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ParameterError unless `low <= value <= high`."""
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise ParameterError(f"{name}={value!r} is out of range: choose {name} in [{_bound(low)}, {_bound(high)}]")


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def nearest(name: str, known: list[str]) -> str:
    """A phrase that suggests the known names nearest to `name`, for the end of an error message."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"

"""sightline: see where a vision model looks, and change it.

`import sightline as sl` loads nothing heavy; each name below is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULES = (
    "backbones",
    "bench",
    "catalog",
    "decode",
    "engine",
    "errors",
    "evaluate",
    "explain",
    "hosts",
    "language",
    "learn",
    "mix",
    "prune",
    "report",
    "scenes",
    "steer",
    "train",
)
_NAMES = {
    "Clip": "sightline.clips",
    "attach": "sightline.engine.attach",
    "detach": "sightline.engine.attach",
    "record": "sightline.engine.record",
    "load": "sightline.loading",
    "look": "sightline.looking",
    "open_clip": "sightline.clips",
}

if TYPE_CHECKING:
    from sightline import (
        backbones,
        bench,
        catalog,
        decode,
        engine,
        errors,
        evaluate,
        explain,
        hosts,
        language,
        learn,
        mix,
        prune,
        report,
        scenes,
        steer,
        train,
    )
    from sightline.clips import Clip, open_clip
    from sightline.engine.attach import attach, detach
    from sightline.engine.record import record
    from sightline.loading import load
    from sightline.looking import look

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"sightline.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'sightline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

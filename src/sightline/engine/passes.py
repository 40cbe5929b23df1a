"""Several passes: what a system may ask the model before the real question, each question asked once.

A system that plans (`System.plan`) is replaced, question by question, by the one it returns; that one is attached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sightline.engine.system import System
from sightline.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sightline.lvlm import LVLM


class Passes:
    """A model that answers a system's own questions. `frames` and `question` are those of the real one."""

    def __init__(self, lvlm: LVLM, frames: Sequence[Image], question: str) -> None:
        self.lvlm, self.frames, self.question = lvlm, tuple(frames), question
        self._known: dict[tuple, Any] = {}

    def ask(self, question: str, images: Sequence[Image] = (), *, max_new_tokens: int = 64) -> str:
        """The plain, greedy answer to another question, about no picture or about some."""
        key = ("ask", question, tuple(map(id, images)), max_new_tokens)
        if key not in self._known:
            self._known[key] = self.lvlm.ask([list(images)], [question], max_new_tokens=max_new_tokens)[0]
        return self._known[key]

    def chances(
        self, question: str, word: str, images: Sequence[Image], *, batch: int = 64, model: str | None = None
    ) -> tuple[float, ...]:
        """For every picture alone, the probability that the answer to `question` begins with the token of `word`.

        Args:
            batch: pictures encoded at once. model: name of another model to ask; None: the model itself.
        """
        key = ("chances", question, word, tuple(map(id, images)), model)
        if key not in self._known:
            lvlm = self.lvlm if model is None else _load(model)
            parts = [images[k : k + batch] for k in range(0, len(images), batch)]
            self._known[key] = tuple(p for part in parts for p in _chances(lvlm, question, word, part))
        return self._known[key]


def plans(systems: Sequence[System]) -> bool:
    """Whether one of them asks the model before the real question."""
    return any(type(s).plan is not System.plan for s in systems)


def planned(systems: Sequence[System], lvlm: LVLM, frames: Sequence[Image], question: str) -> tuple[System, ...]:
    """The systems to attach for one question about these frames."""
    passes = Passes(lvlm, frames, question)
    return tuple(s.plan(passes) for s in systems)


@torch.inference_mode()
def _chances(lvlm: LVLM, question: str, word: str, images: Sequence[Image]) -> list[float]:
    ids = lvlm.processor.tokenizer.encode(word, add_special_tokens=False)
    if not ids:
        raise InputError(f"the tokenizer of {lvlm.name!r} has no token for {word!r}")
    logits = lvlm.model(**lvlm.inputs(list(images), [question] * len(images))).logits[:, -1]  # (n, vocabulary)
    return logits.float().softmax(-1)[:, ids[-1]].tolist()


_loaded: dict[str, LVLM] = {}


def _load(name: str) -> LVLM:
    from sightline.loading import load

    if name not in _loaded:
        _loaded[name] = load(name)
    return _loaded[name]

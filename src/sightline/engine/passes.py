"""Several passes: what a system may ask the model before the real question, each question asked once.

A system that plans (`System.plan`) is replaced, question by question, by the one it returns; that one is attached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
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

    def ask(
        self,
        question: str,
        images: Sequence[Image] = (),
        *,
        max_new_tokens: int = 64,
        until: Callable[[str], bool] | None = None,
    ) -> str:
        """The plain, greedy answer to another question, about no picture or about some.

        Args:
            until: whether the answer so far says all that is wanted: no more is generated then.
        """
        key = ("ask", question, tuple(map(id, images)), max_new_tokens, until)
        if key not in self._known:
            options = {} if until is None else {"stopping_criteria": [_Until(self.lvlm, until)]}
            asked = self.lvlm.ask([list(images)], [question], max_new_tokens=max_new_tokens, **options)
            self._known[key] = asked[0]
        return self._known[key]

    def chances(
        self, question: str, word: str, images: Sequence[Image], *, batch: int = 64, model: str | None = None
    ) -> tuple[float, ...]:
        """For every picture alone, the probability that the answer to `question` begins with the token of `word`.

        Args:
            batch: pictures asked about at once. model: name of another model to ask; None: the model itself.
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
    inputs = lvlm.inputs(list(images), [question] * len(images))
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(lvlm.model.forward).parameters else {}
    logits = lvlm.model(**inputs, use_cache=False, **last).logits[:, -1]  # (n, vocabulary)
    return logits.float().softmax(-1)[:, ids[-1]].tolist()


class _Until:
    """Ends generation, of one row, when a function of the answer so far says so."""

    def __init__(self, lvlm: LVLM, enough: Callable[[str], bool]) -> None:
        self.lvlm, self.enough, self.prompt = lvlm, enough, -1

    def __call__(self, ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        self.prompt = ids.shape[1] - 1 if self.prompt < 0 else self.prompt  # asked first behind the first new token
        answer = self.lvlm.processor.batch_decode(ids[:, self.prompt :], skip_special_tokens=True)[0]
        return torch.full(ids.shape[:1], self.enough(answer), device=ids.device)


_loaded: dict[str, LVLM] = {}


def _load(name: str) -> LVLM:
    from sightline.loading import load

    if name not in _loaded:
        _loaded[name] = load(name)
    return _loaded[name]

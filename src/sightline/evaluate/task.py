"""What is asked: questions about pictures with their truth, and how the answers are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.errors import InputError, ParameterError

if TYPE_CHECKING:
    from sightline.engine.record import Seen
    from sightline.evaluate.scored import Scored
    from sightline.images import Picture
    from sightline.lvlm import LVLM

Answer = Mapping[str, Any]  # {"answer": text, "tokens": how many were generated, and what an observer saw}


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str  # unique within its task
    picture: str  # name of the picture: questions of one picture belong together
    question: str
    truth: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)  # further JSON-able facts that scoring needs


@dataclass(frozen=True)
class Task:
    """Questions of one kind. `missing` names pictures that were left out because their file is not there."""

    name: str
    source: str  # where the questions come from: stated in the result
    items: tuple[Item, ...]
    open: Callable[[Item], Picture]
    score: Callable[[Sequence[Item], Sequence[Answer]], Scored]
    max_new_tokens: int = 16
    suffix: str = ""  # put behind every question
    missing: tuple[str, ...] = ()
    # (model, items, inputs, what was recorded) -> per item what to keep; None: nothing is recorded
    observe: Callable[[LVLM, Sequence[Item], Mapping[str, Any], Seen], list[dict[str, Any]]] | None = None
    # (model, task, items, how a batch of inputs is answered) -> (inputs, answers), where a question is a dialogue; see `pope_chat`
    talk: Callable[..., tuple[Mapping[str, Any], list[dict[str, Any]]]] | None = None

    def prompt(self, item: Item) -> str:
        """What the model is asked."""
        return item.question + self.suffix

    def facts(self) -> dict[str, Any]:
        """What a result states about the task; two runs with equal facts ask the same."""
        rows = [[item.id, item.picture, item.question, item.truth, dict(item.tags)] for item in self.items]
        return {
            "task": self.name,
            "source": self.source,
            "questions": len(self.items),
            "pictures": len({item.picture for item in self.items}),
            "missing_pictures": len(self.missing),
            "suffix": self.suffix,
            "max_new_tokens": self.max_new_tokens,
            "sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
        }


def check_items(name: str, items: Sequence[Item]) -> tuple[Item, ...]:
    """The items as a tuple; InputError when there are none or two share an id."""
    if not items:
        raise InputError(f"task {name!r} has no questions")
    seen: dict[str, int] = {}
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
    twice = [key for key, n in seen.items() if n > 1]
    if twice:
        raise InputError(
            f"task {name!r}: {len(twice)} ids occur more than once, for example {twice[0]!r}: give every question its own"
        )
    return tuple(items)


def subset(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """At least `n` items (all when None): whole pictures, drawn at random by `seed`, in their original order.

    Raises:
        ParameterError: n is not positive.
    """
    if n is None:
        return list(items)
    if n < 1:
        raise ParameterError(f"n={n!r} is out of range: ask at least one question")
    pictures = list(dict.fromkeys(item.picture for item in items))
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.picture] = sizes.get(item.picture, 0) + 1
    kept: set[str] = set()
    count = 0
    for k in np.random.Generator(np.random.PCG64(seed)).permutation(len(pictures)):
        if count >= n:
            break
        kept.add(pictures[k])
        count += sizes[pictures[k]]
    return [item for item in items if item.picture in kept]


def texts(answers: Sequence[Answer]) -> list[str]:
    """The plain answers."""
    return [answer["answer"] for answer in answers]

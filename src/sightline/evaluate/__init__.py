"""Quality and cost of any systems on any model, in one table that can be trusted.

    tasks = evaluate.find("scenes:pope:adversarial", n=600)
    found = evaluate.compare(sl.load("tiny"), tasks, [[sl.steer.VAR()]], "run")
    found.row("scenes_pope_adversarial", "var").against["verdict"]

Scoring (pure functions of text, numpy only): `pope.score`, `chair.Chair`, `mme.score`, `vqa.score`, `amber`.
Intervals and paired tests: `stats`. Everything loads when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sightline.evaluate import amber, chair, cluster, cost, flops, mme, pareto, pope, stats, vallu, vqa
    from sightline.evaluate.comparing import Comparison, compare, tune
    from sightline.evaluate.finding import find
    from sightline.evaluate.runner import Decoding
    from sightline.evaluate.task import Item, Task

_MODULES = ("amber", "chair", "cluster", "cost", "flops", "mme", "pareto", "pope", "stats", "vallu", "vqa")
_NAMES = {
    "Comparison": "comparing",
    "Decoding": "runner",
    "Item": "task",
    "Task": "task",
    "compare": "comparing",
    "find": "finding",
    "tune": "comparing",
}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"sightline.evaluate.{name}")
    if name in _NAMES:
        return getattr(import_module(f"sightline.evaluate.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'sightline.evaluate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

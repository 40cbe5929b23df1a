"""Quality and cost of any systems on any model, in one table that can be trusted.

Scoring (pure functions of text, numpy only): `pope.score`, `chair.Chair`, `mme.score`, `vqa.score`, `amber`.
Intervals and paired tests: `stats`.
"""

from __future__ import annotations

from importlib import import_module

_MODULES = ("amber", "chair", "mme", "pope", "stats", "vqa")

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"sightline.evaluate.{name}")
    raise AttributeError(f"module 'sightline.evaluate' has no attribute {name!r}")

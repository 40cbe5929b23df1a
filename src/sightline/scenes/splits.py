"""Seed ranges that keep training and held-out scenes apart."""

from __future__ import annotations

from sightline.errors import ParameterError, UnknownNameError, nearest

SPLITS = {"train": (0, 2**31), "val": (2**31, 2**31 + 2**30), "test": (2**31 + 2**30, 2**32)}


def seeds(split: str, n: int) -> range:
    """The first `n` seeds of "train", "val" or "test"; the three ranges are disjoint."""
    if split not in SPLITS:
        raise UnknownNameError(f"no split {split!r}: {nearest(str(split), list(SPLITS))}")
    first, end = SPLITS[split]
    if not 0 <= n <= end - first:
        raise ParameterError(f"n={n!r} is out of range: the {split} split has {end - first} seeds")
    return range(first, first + n)

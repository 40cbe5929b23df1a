"""Intervals for proportions and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sightline.evaluate.stats import wilson

DRAWS = 2000  # bootstrap samples
FEWEST = 8  # pictures: a bootstrap of fewer says nothing about its spread


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of questions (or pictures) behind it; NaN where there is none."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict:
        """JSON-able: NaN becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def proportion(hits: int, n: int) -> Estimate:
    """A proportion with its Wilson score interval; the n answers are taken as independent."""
    return Estimate(hits / n, *wilson(hits, n), n) if n else Estimate(math.nan, math.nan, math.nan, 0)


def bootstrap(values: Sequence[float], clusters: Sequence[int], weights: Sequence[float] | None = None) -> Estimate:
    """Mean with a percentile bootstrap interval that draws whole clusters (pictures), seeded: the same every time.

    There is no interval for fewer than FEWEST clusters.

    Args:
        values: (n,) what is averaged; NaN entries are left out.
        clusters: (n,) which picture each belongs to.
        weights: (n,) of the mean; None: equal.
    """
    values, clusters = np.asarray(values, np.float64), np.asarray(clusters)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    keep = np.isfinite(values) & (weights > 0)
    values, clusters, weights = values[keep], clusters[keep], weights[keep]
    if len(values) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    _, place = np.unique(clusters, return_inverse=True)
    top, bottom = np.bincount(place, values * weights), np.bincount(place, weights)  # per cluster
    value = float(top.sum() / bottom.sum())
    if len(top) < FEWEST:
        return Estimate(value, math.nan, math.nan, len(values))
    picked = np.random.default_rng(0).integers(len(top), size=(DRAWS, len(top)))
    low, high = np.percentile(top[picked].sum(1) / bottom[picked].sum(1), (2.5, 97.5))
    return Estimate(value, float(low), float(high), len(values))

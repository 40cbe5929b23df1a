"""Experiment 1: where the visual sinks are, and whether attention follows phi."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sightline.engine.sinks import find_sink_dims
from sightline.explain.observing import Observation, observe

if TYPE_CHECKING:
    from PIL import Image

    from sightline.hosts.geometry import Layout
    from sightline.lvlm import LVLM

__all__ = ["SinkMap", "find_sink_dims", "map_of", "sink_map"]


@dataclass(frozen=True, eq=False)
class SinkMap:
    """phi and attention of the visual tokens of one picture. L layers, V tokens."""

    layout: Layout
    phi: np.ndarray  # (L, V)
    received: np.ndarray  # (L, V): attention from text queries, mean over them and over heads
    tau: float
    dims: tuple[int, ...]

    @property
    def sinks(self) -> np.ndarray:
        """(L, V) bool."""
        return self.phi > self.tau

    def grid(self, layer: int, crop: int | None = None) -> np.ndarray:
        """(rows, columns) phi of one crop (by default the one that shows the whole picture); NaN where no token is."""
        crop = self.layout.base if crop is None else crop
        mine = np.flatnonzero(self.layout.crop == crop)
        found = np.full(self.layout.grids[crop], np.nan, np.float32)
        found[self.layout.cell[mine, 0], self.layout.cell[mine, 1]] = self.phi[layer, mine]
        return found

    def correlation(self) -> np.ndarray:
        """(L,) Spearman correlation of phi and received attention over the tokens; NaN where either is constant."""
        return np.array([spearman(a, b) for a, b in zip(self.phi, self.received, strict=True)])


def sink_map(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
) -> list[SinkMap]:
    """phi of every visual token in every layer, and the attention it receives from the text after the picture.

    Args and errors: see `observe`. One map per question, computed in one batch.
    """
    return [map_of(seen) for seen in observe(lvlm, images, questions, tau=tau, sink_dims=sink_dims)]


def map_of(seen: Observation) -> SinkMap:
    """The sink map of a prompt already seen."""
    return SinkMap(seen.layout, seen.phi, seen.received.mean(1), seen.tau, seen.dims)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [_ranks(x) for x in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, ties in the middle."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]

"""Which heads look at the image: VAR's head test, counted over the text queries of many questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sightline.errors import InputError
from sightline.explain.observing import Observation, observe

if TYPE_CHECKING:
    from PIL import Image

    from sightline.lvlm import LVLM


@dataclass(frozen=True, eq=False)
class ImageHeads:
    """Means over all text queries of all questions. L layers, H heads."""

    mass: np.ndarray  # (L, H): attention on the picture
    sink_share: np.ndarray  # (L, H): share of it on visual sinks; 0 where there is none
    selected: np.ndarray  # (L, H): share of queries that pass the test (sum >= 0.2, at most half of it on sinks)
    rows: int  # text queries

    def centric(self, least: float = 0.5) -> np.ndarray:
        """(n, 2) layer, head of the heads that pass for at least this share of queries, the most selected first."""
        found = np.argwhere(self.selected >= least)
        return found[np.argsort(-self.selected[tuple(found.T)], kind="stable")]


def image_heads(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    batch: int = 8,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
) -> ImageHeads:
    """The head test over many questions, `batch` at a time. Other arguments: see `observe`.

    In a layer without visual sinks the test is on the mass alone; VAR itself leaves such a layer as it is.
    """
    seen = []
    for a in range(0, len(questions), batch):
        part = images[a : a + batch], questions[a : a + batch]
        seen += observe(lvlm, *part, tau=tau, sink_dims=sink_dims)
    return heads_of(seen)


def heads_of(seen: Sequence[Observation]) -> ImageHeads:
    """The heads of prompts already seen. Raises InputError when there are none."""
    if not seen:
        raise InputError("no prompt was observed: give at least one question to `observe`")
    return mean_heads(
        *(np.array([getattr(s, name) for s in seen]) for name in ("rows", "mass", "sink_mass", "selected"))
    )


def mean_heads(rows: np.ndarray, mass: np.ndarray, sink_mass: np.ndarray, selected: np.ndarray) -> ImageHeads:
    """Means over text queries, from the means (n, L, H) of n prompts with `rows` (n,) text queries each."""
    mass, sinks, chosen = (np.einsum("n,nlh->lh", rows, x) / max(rows.sum(), 1) for x in (mass, sink_mass, selected))
    share = np.divide(sinks, mass, out=np.zeros_like(sinks), where=mass > 0)
    return ImageHeads(mass, share, chosen, int(rows.sum()))

"""Connected bright regions of a word's attention on the picture, and plain names for where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sightline.hosts.geometry import Layout


@dataclass(frozen=True)
class Region:
    """A connected group of bright visual tokens."""

    box: tuple[int, int, int, int] | None  # x0, y0, x1, y1 in pixels of the picture; None: wholly in the padding
    place: str  # e.g. "upper left"
    share: float  # of the attention on the picture that falls into the region, 0..1
    tokens: tuple[int, ...]  # visual tokens of the region


def regions(layout: Layout, values: np.ndarray, total: float | None = None, top: int = 3) -> list[Region]:
    """The `top` bright regions of `values`, those with the largest share first.

    values: (V,) attention per visual token, zero where it must not count (sinks). A token is bright when the heat at
    its centre (as in `Layout.heatmap`) exceeds mean + one standard deviation; bright tokens whose boxes
    share an edge or overlap are one region. `total` is what shares are relative to; by default the sum of `values`.
    """
    total = float(values.sum()) if total is None else float(total)
    heat = _heat_at_centres(layout, values)
    seen = np.isfinite(heat)
    if total <= 0 or not seen.any():
        return []
    spread = heat[seen].std()
    if spread <= 1e-6 * heat[seen].mean():
        return []  # evenly spread: nothing stands out
    bright = np.flatnonzero(seen & (np.nan_to_num(heat) > heat[seen].mean() + spread))
    found = [_region(layout, values, bright[part], total) for part in _connected(layout.boxes[bright])]
    return sorted(found, key=lambda r: (-r.share, r.tokens))[:top]


def _region(layout: Layout, values: np.ndarray, tokens: np.ndarray, total: float) -> Region:
    width, height = layout.size
    boxes = layout.boxes[tokens]
    x0, y0 = np.floor(np.maximum(boxes[:, :2].min(axis=0) + 1e-3, 0)).astype(int).tolist()
    x1, y1 = np.ceil(np.minimum(boxes[:, 2:].max(axis=0) - 1e-3, (width, height))).astype(int).tolist()
    box = (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None
    share = float(values[tokens].sum() / total)
    return Region(box, place(box, layout.size), share, tuple(int(t) for t in tokens))


def place(box: tuple[int, int, int, int] | None, size: tuple[int, int]) -> str:
    """A plain name for where a pixel box lies in a picture of `size` (width, height), e.g. "upper left"."""
    if box is None:
        return "padding"
    across = _third(box[0], box[2], size[0], ("left", "", "right"))
    down = _third(box[1], box[3], size[1], ("upper", "", "lower"))
    if across is None and down is None:
        return "most of the picture"
    if across is None:
        return {"upper": "across the top", "": "across the middle", "lower": "across the bottom"}[down]
    if down is None:
        return f"full height, {across or 'middle'}"
    if not across:
        return {"upper": "top", "": "centre", "lower": "bottom"}[down]
    return f"{down} {across}".strip()


def _third(low: float, high: float, length: int, names: tuple[str, str, str]) -> str | None:
    """Name of the third in which the middle of [low, high] lies; None when it covers more than 2/3 of the length."""
    if high - low > 2 * length / 3:
        return None
    return names[min(2, int(1.5 * (low + high) / length))]


def _heat_at_centres(layout: Layout, values: np.ndarray) -> np.ndarray:
    """(V,) heat at the centre of every token's box, as in `Layout.heatmap`; NaN at separators.

    Where several crops overlap, heat is the mean of their tokens' values, weighted by tokens per pixel.
    """
    boxes = layout.boxes.astype(np.float64)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    density = 1 / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    heat, weight = values * density, density.copy()
    for crop in np.unique(layout.crop[layout.crop >= 0]):
        tiles = np.flatnonzero(layout.crop == crop)
        others = np.flatnonzero((layout.crop >= 0) & (layout.crop != crop))
        inside = (x[others, None] >= boxes[tiles, 0]) & (x[others, None] < boxes[tiles, 2])
        inside &= (y[others, None] >= boxes[tiles, 1]) & (y[others, None] < boxes[tiles, 3])
        heat[others] += inside @ (values * density)[tiles]
        weight[others] += inside @ density[tiles]
    return heat / weight


def _connected(boxes: np.ndarray) -> list[np.ndarray]:
    """Index groups of boxes (n, 4) that hang together by a shared edge or an overlap."""
    side = max(float((boxes[:, 2:] - boxes[:, :2]).min(initial=np.inf)), 1e-6) if len(boxes) else 1.0
    overlap = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    slack = 0.05 * side  # rounding of box edges
    joined = (overlap.min(axis=-1) > -slack) & (overlap.max(axis=-1) > slack)  # (n, n); a corner alone does not join
    open_, groups = set(range(len(boxes))), []
    while open_:
        group, frontier = set(), {min(open_)}
        while frontier:
            group |= frontier
            open_ -= frontier
            frontier = open_ & set(np.flatnonzero(joined[sorted(frontier)].any(axis=0)).tolist())
        groups.append(np.array(sorted(group)))
    return groups

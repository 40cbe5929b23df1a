"""The pointing game: when a question names an object, does attention fall on it?

Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, arXiv 1608.00507. Attention here: the row of
the prompt's last position, which decides the first word of the answer, over the visual tokens; mean over layers and heads.

    hit     the hottest visual token shows a part of the object
    chance  visual tokens that show a part of it / visual tokens: what a blind pointer would score
    share   attention on the object's visible pixels / attention on the picture
    area    pixels of the object / pixels that any token sees: the share of even attention
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.evaluate.scored import Scored, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

if TYPE_CHECKING:
    from sightline.hosts.geometry import Layout


def point(layout: Layout, values: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """One picture: where the attention `values` (n,) of its tokens falls, given the object's `mask` (H, W) bool.

    Returns:
        {"hit", "chance", "share", "area", "at": (x, y) centre of the hottest token in pixels}.
    """
    boxes = layout.visible_boxes()
    seen = np.flatnonzero(~np.isnan(boxes[:, 0]))  # separators and padding point nowhere
    touching = np.array([_covers(boxes[k], mask) for k in seen])
    best = int(seen[np.argmax(np.asarray(values)[seen])])
    heat = layout.heatmap(np.asarray(values, np.float64))
    ones = layout.heatmap(np.ones(len(layout)))
    x0, y0, x1, y1 = boxes[best]
    return {
        "hit": bool(_covers(boxes[best], mask)),
        "chance": float(touching.mean()),
        "share": float(heat[mask].sum() / heat.sum()) if heat.sum() > 0 else 0.0,
        "area": float(ones[mask].sum() / ones.sum()),
        "at": [round(float(x0 + x1) / 2, 2), round(float(y0 + y1) / 2, 2)],
    }


def _covers(box: np.ndarray, mask: np.ndarray) -> bool:
    x0, y0, x1, y1 = int(np.floor(box[0])), int(np.floor(box[1])), int(np.ceil(box[2])), int(np.ceil(box[3]))
    return bool(mask[y0:y1, x0:x1].any())


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """Means over questions."""
    found = {name: ratio(sums[name], sums["n"]) for name in ("hit", "chance", "share", "area")}
    return found | {"lift": ratio(found["share"], found["area"])}


def score(rows: Sequence[Mapping[str, Any]], pictures: Sequence[str]) -> Scored:
    """Score what `point` gave for every question; right: a hit. `lift` is share / area: 1 where attention is even.

    Raises:
        InputError: lengths differ, or nothing to score.
    """
    same_length(rows=rows, pictures=pictures)
    keys = ("hit", "chance", "share", "area")
    counts = [(p, {"n": 1, **{k: float(row[k]) for k in keys}}) for p, row in zip(pictures, rows, strict=True)]
    tally = Tally.collect(counts, formulas, [("hit", "hit", "n")])
    return Scored(
        tally.metrics(),
        tuple(bool(row["hit"]) for row in rows),
        tally,
        "hit",
        rules={"attention": "last prompt position, mean over layers and heads"},
    )

"""Where the patches of every visual token stand in the tower's own sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.hosts.base import Host, ViTHost, find, prefix

if TYPE_CHECKING:
    from sightline.hosts.geometry import Layout


def tower_positions(model: Any, layouts: Sequence[Layout], host: Host | ViTHost | None = None) -> list[np.ndarray]:
    """Row and place of every token's patches in the tower.

    Args:
        model: the model; only its structure is read.
        layouts: of all pictures of a batch, in order.
        host: facts of a family that is not registered.

    Returns:
        Per picture (n, k, 2) int64: index in the batch of the tower's hidden states (B, N, d), and place along N, of the
        up to k patches of each token; -1 fills tokens with fewer. Towers that pack all pictures into one sequence have
        row 0.
    """
    host = host or find(model)
    if isinstance(host, Host) and host.tower_order is not None:
        return host.tower_order(model, layouts)
    start, found, before = prefix(model, host), [], 0
    for layout in layouts:
        places, rows = _crop_rows(layout)
        places[..., 1] += np.where(places[..., 1] >= 0, start, 0)
        places[..., 0] += np.where(places[..., 0] >= 0, before, 0)
        found.append(places)
        before += rows
    return found


def _crop_rows(layout: Layout) -> tuple[np.ndarray, int]:
    """((n, k, 2) row and place of every token's patches for one picture, rows that the picture takes)."""
    tile = np.array(layout.patch_grids[layout.base])  # what the tower sees at once
    stitched = np.array([(r // tile[0], c // tile[1]) for r, c in layout.patch_grids])  # tiles per crop, mostly (1, 1)
    first = np.concatenate([[0], stitched.prod(axis=1).cumsum()])
    width = max((len(p) for p in layout.patches), default=0)
    places = np.full((len(layout), width, 2), -1, dtype=np.int64)
    for token, (crop, patches) in enumerate(zip(layout.crop, layout.patches, strict=True)):
        if not patches:
            continue
        row, column = np.divmod(np.array(patches), layout.patch_grids[crop][1])
        places[token, : len(patches), 0] = first[crop] + (row // tile[0]) * stitched[crop][1] + column // tile[1]
        places[token, : len(patches), 1] = (row % tile[0]) * tile[1] + column % tile[1]
    return places, int(first[-1])

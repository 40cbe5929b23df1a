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
        places, rows = layout.crop_rows
        found.append(np.where(places >= 0, places + np.array([before, start]), -1))
        before += rows
    return found

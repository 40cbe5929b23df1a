"""Which grids the visual tokens of a picture make, whatever the host: tiles, whole pictures, rows with newlines."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sightline.hosts.geometry import Layout


def grids(layouts: Sequence[Layout]) -> list[tuple[int, int]]:
    """(rows, columns) of all grids of the pictures, in the order of their visual tokens; together they hold all of them.

    A view whose tokens stand together is its own grid. Rows that run over several tiles and end with a newline are one
    grid, the newlines its last column. Other separators are grids of one token.
    """
    return [grid for layout in layouts for grid in _grids(layout)]


def _grids(layout: Layout) -> list[tuple[int, int]]:
    whole = {k for k, (rows, columns) in enumerate(layout.grids) if _together(layout.crop == k, rows * columns)}
    labels = [int(k) if int(k) in whole else -1 for k in layout.crop]
    borders = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]
    found = []
    for begin, end in pairwise(borders):
        if labels[begin] >= 0:
            found.append(tuple(layout.grids[labels[begin]]))
            continue
        lines = max(1, int((layout.crop[begin:end] == -1).sum()))
        even = (end - begin) % lines == 0
        found.append((lines, (end - begin) // lines) if even else (1, end - begin))
    return found


def _together(mine: np.ndarray, count: int) -> bool:
    """Whether the tokens marked are `count` neighbours."""
    places = np.flatnonzero(mine)
    return len(places) == count > 0 and int(places[-1] - places[0]) == count - 1

"""Geometry of visual tokens: which rectangle of the original picture each one stands for.

Between a picture and the visual tokens of a language model lie resizing, cropping, padding, tiling, patching, merging,
pixel shuffle, window order, unpadding and newline tokens. A host's `layouts` function undoes all of them and returns one
`Layout` per picture; everything else (heat maps, masks, the report) works on layouts alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sightline.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where the n visual tokens of one picture lie, in the order in which the language model sees them."""

    size: tuple[int, int]  # (width, height) of the original picture, pixels
    boxes: np.ndarray  # (n, 4) float32: x0, y0, x1, y1 in original pixels; may reach outside (padding); NaN: separator
    crop: np.ndarray  # (n,) int: which crop or tile the token belongs to; -1: separator (newline and the like)
    cell: np.ndarray  # (n, 2) int: row, column in the token grid of its crop; -1: separator
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of every crop's token grid
    patches: tuple[tuple[int, ...], ...]  # per token: its tower patches, as row-major indices in its crop's patch grid

    def __len__(self) -> int:
        return len(self.boxes)

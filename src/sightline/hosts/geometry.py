"""Geometry of visual tokens: which rectangle of the original picture each one stands for.

Between a picture and the visual tokens of a language model lie resizing, cropping, padding, tiling, patching, merging,
pixel shuffle, window order, unpadding and newline tokens. A host's `layouts` function undoes all of them and returns one
`Layout` per picture; everything else (heat maps, masks, the report) works on layouts alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from sightline.errors import InputError, ParameterError


@dataclass(frozen=True)
class Layout:
    """Where the n visual tokens of one picture lie, in the order in which the language model sees them.

    Tokens of one crop tile it without overlap; crops may overlap each other. A pixel (column i, row j) is the square
    [i, i+1) x [j, j+1).
    """

    size: tuple[int, int]  # (width, height) of the original picture, pixels
    boxes: np.ndarray  # (n, 4) float32: x0, y0, x1, y1 in original pixels; may reach outside (padding); NaN: separator
    crop: np.ndarray  # (n,) int: which crop or tile the token belongs to; -1: separator (newline and the like)
    cell: np.ndarray  # (n, 2) int: row, column in the token grid of its crop; -1: separator
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of every crop's token grid; crops in the processor's order
    patches: tuple[tuple[int, ...], ...]  # per token: its tower patches, as row-major indices in its crop's patch grid
    patch_grids: tuple[tuple[int, int], ...] = ()  # (rows, columns) of every crop's patch grid
    base: int = 0  # the crop that shows the whole picture; the only crop when there is one
    tiles: tuple[int, int] | None = (
        None  # (rows, columns) of the tiles, where each is a crop of its own behind the base
    )
    bases: tuple[int, ...] = ()  # on a page of several pictures: the crop of each that shows the whole of it

    def __len__(self) -> int:
        return len(self.boxes)

    @cached_property
    def crop_rows(self) -> tuple[np.ndarray, int]:
        """Row and place of every token's patches in a tower that sees every crop, or tile of it, as a row of its batch.

        Returns:
            (n, k, 2) int64, rows and places counted from 0, -1 fills tokens with fewer than k patches; and the rows that
            the picture takes. Worked out once for every layout, which never changes.
        """
        tile = np.array(self.patch_grids[self.base])  # what the tower sees at once
        stitched = np.array(self.patch_grids) // tile  # (crops, 2) tiles per crop, mostly (1, 1)
        first = np.concatenate([[0], stitched.prod(axis=1).cumsum()])
        width = max((len(p) for p in self.patches), default=0)
        patch = np.array([p + (-1,) * (width - len(p)) for p in self.patches], dtype=np.int64).reshape(-1, width)
        crop = np.where(self.crop >= 0, self.crop, 0)[:, None]  # (n, 1); separators have no patches
        row, column = np.divmod(patch, np.array(self.patch_grids)[crop, 1])
        rows = first[crop] + row // tile[0] * stitched[crop, 1] + column // tile[1]
        places = np.stack([rows, row % tile[0] * tile[1] + column % tile[1]], -1)
        places[patch < 0] = -1
        places.flags.writeable = False
        return places, int(first[-1])

    def visible_boxes(self) -> np.ndarray:
        """(n, 4) float32: the boxes cut to the picture; NaN for separators and tokens that see only padding."""
        width, height = self.size
        cut = np.clip(self.boxes, 0, np.array([width, height, width, height], np.float32))  # NaN stays NaN
        cut[~((cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1]))] = np.nan
        return cut

    def token_at(self, x: float, y: float, crop: int | None = None) -> int:
        """Index of the token whose box holds the point (x, y), in original pixels; -1 when none does.

        Of several crops the finest wins (the smallest box, then the first); `crop` restricts the search to one crop.
        Points outside every crop (cut off, or in the strip that a patch grid does not reach) belong to no token.
        """
        x0, y0, x1, y1 = self.boxes.T
        width, height = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"point ({x:g}, {y:g}) is outside the picture of {width} x {height} pixels")
        holds = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        if crop is not None:
            holds &= self.crop == crop
        found = np.flatnonzero(holds)
        if len(found) == 0:
            return -1
        area = (x1 - x0)[found] * (y1 - y0)[found]
        return int(found[area <= area.min() * (1 + 1e-4)][0])

    def tokens_in(self, box: tuple[float, float, float, float]) -> np.ndarray:
        """(m,) int: the tokens, of every crop, whose boxes overlap `box` (x0, y0, x1, y1 in original pixels)."""
        if not (box[0] < box[2] and box[1] < box[3]):
            raise InputError(f"box {tuple(box)} is empty: give x0 < x1 and y0 < y1")
        x0, y0, x1, y1 = self.boxes.T
        return np.flatnonzero((x0 < box[2]) & (x1 > box[0]) & (y0 < box[3]) & (y1 > box[1]))

    def heatmap(
        self,
        values: np.ndarray,
        size: tuple[int, int] | None = None,
        crops: Literal["all", "base", "detail"] = "all",
    ) -> np.ndarray:
        """Values per token as a picture, with exact areas: a pixel cut by token edges gets their mean by area.

        Args:
            values: (n,) one finite number per token; those of separators are ignored.
            size: (width, height) of the map; the picture's own size when None.
            crops: "base": only the crop of the whole picture; "detail": only the others (the base when there are no
                others); "all": their mean, in which each crop weighs as much as it has tokens per pixel.

        Returns:
            (H, W) float32; 0 where no token looks. A constant gives the same constant wherever tokens look.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (len(self),):
            raise InputError(f"values has shape {values.shape}: one value per visual token is needed, ({len(self)},)")
        if crops not in ("all", "base", "detail"):
            raise ParameterError(f"crops={crops!r} is not known: choose 'all', 'base' or 'detail'")
        width, height = size if size is not None else self.size
        if width < 1 or height < 1:
            raise ParameterError(f"size={(width, height)} must be at least (1, 1)")
        heat, weight = np.zeros((height, width)), np.zeros((height, width))
        for crop in self._chosen(crops):
            total, seen = self._render(crop, values, width, height)
            heat += total
            weight += seen
        return np.divide(heat, weight, out=np.zeros_like(heat), where=weight > 1e-12).astype(np.float32)

    def _chosen(self, crops: str) -> list[int]:
        present = [int(c) for c in np.unique(self.crop) if c >= 0]
        whole = self.bases or (self.base,)
        detail = [c for c in present if c not in whole]
        if crops == "base" or (crops == "detail" and not detail):
            return [c for c in present if c in whole] or present
        return detail if crops == "detail" else present

    def _render(self, crop: int, values: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Sum over a crop's tokens of value x tokens per pixel x covered area, and the same without the value."""
        mine = np.flatnonzero(self.crop == crop)
        rows, row = np.unique(self.cell[mine, 0], return_inverse=True)
        columns, column = np.unique(self.cell[mine, 1], return_inverse=True)
        boxes = self.boxes[mine].astype(np.float64)
        density = 1 / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        table = np.zeros((2, len(rows), len(columns)))
        table[0, row, column], table[1, row, column] = values[mine] * density, density
        spans_y, spans_x = np.zeros((len(rows), 2)), np.zeros((len(columns), 2))
        spans_y[row], spans_x[column] = boxes[:, 1::2], boxes[:, 0::2]
        across = _coverage(spans_x * (width / self.size[0]), width)  # (W, columns)
        down = _coverage(spans_y * (height / self.size[1]), height)  # (H, rows)
        total, seen = (down @ t @ across.T for t in table)
        return total, seen


def _coverage(spans: np.ndarray, length: int) -> np.ndarray:
    """(length, m) share of every pixel [i, i+1) that each span (m, 2) covers."""
    pixels = np.arange(length)[:, None]
    overlap = np.minimum(pixels + 1, spans[:, 1]) - np.maximum(pixels, spans[:, 0])
    return np.clip(overlap, 0, 1)

"""LLaVA's any-resolution views: the whole picture, then tiles of it at the best of several resolutions.

The picture is stretched onto one tile (the base view), and also fitted into the best resolution, padded, and cut into
tiles. The tiles' patches are put together again, rows or columns of pure padding are dropped ("unpad"), a newline token
ends every row. LLaVA-OneVision shrinks the result bilinearly when it has too many tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sightline.hosts.canvas import Canvas, Part, boxes, grid, join, separators
from sightline.hosts.geometry import Layout


@dataclass(frozen=True)
class Tiles:
    """The put-together patch grid of all tiles, after unpadding."""

    canvas: Canvas  # all tiles side by side
    side: int  # patches along a tile
    shape: tuple[int, int]  # tiles: (rows, columns)
    x: np.ndarray  # (columns of patches, 2) spans in original pixels
    y: np.ndarray  # (rows of patches, 2)
    rows: range  # kept by unpadding
    columns: range


def tiles(size: tuple[int, int], pinpoints: list[list[int]], tile: int, patch: int) -> Tiles:
    """How a picture of `size` (width, height) is tiled: tiles of `tile` pixels with patches of `patch` pixels."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    width, height = size
    target = select_best_resolution((height, width), pinpoints)
    shell = np.broadcast_to(np.uint8(0), (3, height, width))  # has the picture's shape, takes no memory
    new_height, new_width = get_patch_output_size(shell, target, ChannelDimension.FIRST)
    canvas = Canvas(width, height).resize(new_width, new_height)
    left, top = (target[1] - new_width) // 2, (target[0] - new_height) // 2
    canvas = canvas.crop(-left, -top, target[1], target[0])
    side, shape = tile // patch, (target[0] // tile, target[1] // tile)
    x = canvas.bx + canvas.ax * _starts(side * shape[1], side, tile, patch)
    y = canvas.by + canvas.ay * _starts(side * shape[0], side, tile, patch)
    rows, columns = unpadded((side * shape[0], side * shape[1]), size)
    return Tiles(canvas, side, shape, x.astype(np.float32), y.astype(np.float32), rows, columns)


def _starts(count: int, side: int, tile: int, patch: int) -> np.ndarray:
    """(count, 2) first and last pixel edge of patches along one axis; a rest of each tile belongs to no patch."""
    start = np.arange(count) // side * tile + np.arange(count) % side * patch
    return np.stack([start, start + patch], axis=1)


def unpadded(grid_shape: tuple[int, int], size: tuple[int, int]) -> tuple[range, range]:
    """Rows and columns of a patch grid (rows, columns) that `unpad_image` keeps for a picture of (width, height)."""
    rows, columns = grid_shape
    width, height = size
    if width / height > columns / rows:
        gone = (rows - int(round(height * (columns / width), 7))) // 2
        return range(gone, rows - gone), range(columns)
    gone = (columns - int(round(width * (rows / height), 7))) // 2
    return range(rows), range(gone, columns - gone)


def anyres(size: tuple[int, int], cut: Tiles, tile: int, patch: int, most: int | None = None) -> Layout:
    """The layout of base view and tiles. `most`: shrink when there are over 1.1^2 times as many tiles' worth of tokens."""
    side = cut.side
    base = grid(Canvas(*size).resize(tile, tile), 0, side, side, (patch, patch))
    ratio = math.sqrt(len(cut.rows) * len(cut.columns) / (most * side**2)) if most else 0.0
    if ratio > 1.1:
        part, shape = shrunk(cut, int(len(cut.rows) // ratio), int(len(cut.columns) // ratio))
        whole = (side * cut.shape[0], side * cut.shape[1])
        return join(size, [base, part], [(side, side), shape], [(side, side), whole])
    grids = [(side, side)] * (1 + cut.shape[0] * cut.shape[1])
    return replace(join(size, [base, _detail(cut)], grids, grids), tiles=cut.shape)


def view(canvas: Canvas, size: tuple[int, int], side: int, patch: int) -> Layout:
    """The layout of one view with a newline at its end (OneVision with several pictures in a question)."""
    return join(size, [grid(canvas, 0, side, side, (patch, patch)), separators()], [(side, side)], [(side, side)])


def _detail(cut: Tiles) -> Part:
    """The tiles' tokens, row by row over all tiles, a newline after each row."""
    r, c = np.indices((len(cut.rows), len(cut.columns)))  # very long pictures may keep no column at all
    r, c = r + cut.rows.start, c + cut.columns.start
    crop = 1 + r // cut.side * cut.shape[1] + c // cut.side
    cell = np.stack([r % cut.side, c % cut.side], axis=-1)
    place = (cell[..., 0] * cut.side + cell[..., 1])[..., None]
    return with_newlines(boxes(cut.x[c], cut.y[r]), crop, cell, place)


def shrunk(cut: Tiles, rows: int, columns: int) -> tuple[Part, tuple[int, int]]:
    """The put-together grid shrunk bilinearly to rows x columns: one crop, whose tokens mix up to four patches each.

    Boxes divide the area evenly; `patches` are those with weight, in the patch grid of all tiles together.
    """
    y, down = _shrink(cut.y, cut.rows, rows)
    x, across = _shrink(cut.x, cut.columns, columns)
    r, c = np.indices((rows, columns))
    width = cut.side * cut.shape[1]
    place = down[r][..., :, None] * width + across[c][..., None, :]  # (rows, columns, 2, 2)
    place = np.where((down[r][..., :, None] < 0) | (across[c][..., None, :] < 0), -1, place).reshape(rows, columns, 4)
    part = with_newlines(boxes(x[c], y[r]), np.ones_like(r), np.stack([r, c], axis=-1), place)
    return part, (rows, columns)


def shrunk_view(canvas: Canvas, side: int, patch: int, count: int) -> Part:
    """One view of side x side patches shrunk bilinearly to count x count tokens (OneVision's frames of a video)."""
    x, y = canvas.spans(side, side, (patch, patch))
    y, down = _shrink(y, range(side), count)
    x, across = _shrink(x, range(side), count)
    r, c = (index.ravel() for index in np.indices((count, count)))
    low, high = down[r][:, :, None], across[c][:, None, :]
    place = np.where((low < 0) | (high < 0), -1, low * side + high).reshape(len(r), 4)
    patches = tuple(tuple(p for p in token if p >= 0) for token in place.tolist())
    return Part(boxes(x[c], y[r]), np.zeros(len(r), int), np.stack([r, c], axis=1), patches)


def _shrink(spans: np.ndarray, kept: range, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Even division of the kept patches' length into `count` spans, and the two patches each sample reads (-1: none)."""
    step = len(kept) / count
    at = np.minimum(np.arange(count + 1) * step, len(kept) - 1e-9)  # patch coordinates of the edges
    whole = at.astype(int)
    mine = spans[kept.start : kept.stop].astype(np.float64)
    edges = mine[whole, 0] + (at - whole) * (mine[whole, 1] - mine[whole, 0])
    edges[-1] = mine[-1, 1]
    centre = np.maximum((np.arange(count) + 0.5) * step - 0.5, 0)  # as torch's interpolate(align_corners=False)
    first = centre.astype(int)
    second = np.where((centre - first > 1e-6) & (first + 1 < len(kept)), first + 1, -1)
    read = np.stack([first + kept.start, np.where(second < 0, -1, second + kept.start)], axis=1)
    edges = edges.astype(np.float32)
    return np.stack([edges[:-1], edges[1:]], axis=1), read


def with_newlines(box: np.ndarray, crop: np.ndarray, cell: np.ndarray, place: np.ndarray) -> Part:
    """Tokens (rows, columns, ...) row by row with a separator behind each row; `place` (.., .., k) patches, -1: none."""
    rows = crop.shape[0]

    def ended(values: np.ndarray, end: float) -> np.ndarray:
        tail = np.full((rows, 1, *values.shape[2:]), end, dtype=values.dtype)
        return np.concatenate([values, tail], axis=1).reshape(-1, *values.shape[2:])

    patches = tuple(tuple(p for p in token if p >= 0) for token in ended(place, -1).tolist())
    return Part(ended(box, np.nan), ended(crop, -1), ended(cell, -1), patches)

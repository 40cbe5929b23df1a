"""What image processors do to a picture, kept as a map back to its pixels; and token grids laid on the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sightline.hosts.geometry import Layout


@dataclass(frozen=True)
class Canvas:
    """A picture after some processing steps: every step returns a new canvas that still knows the original pixels.

    The point (x, y) of the canvas is the point (ax * x + bx, ay * y + by) of the original picture.
    """

    width: int
    height: int
    ax: float = 1.0
    ay: float = 1.0
    bx: float = 0.0
    by: float = 0.0

    def resize(self, width: int, height: int) -> Canvas:
        """Stretch the whole canvas to another size."""
        ax, ay = self.ax * self.width / width, self.ay * self.height / height
        return Canvas(width, height, ax, ay, self.bx, self.by)

    def crop(self, left: int, top: int, width: int, height: int) -> Canvas:
        """Cut out a rectangle; one that reaches outside pads."""
        return Canvas(width, height, self.ax, self.ay, self.bx + self.ax * left, self.by + self.ay * top)

    def pad(self, left: int, top: int, right: int, bottom: int) -> Canvas:
        """Add borders."""
        return self.crop(-left, -top, self.width + left + right, self.height + top + bottom)

    def pad_square(self) -> Canvas:
        """Add borders on both sides of the shorter edge (LLaVA's `pad_to_square`: the odd pixel goes right or below)."""
        side = max(self.width, self.height)
        return self.crop(-((side - self.width) // 2), -((side - self.height) // 2), side, side)

    def spans(self, rows: int, columns: int, cell: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Where cells of `cell` = (height, width) canvas pixels lie in the original: x (columns, 2) and y (rows, 2)."""
        x = (self.bx + self.ax * cell[1] * np.arange(columns + 1)).astype(np.float32)
        y = (self.by + self.ay * cell[0] * np.arange(rows + 1)).astype(np.float32)
        return np.stack([x[:-1], x[1:]], axis=1), np.stack([y[:-1], y[1:]], axis=1)


@dataclass(frozen=True)
class Part:
    """A piece of a layout: tokens in their order, all of one crop (or separators)."""

    boxes: np.ndarray  # (n, 4)
    crop: np.ndarray  # (n,)
    cell: np.ndarray  # (n, 2)
    patches: tuple[tuple[int, ...], ...]


def separators(count: int = 1) -> Part:
    """Tokens that stand for no place: newlines, class tokens."""
    return Part(np.full((count, 4), np.nan), np.full(count, -1), np.full((count, 2), -1), ((),) * count)


def grid(canvas: Canvas, crop: int, rows: int, columns: int, cell: tuple[float, float], merge: int = 1) -> Part:
    """All tokens of a crop in row-major order.

    cell: (height, width) of a token in canvas pixels; merge: a token is made of merge x merge tower patches.
    """
    x, y = canvas.spans(rows, columns, cell)
    r, c = (index.ravel() for index in np.indices((rows, columns)))
    i, j = (index.ravel() for index in np.indices((merge, merge)))
    patches = (r[:, None] * merge + i) * (columns * merge) + c[:, None] * merge + j  # (n, merge * merge)
    cells = np.stack([r, c], axis=1)
    return Part(boxes(x[c], y[r]), np.full(len(r), crop), cells, tuple(map(tuple, patches.tolist())))


def boxes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(..., 4) boxes x0, y0, x1, y1 from spans (..., 2) along x and y."""
    return np.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], axis=-1)


def join(
    size: tuple[int, int],
    parts: Sequence[Part],
    grids: Sequence[tuple[int, int]],
    patch_grids: Sequence[tuple[int, int]],
    base: int = 0,
) -> Layout:
    """The layout of a picture of `size` (width, height) whose tokens are those of `parts`, one part after the other."""
    return Layout(
        size=(int(size[0]), int(size[1])),
        boxes=np.concatenate([p.boxes for p in parts]).astype(np.float32),
        crop=np.concatenate([p.crop for p in parts]).astype(np.int64),
        cell=np.concatenate([p.cell for p in parts]).astype(np.int64),
        grids=tuple((int(r), int(c)) for r, c in grids),
        patches=tuple(patch for p in parts for patch in p.patches),
        patch_grids=tuple((int(r), int(c)) for r, c in patch_grids),
        base=base,
    )


def edge(size: Any, name: str) -> int | None:
    """An entry of a processor's size ("height", "width", "shortest_edge", ...), a SizeDict or a dict; None if unset."""
    value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return int(value) if value else None

"""How much of a window mask a tiled kernel can skip: the upper bound of its speed-up, without a GPU.

Queries and keys are cut into boxes T_q and T_k; a kernel visits every key tile in which some query of its tile has a key:

    n = ceil(E / T_k) - floor(A / T_k)     static: key tiles at multiples of T_k      [A, E): keys of the query tile
    n = ceil((E - A) / T_k)                dynamic: key tiles start at A

Tiles visited are the product over axes; each dilation group is a problem of its own. bound = sum dense / sum visited.
Source: the window rule of GNA (arXiv 2504.16922); its own simulator is not released, this is derived from the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from sightline.errors import ParameterError
from sightline.mix.parts.base import per_axis
from sightline.mix.parts.windows import Window, check_fit, grid_mask, windows_of


@dataclass(frozen=True)
class Tiles:
    """Key tiles over all query tiles."""

    dense: int
    static: int
    dynamic: int
    worst: float  # dense / visited of the query tile that visits most (static tiles)
    flops: float  # the bound by operations: positions of the grid per key of a window

    @property
    def bound(self) -> float:
        """Upper bound of the speed-up with static key tiles."""
        return self.dense / self.static

    def end_to_end(self, share: float) -> float:
        """Speed-up of a step of which attention is `share` (Amdahl)."""
        return 1 / (1 - share + share / self.bound)


def tile_bound(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    q_tile: int | Sequence[int],
    kv_tile: int | Sequence[int],
) -> Tiles:
    """Count the tiles of a window mask over `grid`, for boxes `q_tile` and `kv_tile`."""
    rules = windows_of(len(grid), window, stride, dilation, causal)
    check_fit(rules, grid)
    sizes = [per_axis(n, t, len(grid)) for n, t in (("q_tile", q_tile), ("kv_tile", kv_tile))]
    if min(map(min, sizes)) < 1:
        raise ParameterError(f"q_tile={q_tile!r} and kv_tile={kv_tile!r} must be at least 1")
    axes = [_axis_tiles(*of_axis) for of_axis in zip(rules, grid, *sizes, strict=True)]
    dense, static, dynamic = (prod(a[i] for a in axes) for i in range(3))
    flops = prod(grid) / prod(r.size for r in rules)
    return Tiles(dense, static, dynamic, prod(a[3] for a in axes), flops)


def _axis_tiles(rule: Window, length: int, tq: int, tk: int) -> tuple[int, int, int, float]:
    """(dense, static, dynamic, worst) of one axis, summed over its dilation groups."""
    dense = static = dynamic = 0
    worst = float("inf")
    for size in (-(-(length - g) // rule.dilation) for g in range(rule.dilation)):
        row = -(-size // tk)
        spans = [(rule.span(at, size)[0], rule.span(min(at + tq, size) - 1, size)[1]) for at in range(0, size, tq)]
        counts = [-(-end // tk) - start // tk for start, end in spans]
        dense += row * len(spans)
        static += sum(counts)
        dynamic += sum(-(-(end - start) // tk) for start, end in spans)
        worst = min(worst, row / max(counts))
    return dense, static, dynamic, worst


def best_stride(
    grid: Sequence[int], window: Sequence[int], *, q_tile: Sequence[int], kv_tile: Sequence[int]
) -> tuple[int, ...]:
    """The smallest stride of every axis that reaches the best bound of all strides up to the window."""
    chosen = []
    for length, size, tq, tk in zip(grid, window, q_tile, kv_tile, strict=True):
        visited = [_axis_tiles(Window(size, s), length, tq, tk)[1] for s in range(1, size + 1)]
        chosen.append(visited.index(min(visited)) + 1)
    return tuple(chosen)


def flat_bound(grid: Sequence[int], rules: Sequence[Window], q_tile: int, kv_tile: int) -> float:
    """The bound when tiles are runs of the flattened grid (from the whole mask: small grids only)."""
    mask = grid_mask(rules, grid)
    n = mask.shape[0]
    rows, columns = -(-n // q_tile), -(-n // kv_tile)
    padded = torch.zeros(rows * q_tile, columns * kv_tile, dtype=torch.bool)
    padded[:n, :n] = mask
    visited = padded.view(rows, q_tile, columns, kv_tile).any(3).any(1)
    return rows * columns / int(visited.sum())

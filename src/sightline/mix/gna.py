"""Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light (GNA).

arXiv 2504.16922 (2025). Official code: SHI-Labs/NATTEN (MIT).

Each token of a 1-D, 2-D or 3-D grid attends to a box of `window` tokens per axis. `stride` consecutive queries share the
box of one of them, so that whole tiles of the mask are full or empty: stride 1 is neighborhood attention (FNA), stride =
window is blocked attention. The rule of one axis is in `parts.windows`; the mask is the product over the axes.

    N(i)   = prod_axes window_axis(i)                                q (B, *X, H, D), k and v (B, *X, Hkv, D)
    out_i  = sum_{j in N(i)} softmax_j(scale q_i k_j) v_j            scale = D^-0.5
    lse_i  = log sum_{j in N(i)} exp(scale q_i k_j)                  fp32, natural logarithm
    extra keys e: (out, lse) merged exactly with the attention of every query to all of e

Fast path: tiles of queries (whole stride groups) with the box of keys that some of them see, one batched SDPA per piece.
Where all queries of a tile share their keys (stride groups, blocks) there is no mask at all. Dilation: each dilation group
gets its own tiles. `backend="flex"`: FlexAttention with the same mask, for a GPU. Differences from the official code:
none in results; its Flex backend's tiled mask is wrong for unequal tiles, ours is not tiled that way. A grid smaller than
window * dilation raises, as there.

Cost: 4 N prod(window) C operations and the tiles' slack (their box over their window); memory: one piece of gathered tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.engine.attention import merge
from sightline.errors import InputError, ParameterError
from sightline.mix.parts.base import (
    Cost,
    Mixer,
    check_grid,
    dense_attention,
    dense_weights,
    flat_index,
    split_heads,
)
from sightline.mix.parts.groups import attend_with_lse, grouped_attention
from sightline.mix.parts.tiles import Tiles, tile_bound
from sightline.mix.parts.windows import Window, axis_mask, check_fit, grid_mask, tile_of, window_axis, windows_of


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    extra_keys: Tensor | None = None,
    extra_values: Tensor | None = None,
    return_lse: bool = False,
    tile: Sequence[int] | None = None,
    backend: Literal["tiles", "flex", "naive"] = "tiles",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a box of neighbours.

    Args:
        q: (B, *X, H, D). k, v: (B, *X, Hkv, D), (B, *X, Hkv, Dv); query head h uses key head h div (H / Hkv).
        window, stride, dilation, causal: one value, or one per axis.
        scale: of the scores; None or 0: D^-0.5.
        extra_keys, extra_values: (B, S, Hkv, D), (B, S, Hkv, Dv): tokens outside the grid that every query sees.
        return_lse: return the log-sum-exp (B, *X, H) too. tile: queries per tile and axis; None: about half a window.
        backend: "tiles" (default), "flex" (FlexAttention), or "naive" (whole mask, small grids).

    Returns:
        (B, *X, H, Dv), or that and the log-sum-exp.

    Raises:
        ParameterError: a window does not fit the grid, or is out of range. InputError: shapes do not fit together.
    """
    grid = q.shape[1:-2]
    if not 1 <= len(grid) <= 3 or k.shape[:-2] != q.shape[:-2] or v.shape[:-1] != k.shape[:-1]:
        raise InputError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} need one grid of 1 to 3 axes")
    if q.shape[-1] != k.shape[-1] or q.shape[-2] % k.shape[-2]:
        raise InputError(f"{q.shape[-2]} query heads of {q.shape[-1]} do not fit {k.shape[-2]} of {k.shape[-1]}")
    if (extra_keys is None) != (extra_values is None):
        raise InputError("extra_keys and extra_values are needed together")
    rules = windows_of(len(grid), window, stride, dilation, causal)
    check_fit(rules, grid)
    scale = scale or q.shape[-1] ** -0.5
    k, v = (_repeat(x, q.shape[-2]) for x in (k, v))
    lse_wanted = return_lse or extra_keys is not None
    run = {"tiles": _tiles, "flex": _flex, "naive": _naive}[backend]
    out, lse = run(q, k, v, rules, scale, lse_wanted, tile)
    if extra_keys is not None:
        sides = attend_extra(q, _repeat(extra_keys, q.shape[-2]), _repeat(extra_values, q.shape[-2]), scale)
        out, lse = merge(out, lse, *sides)
        out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def attend_extra(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query (B, *X, H, D) to all of k, v (B, S, H, ...): output (B, *X, H, Dv) and log-sum-exp (B, *X, H)."""
    flat, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    out, lse = attend_with_lse(flat, k, v, scale)
    return (out.transpose(1, 2).unflatten(1, q.shape[1:-2]), lse.transpose(1, 2).unflatten(1, q.shape[1:-2]))


def _tiles(q, k, v, rules: Sequence[Window], scale: float, lse: bool, tile: Sequence[int] | None):
    axes = []
    for i, (rule, length) in enumerate(zip(rules, q.shape[1:-2], strict=True)):
        whole = rule.size == length and not rule.causal
        queries = length if whole else tile_of(rule) if tile is None else tile[i]
        axes.append(window_axis(rule, length, queries, q.device))
    return grouped_attention(q, k, v, axes, scale, lse=lse)


def _naive(q, k, v, rules: Sequence[Window], scale: float, lse: bool, tile: None):
    grid = q.shape[1:-2]
    mask = grid_mask(rules, grid).to(q.device)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    out = dense_attention(q, k, v, scale, mask).unflatten(1, grid)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return out, scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1).unflatten(1, grid) if lse else None


def _flex(q, k, v, rules: Sequence[Window], scale: float, lse: bool, tile: None):
    from torch.nn.attention.flex_attention import create_block_mask

    grid = q.shape[1:-2]
    tables = [axis_mask(rule, length).to(q.device) for rule, length in zip(rules, grid, strict=True)]
    steps = [prod(grid[i + 1 :]) for i in range(len(grid))]

    def seen(batch, head, i, j):
        allowed = i >= 0
        for table, step, length in zip(tables, steps, grid, strict=True):
            allowed = allowed & table[i // step % length, j // step % length]
        return allowed

    mask = create_block_mask(seen, None, None, prod(grid), prod(grid), device=q.device)
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    out = _flex_kernel(q.is_cuda)(*flat, block_mask=mask, scale=scale, **(_wanting_lse() if lse else {}))
    if not lse:
        return out.transpose(1, 2).unflatten(1, grid), None
    total = getattr(out[1], "lse", out[1])
    return out[0].transpose(1, 2).unflatten(1, grid), total.transpose(1, 2).unflatten(1, grid)


@cache
def _flex_kernel(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _wanting_lse() -> dict:
    from torch.nn.attention import flex_attention as flex

    return {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


@system(
    "gna",
    kind="mix",
    paper=Paper(
        title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        authors="Hassani, Ali and Zhou, Fengzhe and Kane, Aditya and Huang, Jiannan and Chen, Chieh-Yun and Shi, Min "
        "and Walton, Steven and Hoehnerbach, Markus and Thakkar, Vijay and Isaev, Michael and others",
        venue="arXiv",
        year=2025,
        arxiv="2504.16922",
        code="SHI-Labs/NATTEN",
        licence="MIT",
    ),
    summary="attention to a box of neighbours that a few consecutive queries share, so that tiles are full or empty",
    needs=(),
    published=(("FLUX.1-dev 4K, one layer, B200, fp16", "dense 43.31 ms, stride 1 10.93 ms, stride 16x16 6.39 ms"),),
)
@dataclass(eq=False, repr=False)
class GNA(Mixer):
    """Neighborhood attention of a 1-D, 2-D or 3-D grid."""

    window: int | tuple[int, ...] = param(7, "keys per axis", low=2)
    stride: int | tuple[int, ...] = param(1, "consecutive queries that share a window, per axis", low=1)
    dilation: int | tuple[int, ...] = param(1, "distance between keys, per axis", low=1)
    causal: bool | tuple[bool, ...] = param(False, "window ends at the query, per axis")
    qkv_bias: bool = param(True, "bias of the qkv projection")
    scale: float | None = param(None, "of the scores; none: head size ** -0.5")
    proj_drop: float = param(0.0, "dropout after the output projection", low=0, high=1)
    backend: str = param("tiles", "tiles, flex (FlexAttention, for GPUs) or naive")

    def check(self) -> None:
        super().check()
        given = (self.window, self.stride, self.dilation, self.causal)
        lengths = {len(v) for v in given if isinstance(v, tuple)} or {1}
        if len(lengths) > 1:
            raise ParameterError(f"{type(self).__name__}: tuples of different length among {given}")
        windows_of(lengths.pop(), *given)
        if self.backend not in ("tiles", "flex", "naive"):
            raise ParameterError(f"{type(self).__name__}: backend={self.backend!r}; choose tiles, flex or naive")

    def build(self) -> None:
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=self.qkv_bias)
        self.proj = nn.Linear(self.dim, self.dim)
        self.drop = nn.Dropout(self.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(self, x)
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        given = self.window, self.stride, self.dilation, self.causal
        out = neighborhood_attention(q, k, v, *given, scale=self.scale, backend=self.backend)
        return self.drop(self.proj(out.flatten(-2)))

    def rules(self, grid: Sequence[int]) -> tuple[Window, ...]:
        """The window rule of every axis of `grid`; ParameterError where it does not fit."""
        rules = windows_of(len(grid), self.window, self.stride, self.dilation, self.causal)
        check_fit(rules, grid)
        return rules

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        grid = check_grid(self, x)
        q, k, _ = split_heads(self.qkv(x), 3, self.heads)
        at = flat_index(index, grid)
        mask = x.new_ones(1, dtype=torch.bool)
        for rule, length, i in zip(self.rules(grid), grid, index, strict=True):
            mask = torch.kron(mask, axis_mask(rule, length)[i].to(x.device))
        q, k = q.flatten(1, -3)[:, at : at + 1], k.flatten(1, -3)
        return dense_weights(q, k, self.scale or self.head_dim**-0.5, mask).squeeze(2).unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        rules = self.rules(grid)
        boxes = [window_axis(r, n, tile_of(r)).keys.numel() for r, n in zip(rules, grid, strict=True)]
        return self.priced(
            grid, mixing=4 * prod(grid) * prod(r.size for r in rules) * self.dim, held=2 * prod(boxes) * self.dim
        )

    def bound(self, grid: Sequence[int], q_tile: int | Sequence[int], kv_tile: int | Sequence[int]) -> Tiles:
        """The tiles that a tiled kernel visits: the upper bound of its speed-up."""
        given = self.window, self.stride, self.dilation, self.causal
        return tile_bound(grid, *given, q_tile=q_tile, kv_tile=kv_tile)

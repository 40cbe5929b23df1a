"""DaViT: Dual Attention Vision Transformers (channel group attention, and plain window attention).

ECCV 2022, arXiv 2204.03645. Official code: dingmyu/davit (MIT); also the vision tower of Florence-2.

Channel attention: channels are tokens and positions are features, in g groups of D channels. Global at linear cost.

    A   = softmax_last((k D^-0.5)^T v)      out_n = A q_n             q, k, v (B, N, g, D), A (B, g, D, D)     first form
    A   = softmax_last((q N^-0.5)^T k)      out_n = A v_n             second form (Florence-2 weights)

The paper writes softmax(Q^T K) V^T: the same formula with other names; published weights follow the code. Window attention: H
and W are padded with zeros right and below to a multiple of w before the projection (pads take part, unmasked), then plain
attention inside each w x w window, no shift, no relative bias.

Cost: channel 4 N C D operations, memory C D; window 4 N w^2 C. There is no N x N map of channel attention: `attention_of` gives
A, which mixes the channels of every position alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.mix.parts.base import Cost, Mixer, check_grid, dense_weights, flat_index, split_heads
from sightline.mix.parts.groups import Axis, blocks, grouped_attention


def channel_attention(q: Tensor, k: Tensor, v: Tensor, *, second: bool = False) -> Tensor:
    """Channel group attention: q, k, v (B, N, g, D) -> (B, N, g, D)."""
    return torch.einsum("bgcd,bngd->bngc", channel_map(q, k, v, second=second).to(q.dtype), v if second else q)


def channel_map(q: Tensor, k: Tensor, v: Tensor, *, second: bool = False) -> Tensor:
    """A (B, g, D, D), fp32 at least; rows sum to 1 over the channel that is read."""
    left, right, scale = (q, k, q.shape[1] ** -0.5) if second else (k, v, q.shape[-1] ** -0.5)
    scores = torch.einsum("bngc,bngd->bgcd", left * scale, right)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def naive_channel_attention(q: Tensor, k: Tensor, v: Tensor, *, second: bool = False) -> Tensor:
    """`channel_attention` as softmax attention whose tokens are channels: (B, g, D, N) transposed, matrix by matrix."""
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # (B, g, D, N)
    left, right, read, scale = (q, k, v, q.shape[-1] ** -0.5) if second else (k, v, q, q.shape[-2] ** -0.5)
    return ((left @ right.mT * scale).softmax(-1) @ read).permute(0, 3, 1, 2)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Plain attention inside w x w windows: (B, H, W, m, D) -> same, H and W multiples of w."""
    axes = []
    for length in q.shape[1:3]:
        queries, back = blocks(length, window, q.device)
        axes.append(Axis(queries, queries, None, back))
    return grouped_attention(q, k, v, axes, q.shape[-1] ** -0.5)[0]


def window_mask(window: int, grid: Sequence[int]) -> Tensor:
    """(N, N) bool: same window, for the naive form."""
    at = torch.cartesian_prod(*(torch.arange(n) // window for n in grid))
    return (at[:, None] == at).all(-1)


@system(
    "davit",
    kind="mix",
    paper=Paper(
        title="DaViT: Dual Attention Vision Transformers",
        authors="Ding, Mingyu and Xiao, Bin and Codella, Noel and Luo, Ping and Wang, Jingdong and Yuan, Lu",
        venue="ECCV",
        year=2022,
        arxiv="2204.03645",
        code="dingmyu/davit",
        licence="MIT",
    ),
    summary="attention between channels over all positions: global at linear cost",
    needs=(),
    published=(("DaViT-T / S / B ImageNet-1K top-1 (paper)", "82.8 / 84.2 / 84.6"),),
)
@dataclass(eq=False, repr=False)
class ChannelAttention(Mixer):
    """Channel group attention of any grid; `heads` are the groups."""

    second: bool = param(False, "the second form, of Florence-2's weights")
    qkv_bias: bool = param(True, "bias of the projection")

    def build(self) -> None:
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=self.qkv_bias)
        self.proj = nn.Linear(self.dim, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = check_grid(self, x)
        q, k, v = split_heads(self.qkv(x.flatten(1, -2)), 3, self.heads)
        return self.proj(channel_attention(q, k, v, second=self.second).flatten(-2)).unflatten(1, grid)

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """A (B, g, D, D): how the channels of this, as of every, position are mixed. No map over positions exists."""
        flat_index(index, check_grid(self, x))
        return channel_map(*split_heads(self.qkv(x.flatten(1, -2)), 3, self.heads), second=self.second)

    def cost(self, grid: Sequence[int]) -> Cost:
        mixing = 4 * prod(grid) * self.dim * self.head_dim
        return self.priced(grid, mixing=mixing, held=3 * prod(grid) * self.dim + self.dim * self.head_dim)


@dataclass(eq=False, repr=False)
class WindowAttention(Mixer):
    """Window attention of a map (B, H, W, C), any H and W."""

    window: int = param(7, "side of a window", low=1)
    qkv_bias: bool = param(True, "bias of the projection")

    def build(self) -> None:
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=self.qkv_bias)
        self.proj = nn.Linear(self.dim, self.dim)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        return split_heads(self.qkv(x), 3, self.heads)

    def forward(self, x: Tensor) -> Tensor:
        height, width = check_grid(self, x, axes=(2,))
        out = window_attention(*self._project(x), self.window).flatten(-2)
        return self.proj(out)[:, :height, :width]

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The row of one query on the map (B, m, H, W); below 1 in sum where its window holds padding."""
        grid = check_grid(self, x, axes=(2,))
        flat_index(index, grid)
        q, k, _ = self._project(x)
        corner = [i % n // self.window * self.window for i, n in zip(index, grid, strict=True)]
        spans = [slice(c, c + self.window) for c in corner]
        at = flat_index([i % n - c for i, n, c in zip(index, grid, corner, strict=True)], (self.window,) * 2)
        q, k = (t[:, spans[0], spans[1]].flatten(1, 2) for t in (q, k))
        row = dense_weights(q[:, at : at + 1], k, self.head_dim**-0.5).unflatten(-1, (self.window,) * 2).squeeze(2)
        out = row.new_zeros(*row.shape[:2], *(-(-n // self.window) * self.window for n in grid))
        out[..., spans[0], spans[1]] = row
        return out[..., : grid[0], : grid[1]]

    def cost(self, grid: Sequence[int]) -> Cost:
        n = prod(-(-g // self.window) * self.window for g in grid)
        return self.priced(grid, mixing=4 * n * self.window**2 * self.dim, held=3 * n * self.dim)

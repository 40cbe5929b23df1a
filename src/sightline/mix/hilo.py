"""Fast Vision Transformers with HiLo Attention (HiLo, LITv2).

NeurIPS 2022, arXiv 2205.13213. Official code: ziplab/LITv2 (Apache-2.0).

Heads are split: high-frequency heads attend inside s x s windows, low-frequency heads from every token to the map averaged over
s x s. Of m heads of D channels, l = int(m alpha) are low, h = m - l high; scale D^-0.5:

    high = proj_h(attention inside windows of qkv_h(x))                                  (B, H, W, h D)
    low  = proj_l(attention of q_l(x) on kv_l(average s x s of x)),  N x N / s^2         (B, H, W, l D)
    out  = [high | low]

s = 1: all heads are low, plain attention. H and W are padded with zeros right and below to a multiple of s, as the dense-task code
does (the averages then include the zeros). Differences from the official code: none in results.

Cost: 4 N s^2 h D + 4 N (N / s^2) l D operations and the projections: still quadratic, divided by s^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.mix.davit import window_attention
from sightline.mix.parts.base import Cost, Mixer, check_grid, dense_weights, flat_index, split_heads
from sightline.mix.parts.groups import sdpa


def average(x: Tensor, size: int) -> Tensor:
    """Means over size x size cells: (B, H, W, C) -> (B, H / size, W / size, C)."""
    return F.avg_pool2d(x.movedim(-1, 1), size).movedim(1, -1) if size > 1 else x


def low_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token of q (B, H, W, l, D) on all of k, v (B, h, w, l, D) -> (B, H, W, l, D)."""
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return sdpa(*flat, q.shape[-1] ** -0.5).transpose(1, 2).unflatten(1, q.shape[1:3])


@system(
    "hilo",
    kind="mix",
    paper=Paper(
        title="Fast Vision Transformers with HiLo Attention",
        authors="Pan, Zizheng and Cai, Jianfei and Zhuang, Bohan",
        venue="NeurIPS",
        year=2022,
        arxiv="2205.13213",
        code="ziplab/LITv2",
        licence="Apache-2.0",
    ),
    summary="some heads inside small windows, the others on the averaged map",
    needs=(),
    published=(("LITv2-S / M / B ImageNet-1K top-1 (paper)", "82.0 / 83.3 / 83.6"),),
)
@dataclass(eq=False, repr=False)
class HiLo(Mixer):
    """High and low frequency attention of a map (B, H, W, C), any H and W."""

    window: int = param(2, "side s of windows and of averaged cells", low=1)
    alpha: float = param(0.9, "share of low-frequency heads (module default of the official code: 0.5)", low=0, high=1)
    qkv_bias: bool = param(True, "bias of the projections (LITv2)")

    @property
    def low_heads(self) -> int:
        return self.heads if self.window == 1 else int(self.heads * self.alpha)

    @property
    def high_heads(self) -> int:
        return self.heads - self.low_heads

    def build(self) -> None:
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        if low:
            self.l_q = nn.Linear(self.dim, low, bias=self.qkv_bias)
            self.l_kv = nn.Linear(self.dim, 2 * low, bias=self.qkv_bias)
            self.l_proj = nn.Linear(low, low)
        if high:
            self.h_qkv = nn.Linear(self.dim, 3 * high, bias=self.qkv_bias)
            self.h_proj = nn.Linear(high, high)

    def forward(self, x: Tensor) -> Tensor:
        height, width = check_grid(self, x, axes=(2,))
        x = self._padded(x)
        parts = []
        if self.high_heads:
            qkv = split_heads(self.h_qkv(x), 3, self.high_heads)
            parts.append(self.h_proj(window_attention(*qkv, self.window).flatten(-2)))
        if self.low_heads:
            parts.append(self.l_proj(low_attention(*self._low(x)).flatten(-2)))
        return torch.cat(parts, -1)[:, :height, :width]

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[2] % self.window, 0, -x.shape[1] % self.window))

    def _low(self, x: Tensor) -> tuple[Tensor, ...]:
        pooled = split_heads(self.l_kv(average(x, self.window)), 2, self.low_heads)
        return self.l_q(x).unflatten(-1, (self.low_heads, -1)), *pooled

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The row of one query (B, m, *padded grid), high heads first; a low head's cell spreads evenly over its tokens."""
        grid = check_grid(self, x, axes=(2,))
        flat_index(index, grid)
        x, scale, s = self._padded(x), self.head_dim**-0.5, self.window
        i, j = (n % size for n, size in zip(index, grid, strict=True))
        out = x.new_zeros(x.shape[0], self.heads, *x.shape[1:3], dtype=torch.promote_types(x.dtype, torch.float32))
        if self.high_heads:
            q, k, _ = split_heads(self.h_qkv(x), 3, self.high_heads)
            rows, columns = (slice(n // s * s, n // s * s + s) for n in (i, j))
            row = dense_weights(q[:, i, j][:, None], k[:, rows, columns].flatten(1, 2), scale)
            out[:, : self.high_heads, rows, columns] = row.squeeze(2).unflatten(-1, (s, s))
        if self.low_heads:
            q, k, _ = self._low(x)
            row = dense_weights(q[:, i, j][:, None], k.flatten(1, 2), scale).squeeze(2).unflatten(-1, k.shape[1:3])
            out[:, self.high_heads :] = row.repeat_interleave(s, -1).repeat_interleave(s, -2) / s**2
        return out

    def cost(self, grid: Sequence[int]) -> Cost:
        s = self.window
        n = prod(-(-g // s) * s for g in grid)
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        mixing = 4 * n * s**2 * high + 4 * n * (n // s**2) * low
        projections = 2 * n * (3 * self.dim * high + high**2 + self.dim * low + low**2) + 4 * n // s**2 * self.dim * low
        return self.priced(
            grid, mixing=mixing, held=n * (3 * high + low) + 2 * n // s**2 * low, projections=projections
        )

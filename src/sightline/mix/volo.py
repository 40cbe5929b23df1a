"""VOLO: Vision Outlooker for Visual Recognition (outlook attention).

TPAMI 2022, arXiv 2106.13112. Official code: sail-sg/volo (Apache-2.0).

A linear layer on the feature of a location predicts the whole K^2 x K^2 attention among its K x K neighbours; no q k^T.

    v   = W_v x                                              (B, H, W, m, D)
    a   = softmax_last(D^-0.5 (W_a avg_s(x) + b))            (B, h, w, m, K^2, K^2),  h = ceil(H / s): one per s x s cell
    y   = sum over windows that hold (i, j) of  a[window][(i, j), :] v[window]        windows: stride s, zero padding K div 2
    out = proj(y)

Zero padding takes part (weight lost), overlaps are summed without a count; border cells of the average divide by what they hold.
Differences from the official code: none in results. K is odd.

Cost: 2 N / s^2 (C K^4 m + K^4 C) operations, the first term (W_a) dominates; memory N K^2 / s^2 (C + K^2 m).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import ParameterError
from sightline.mix.parts.base import Cost, Mixer, check_grid, flat_index
from sightline.mix.parts.groups import at_once


def outlook_attention(v: Tensor, weights: Tensor, kernel: int, stride: int) -> Tensor:
    """Mix the values of every window by its own weights, and add the windows up.

    Args:
        v: (B, H, W, m, D). weights: (B, ceil(H / stride), ceil(W / stride), m, K^2, K^2), rows after softmax.

    Returns:
        (B, H, W, m, D).
    """
    height, (rows, columns) = v.shape[1], weights.shape[1:3]
    pad, shared = kernel // 2, kernel - stride  # shared: lines that a row of windows has in common with the next
    row = columns * kernel**2 * v.shape[0] * v.shape[-2] * max(v.shape[-1], kernel**2)
    step = max(-(-shared // stride), at_once(v, weights) // row, 1)
    parts, before = [], None
    for first in range(0, rows, step):
        part = weights[:, first : first + step]
        low, lines = first * stride - pad, part.shape[1] * stride
        here = v[:, max(low, 0) : low + lines + shared]
        above = max(-low, 0)
        below = lines + shared - above - here.shape[1]
        here = F.pad(here, (0, 0, 0, 0, pad, pad, above, below))
        found = _mixed(here, part, kernel, stride)  # (B, lines + shared, W + 2 pad, m, D)
        if before is not None and shared:
            found[:, :shared] += before
        parts.append(found[:, :lines])
        before = found[:, lines:]
    out = torch.cat([*parts, before], 1)
    out = F.pad(out, (0, 0, 0, 0, 0, 0, 0, max(0, pad + height - out.shape[1])))
    return out[:, pad : pad + height, pad : pad + v.shape[2]]


def _mixed(v: Tensor, weights: Tensor, kernel: int, stride: int) -> Tensor:
    """Windows of padded values (B, H, W, m, D) under their weights (B, h, w, m, K^2, K^2), added up to the shape of v."""
    windows = v.unfold(1, kernel, stride).unfold(2, kernel, stride)[:, : weights.shape[1], : weights.shape[2]]
    windows = windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)  # (B, h, w, m, K^2, D)
    mixed = (weights @ windows).unflatten(4, (kernel, kernel))
    out = torch.zeros_like(v)
    rows, columns = (n * stride for n in weights.shape[1:3])
    for i in range(kernel):
        for j in range(kernel):
            out[:, i : i + rows : stride, j : j + columns : stride] += mixed[:, :, :, :, i, j]
    return out


def naive_outlook_attention(v: Tensor, weights: Tensor, kernel: int, stride: int) -> Tensor:
    """`outlook_attention` window by window."""
    height, width = v.shape[1:3]
    pad = kernel // 2
    padded = F.pad(v, (0, 0, 0, 0, pad, pad, pad, pad))
    out = torch.zeros_like(padded)
    for i in range(weights.shape[1]):
        for j in range(weights.shape[2]):
            rows, columns = (slice(n * stride, n * stride + kernel) for n in (i, j))
            values = padded[:, rows, columns].flatten(1, 2)  # (B, K^2, m, D)
            mixed = torch.einsum("bmij,bjmd->bimd", weights[:, i, j], values).unflatten(1, (kernel, kernel))
            out[:, rows, columns] = out[:, rows, columns] + mixed
    return out[:, pad : pad + height, pad : pad + width]


@system(
    "volo",
    kind="mix",
    paper=Paper(
        title="VOLO: Vision Outlooker for Visual Recognition",
        authors="Yuan, Li and Hou, Qibin and Jiang, Zihang and Feng, Jiashi and Yan, Shuicheng",
        venue="TPAMI",
        year=2022,
        arxiv="2106.13112",
        code="sail-sg/volo",
        licence="Apache-2.0",
    ),
    summary="attention among neighbours predicted from the centre's feature alone",
    needs=(),
    published=(("VOLO-D1 / D5 ImageNet-1K top-1 at 224 (paper)", "84.2 / 86.1"),),
)
@dataclass(eq=False, repr=False)
class Outlook(Mixer):
    """Outlook attention over a map (B, H, W, C), any H and W."""

    kernel: int = param(3, "odd side K of the neighbourhood", low=1)
    stride: int = param(2, "distance s between windows (VOLO: 2)", low=1)
    qkv_bias: bool = param(False, "bias of the value projection")

    def check(self) -> None:
        super().check()
        if self.kernel % 2 == 0 or self.stride > self.kernel:
            raise ParameterError(f"Outlook: kernel={self.kernel} must be odd and at least stride={self.stride}")

    def build(self) -> None:
        self.v = nn.Linear(self.dim, self.dim, bias=self.qkv_bias)
        self.attn = nn.Linear(self.dim, self.kernel**4 * self.heads)
        self.proj = nn.Linear(self.dim, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(self, x, axes=(2,))
        values = self.v(x).unflatten(-1, (self.heads, -1))
        out = outlook_attention(values, self.weights(x).to(values.dtype), self.kernel, self.stride)
        return self.proj(out.flatten(-2))

    def weights(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the predicted maps (B, h, w, m, K^2, K^2), fp32 at least."""
        pooled = F.avg_pool2d(x.movedim(-1, 1), self.stride, ceil_mode=True).movedim(1, -1)
        size = self.kernel**2
        scores = self.attn(pooled).unflatten(-1, (self.heads, size, size)) * self.head_dim**-0.5
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The effective row of one position (B, m, H, W): the sum over the windows that hold it, not of sum 1."""
        grid = check_grid(self, x, axes=(2,))
        at = flat_index(index, grid)
        weights = self.weights(x)
        marks = torch.eye(prod(grid), dtype=weights.dtype, device=x.device).view(1, *grid, 1, -1)
        marks = marks.expand(len(x), -1, -1, self.heads, -1)
        return outlook_attention(marks, weights, self.kernel, self.stride).flatten(1, 2)[:, at].unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        cells, four = prod(-(-g // self.stride) for g in grid), self.kernel**4
        mixing = 2 * cells * four * self.dim
        projections = 4 * prod(grid) * self.dim**2 + 2 * cells * self.dim * four * self.heads
        held = cells * (2 * self.kernel**2 * self.dim + four * self.heads)
        return self.priced(grid, mixing=mixing, held=held, projections=projections)

"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (SHSA).

CVPR 2024, arXiv 2401.16456. Official code: ysj9909/SHViT (MIT).

One head on the first `part` channels; the others pass, and the projection mixes both.

    x1, x2    = split(x)                      x (B, H, W, C), x1 (B, H, W, part)
    q | k | v = BN(conv1x1(GroupNorm_1(x1)))  part -> 2 qk + part
    out       = BN(conv1x1(relu [softmax(qk^-0.5 q k^T) v | x2]))

The residual is outside. The last BatchNorm starts at weight 0, so a new block is the identity. x2 enters without a norm.
Differences from the official code: none in results; channels are last.

Cost: 2 N^2 (qk + part) and the projections: dense, meant for N <= 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import ParameterError
from sightline.mix.parts.base import Cost, Mixer, check_grid, dense_attention, dense_weights, flat_index
from sightline.mix.parts.groups import sdpa


def single_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k (B, N, qk), v (B, N, part) -> (B, N, part)."""
    return sdpa(*(x[:, None] for x in (q, k, v)), q.shape[-1] ** -0.5).squeeze(1)


def naive_single_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`single_head_attention` from its map."""
    return dense_attention(*(x[:, :, None] for x in (q, k, v)), q.shape[-1] ** -0.5).squeeze(2)


class ConvNorm(nn.Module):
    """1 x 1 convolution without bias and BatchNorm, on (B, C, H, W)."""

    def __init__(self, dim: int, out: int, weight: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Conv2d(dim, out, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        nn.init.constant_(self.bn.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


@system(
    "shvit",
    kind="mix",
    paper=Paper(
        title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        authors="Yun, Seokju and Ro, Youngmin",
        venue="CVPR",
        year=2024,
        arxiv="2401.16456",
        code="ysj9909/SHViT",
        licence="MIT",
    ),
    summary="one attention head on a part of the channels",
    needs=(),
    published=(("SHViT-S4 ImageNet-1K top-1 (paper)", "79.4"),),
)
@dataclass(eq=False, repr=False)
class SHSA(Mixer):
    """Single-head attention over a map (B, H, W, C)."""

    heads: int = param(1, "always one", low=1, high=1)
    part: int | None = param(None, "channels that attend; none: dim / 4.67", low=1)
    qk_dim: int = param(16, "channels of queries and keys", low=1)

    @property
    def attending(self) -> int:
        return max(1, int(self.dim / 4.67)) if self.part is None else self.part

    def check(self) -> None:
        if self.attending > self.dim:
            raise ParameterError(f"SHSA: part={self.part} exceeds dim={self.dim}")

    def build(self) -> None:
        self.pre_norm = nn.GroupNorm(1, self.attending)
        self.qkv = ConvNorm(self.attending, 2 * self.qk_dim + self.attending)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(self.dim, self.dim, weight=0.0))

    def forward(self, x: Tensor) -> Tensor:
        grid = check_grid(self, x, axes=(2,))
        q, k, v = self._project(x)
        out = single_head_attention(q, k, v).mT.unflatten(-1, grid)  # (B, part, H, W)
        rest = x[..., self.attending :].movedim(-1, 1)
        return self.proj(torch.cat([out, rest], 1)).movedim(1, -1)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, N, channels)."""
        first = self.pre_norm(x[..., : self.attending].movedim(-1, 1))
        return self.qkv(first).flatten(2).mT.split([self.qk_dim, self.qk_dim, self.attending], -1)

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        grid = check_grid(self, x, axes=(2,))
        at = flat_index(index, grid)
        q, k, _ = self._project(x)
        row = dense_weights(q[:, at : at + 1, None], k[:, :, None], self.qk_dim**-0.5)
        return row.squeeze(2).unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n, part = prod(grid), self.attending
        projections = 2 * n * part * (2 * self.qk_dim + part) + 2 * n * self.dim**2
        mixing = 2 * n * n * (self.qk_dim + part)
        return self.priced(grid, mixing=mixing, held=n * (2 * self.qk_dim + part), projections=projections)

"""BiFormer: Vision Transformer with Bi-Level Routing Attention (BRA).

CVPR 2023, arXiv 2303.08810. Official code: rayleizhu/BiFormer (MIT).

The map is cut into S x S regions of h x w tokens. Each region chooses the k regions whose mean key suits its mean query best;
its tokens attend to all tokens of those.

    q_r, k_r = means of a region's tokens, all heads together, detached               (B, S^2, C)
    idx      = top-k_j (C^-0.5 q_r k_r^T)                                            (B, S^2, k), best first
    out      = softmax(C^-0.5 q [k_idx]^T) [v_idx]  + dwconv5x5(v)                    q (B, H, W, m, D)

The scale is that of all channels, not of a head: published weights rest on it. Two published forms:
- `BRA` (registered; the legacy module of the ImageNet weights): H and W are padded with zeros right and below to a multiple of
  S *before* the projection, so padded tokens carry its bias and take part; the routing is of padded means.
- `BRAConv` (1 x 1 convolutions, STL weights): regions of (H div S, W div S); q, k, v are padded *after* the projection;
  means leave the padding out; where S does not divide H there are more than S^2 regions. Keys of padding are not masked.
`AttentionLePE` is the full attention of the last stage. Differences from the official code: ties of the routing go to the
lower region number; its unused options (pooled keys, soft routing, learned routing) do not exist here.

Cost: 4 N k (N / S^2) C + 2 S^4 C operations; the gather copies keys and values k times.
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
from sightline.mix.parts.base import Cost, Mixer, check_grid, dense_attention, dense_weights, flat_index, split_heads
from sightline.mix.parts.groups import sdpa
from sightline.mix.parts.local import convolved, depthwise


def to_regions(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, ...) -> (B, R, h w, ...), regions of `size` (h, w) in row-major order."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))  # (B, rows, h, columns, w, ...)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_regions(x: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The way back: (B, R, h w, ...) -> (B, H, W, ...)."""
    x = x.unflatten(1, (grid[0] // size[0], grid[1] // size[1])).unflatten(3, size)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def route(q: Tensor, k: Tensor, topk: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `topk` regions of every region, best first, from mean queries and keys (B, R, C).

    Returns:
        Region numbers (B, R, k) and softmax over the chosen scores (B, R, k). No gradient.
    """
    scores = (q.detach() * scale) @ k.detach().mT
    scores, index = scores.sort(dim=-1, descending=True, stable=True)
    return index[..., :topk], scores[..., :topk].softmax(-1)


def routed_attention(q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], index: Tensor, scale: float) -> Tensor:
    """Tokens attend to the tokens of the regions that their region chose.

    Args:
        q, k, v: (B, H, W, m, D). size: (h, w) of a region, dividing H and W. index: (B, R, k) region numbers.

    Returns:
        (B, H, W, m, D).
    """
    queries, keys, values = (to_regions(x, size) for x in (q, k, v))  # (B, R, h w, m, D)
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    keys, values = (x[batch, index].flatten(2, 3) for x in (keys, values))  # (B, R, k h w, m, D)
    folded = (x.flatten(0, 1).transpose(1, 2) for x in (queries, keys, values))
    out = sdpa(*folded, scale).transpose(1, 2).unflatten(0, queries.shape[:2])
    return from_regions(out, size, tuple(q.shape[1:3]))


def naive_routed_attention(q, k, v, size: tuple[int, int], index: Tensor, scale: float) -> Tensor:
    """`routed_attention` as full attention under a mask."""
    mask = routing_mask(index, size, tuple(q.shape[1:3]))[:, None]
    return dense_attention(*(x.flatten(1, 2) for x in (q, k, v)), scale, mask).view(v.shape)


def routing_mask(index: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B, N, N) bool: which tokens see which, from region numbers (B, R, k)."""
    regions = index.shape[1]
    chosen = torch.zeros(index.shape[0], regions, regions, dtype=torch.bool, device=index.device)
    chosen = chosen.scatter(2, index, True)
    at = torch.arange(prod(grid), device=index.device)
    region = at // grid[1] // size[0] * (grid[1] // size[1]) + at % grid[1] // size[1]
    return chosen[:, region][:, :, region]


@system(
    "biformer",
    kind="mix",
    paper=Paper(
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        authors="Zhu, Lei and Wang, Xinjiang and Ke, Zhanghan and Zhang, Wayne and Lau, Rynson",
        venue="CVPR",
        year=2023,
        arxiv="2303.08810",
        code="rayleizhu/BiFormer",
        licence="MIT",
    ),
    summary="each region of the map attends to the few regions that suit it best",
    needs=(),
    published=(("BiFormer-T / S / B ImageNet-1K top-1 (paper)", "81.4 / 83.8 / 84.3"),),
)
@dataclass(eq=False, repr=False)
class BRA(Mixer):
    """Bi-level routing attention over a map (B, H, W, C), any H and W."""

    regions: int = param(7, "regions S per side", low=1)
    topk: int = param(4, "regions that a region attends to", low=1)
    kernel: int = param(5, "odd size of the local branch's convolution; 0: none", low=0)

    def check(self) -> None:
        super().check()
        if self.topk > self.regions**2:
            raise ParameterError(f"{type(self).__name__}: topk={self.topk} exceeds the {self.regions**2} regions")
        if self.kernel and self.kernel % 2 == 0:
            raise ParameterError(f"{type(self).__name__}: kernel={self.kernel} must be odd, or 0 for no local branch")

    def build(self) -> None:
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(self.dim, 3 * self.dim)})
        self.wo = nn.Linear(self.dim, self.dim)
        self.lepe = depthwise(self.dim, self.kernel) if self.kernel else None

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        height, width = check_grid(self, x, axes=(2,))
        q, k, v, size, index, _ = self.routing(x)
        out = routed_attention(q, k, v, size, index, self.scale).flatten(-2)
        if self.lepe is not None:
            out = out + convolved(self.lepe, v.flatten(-2))
        return self.wo(out)[:, :height, :width]

    def routing(self, x: Tensor):
        """q, k, v (B, H', W', m, D) of the padded map, region size (h, w), region numbers (B, R, k), their weights."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        size = x.shape[1] // self.regions, x.shape[2] // self.regions
        q, k, v = split_heads(self.qkv["qkv"](x), 3, self.heads)
        means = (to_regions(t.flatten(-2), size).mean(2) for t in (q, k))
        return q, k, v, size, *route(*means, self.topk, self.scale)

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        grid = check_grid(self, x, axes=(2,))
        flat_index(index, grid)
        q, k, _, size, chosen, _ = self.routing(x)
        padded = tuple(q.shape[1:3])
        at = flat_index([i % n for i, n in zip(index, grid, strict=True)], padded)
        mask = routing_mask(chosen, size, padded)[:, None, at : at + 1]
        row = dense_weights(q.flatten(1, 2)[:, at : at + 1], k.flatten(1, 2), self.scale, mask)
        return row.squeeze(2).unflatten(-1, padded)[..., : grid[0], : grid[1]]

    def cost(self, grid: Sequence[int]) -> Cost:
        n = prod(-(-g // self.regions) * self.regions for g in grid)
        keys = self.topk * n // self.regions**2
        mixing = 4 * n * keys * self.dim + 2 * self.regions**4 * self.dim
        return self.priced(grid, mixing=mixing, held=2 * self.topk * n * self.dim)


@dataclass(eq=False, repr=False)
class BRAConv(BRA):
    """The form of the STL weights: padding after the projection, region size rounded down. See the module's head."""

    def build(self) -> None:
        self.qkv_linear = nn.Conv2d(self.dim, 3 * self.dim, 1)
        self.output_linear = nn.Conv2d(self.dim, self.dim, 1)
        self.lepe = depthwise(self.dim, self.kernel) if self.kernel else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = check_grid(self, x, axes=(2,))
        q, k, v, size, index, _ = self.routing(x)
        out = routed_attention(q, k, v, size, index, self.scale).flatten(-2)[:, :height, :width]
        if self.lepe is not None:
            out = out + convolved(self.lepe, v.flatten(-2)[:, :height, :width])
        return convolved(self.output_linear, out)

    def routing(self, x: Tensor):
        height, width = x.shape[1:3]
        size = height // self.regions, width // self.regions
        if min(size) < 1:
            raise ParameterError(
                f"BRAConv: {self.regions} regions per side need a map of at least that, got {(height, width)}"
            )
        q, k, v = split_heads(convolved(self.qkv_linear, x), 3, self.heads)
        pool = {"kernel_size": size, "ceil_mode": True, "count_include_pad": False}
        means = (F.avg_pool2d(t.flatten(-2).movedim(-1, 1), **pool).flatten(2).mT for t in (q, k))
        chosen = route(*means, self.topk)
        pad = (0, 0, 0, 0, 0, -width % size[1], 0, -height % size[0])
        return *(F.pad(t, pad) for t in (q, k, v)), size, *chosen


class AttentionLePE(nn.Module):
    """Full attention with a local branch on the *input*, as BiFormer's last stage has it: (B, H, W, C) -> same."""

    def __init__(self, dim: int, heads: int = 8, *, qkv_bias: bool = False, kernel: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.lepe = depthwise(dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in split_heads(self.qkv(x), 3, self.heads))
        out = sdpa(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(-2).view_as(x)
        return self.proj(out + convolved(self.lepe, x))

"""Flowformer: Linearizing Transformers with Conservation Flows: the vision backbone.

ICML 2022, arXiv 2202.06258. Official code: thuml/Flowformer (MIT). The operator is `sightline.mix.flowformer`.

    patches     4x4 s4 conv, + position embedding (1, 3136, 96) in stage 1 only        between stages: 2x2 s2 conv, no norm
    block       x += Flow(LN(x));  x += gamma MLP(LN(x))          12 heads everywhere, LN eps 1e-6, gamma starts at 0.001
    head        LN, mean over positions, linear

Differences from the official code: any input; the position embedding is resized, odd maps are cut as the convolutions do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import isqrt

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, Embed, Module, drop_rates, mlp
from sightline.backbones.parts.positions import at_size
from sightline.backbones.variants import Variant, register
from sightline.mix.flowformer import Flow

NORM = partial(nn.LayerNorm, eps=1e-6)


class ScaledBlock(Block):
    """A block whose second branch has a learned factor per channel."""

    def __init__(self, dim: int, *args, init: float = 0.001, **kwargs) -> None:
        super().__init__(dim, *args, **kwargs)
        self.gamma = nn.Parameter(init * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))


class Flowformer(Backbone):
    """See the module's head."""

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 10, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        heads: int = 12,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(widths, (4, 8, 16, 32), num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)
        sizes = zip((in_chans, *widths), widths, (4, 2, 2, 2), strict=False)
        self.patch_embed = nn.ModuleList(Embed(nn.Conv2d(a, b, step, stride=step)) for a, b, step in sizes)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, (img_size // 4) ** 2, widths[0]), std=0.02))
        self.blocks = nn.ModuleList()
        for dim, rates in zip(widths, drop_rates(drop_path_rate, depths), strict=True):
            blocks = (ScaledBlock(dim, Flow(dim, heads), mlp(dim, 4), NORM, rate) for rate in rates)
            self.blocks.append(nn.Sequential(*blocks))
        self.norm = NORM(widths[-1])
        self.finish_init(num_classes)

    def steps(self) -> Iterator[tuple[Module, Module]]:
        yield self._placed, self.blocks[0]
        yield from zip(self.patch_embed[1:], self.blocks[1:], strict=True)

    def _placed(self, x: Tensor) -> Tensor:
        x, side = self.patch_embed[0](x), isqrt(self.pos_embed.shape[1])
        return x + at_size(self.pos_embed, (side, side), tuple(x.shape[1:3]))


register(
    __name__,
    Flowformer,
    [Variant("flowformer", "flowformer", {}, 43_311_304, top1=80.6)],
    first_conv="patch_embed.0.proj",
)

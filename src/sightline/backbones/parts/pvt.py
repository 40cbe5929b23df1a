"""The PVT skeleton: four stages of patches, learned positions and blocks; families say which attention a block has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, Embed, Module, drop_rates, mlp
from sightline.backbones.parts.positions import at_size

WIDTHS = (64, 128, 320, 512)
MLP_RATIOS = (8, 8, 4, 4)


class PVT(Backbone):
    """patch_embedN (conv, LN), pos_embedN, blockN for N = 1 ... 4; mean over positions, no last norm."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(WIDTHS, (4, 8, 16, 32), num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)
        norm = partial(nn.LayerNorm, eps=1e-6)
        before = in_chans
        self.sides = [img_size // step for step in (4, 8, 16, 32)]
        for i, (dim, rates) in enumerate(zip(WIDTHS, drop_rates(drop_path_rate, depths), strict=True)):
            step, side = (2 if i else 4), self.sides[i]
            embed = Embed(nn.Conv2d(before, dim, step, stride=step), nn.LayerNorm(dim))
            places = nn.Parameter(trunc_normal_(torch.empty(1, side**2, dim), std=0.02))
            blocks = (
                Block(dim, self.attention(dim, heads[i], i, side), mlp(dim, MLP_RATIOS[i]), norm, rate)
                for rate in rates
            )
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"pos_embed{i + 1}", places)
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
            before = dim
        self.norm = nn.Identity()
        self.finish_init(num_classes)

    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        """The attention of a stage's blocks, (B, H, W, C) -> same; side: of the map at the size built for."""
        raise NotImplementedError

    def steps(self) -> Iterator[tuple[Module, Module]]:
        for i in range(1, 5):
            yield partial(self._placed, i), getattr(self, f"block{i}")

    def _placed(self, i: int, x: Tensor) -> Tensor:
        x, side = getattr(self, f"patch_embed{i}")(x), self.sides[i - 1]
        return x + at_size(getattr(self, f"pos_embed{i}"), (side, side), tuple(x.shape[1:3]))

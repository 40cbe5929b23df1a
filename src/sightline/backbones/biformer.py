"""BiFormer: Vision Transformer with Bi-Level Routing Attention: the backbones T, S, B and STL.

CVPR 2023, arXiv 2303.08810. Official code: rayleizhu/BiFormer (MIT). The operator is `sightline.mix.biformer`.

Four stages at strides 4, 8, 16, 32; regions 7 x 7, of which a region attends to 1, 4, 16; the last stage attends fully, with the
local branch on the input.

    stem        3x3 s2 conv (3 -> C/2), BN, GELU, 3x3 s2 conv, BN          between stages: 3x3 s2 conv, BN
    block       x += dwconv3x3(x);  x += BRA(LN(x));  x += MLP(LN(x))      LN eps 1e-6, MLP ratio 3
    head        BN, mean over positions, linear

STL has Swin-T's layout: patches of 4 and BN, BN and 2x2 s2 conv between stages, no position convolution, MLP ratio 4.
Differences from the official code: sides that 7 does not divide are padded (its classification model raises), as its
`auto_pad` does; its unused options do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, Module, drop_rates
from sightline.backbones.variants import Variant, register
from sightline.mix.biformer import BRA, AttentionLePE
from sightline.mix.parts.local import convolved, depthwise

NORM = partial(nn.LayerNorm, eps=1e-6)


class PositionedBlock(Block):
    """A block with a depthwise 3 x 3 convolution before the attention."""

    def __init__(self, dim: int, *args, **kwargs) -> None:
        super().__init__(dim, *args, **kwargs)
        self.pos_embed = depthwise(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + convolved(self.pos_embed, x))


class BiFormer(Backbone):
    """See the module's head.

    regions: per side. topks: how many of them a region attends to, by stage; 0: full attention. stl: Swin's layout.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        topks: Sequence[int] = (1, 4, 16, 0),
        mlp_ratio: float = 3,
        stl: bool = False,
        regions: int = 7,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(widths, (4, 8, 16, 32), num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)
        self.stl = stl
        self.downsample_layers = nn.ModuleList(_stl_downsampling(in_chans, widths) if stl else _stem(in_chans, widths))
        kind = Block if stl else PositionedBlock
        self.stages = nn.ModuleList()
        for dim, topk, rates in zip(widths, topks, drop_rates(drop_path_rate, depths), strict=True):
            blocks = nn.Sequential(
                *(kind(dim, _attention(dim, topk, regions), self._mlp(dim, mlp_ratio), NORM, r) for r in rates)
            )
            self.stages.append(nn.ModuleDict({"blocks": blocks}) if stl else blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.finish_init(num_classes)

    def _mlp(self, dim: int, ratio: float) -> nn.Module:
        """Published names: fc1 and fc2 are 0 and 3, in STL 0 and 2."""
        hidden = int(dim * ratio)
        idle = [] if self.stl else [nn.Identity()]
        return nn.Sequential(nn.Linear(dim, hidden), *idle, nn.GELU(), nn.Linear(hidden, dim))

    def steps(self) -> Iterator[tuple[Module, Module]]:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            yield lambda x, down=down: down(x).movedim(1, -1), stage["blocks"] if self.stl else stage

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state.movedim(-1, 1)).movedim(1, -1)


def _attention(dim: int, topk: int, regions: int) -> nn.Module:
    return BRA(dim, dim // 32, regions=regions, topk=topk) if topk else AttentionLePE(dim, heads=8)


def _stem(in_chans: int, widths: Sequence[int]) -> Iterator[nn.Module]:
    """3 x 3 convolutions of stride 2: two before the first stage, one before each other."""
    half, first = widths[0] // 2, widths[0]
    yield nn.Sequential(*_halving(in_chans, half), nn.GELU(), *_halving(half, first))
    for before, after in pairwise(widths):
        yield nn.Sequential(*_halving(before, after))


def _halving(before: int, after: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after)


def _stl_downsampling(in_chans: int, widths: Sequence[int]) -> Iterator[nn.Module]:
    yield nn.Sequential(nn.Conv2d(in_chans, widths[0], 4, stride=4), nn.BatchNorm2d(widths[0]))
    for before, after in pairwise(widths):
        yield nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, after, 2, stride=2))


_BASE = {"depths": (4, 4, 18, 4), "widths": (96, 192, 384, 768)}
_STL = {"depths": (2, 2, 6, 2), "widths": (96, 192, 384, 768), "mlp_ratio": 4, "stl": True}
register(
    __name__,
    BiFormer,
    [
        Variant("biformer_tiny", "biformer", {}, 13_142_760, macs=2.2, top1=81.4),
        Variant("biformer_small", "biformer", {"depths": (4, 4, 18, 4)}, 25_536_232, macs=4.5, top1=83.8),
        Variant("biformer_base", "biformer", _BASE, 56_804_968, macs=9.8, top1=84.3),
        Variant("biformer_stl", "biformer", _STL, parameters=28_372_552, macs=4.6, top1=82.7),
    ],
)

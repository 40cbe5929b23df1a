"""InLine attention: the backbones InLine-DeiT, InLine-PVT, InLine-Swin and InLine-CSwin.

NeurIPS 2024, arXiv 2412.06590. Official code: LeapLabTHU/InLine (no licence file: facts only). The operator is
`sightline.mix.inline`; the skeletons are in `parts`. Head dimension 32 everywhere.

    DeiT     T 192 at 224, S 320 at 288, B 384 at 448: width traded for resolution; all 12 blocks
    PVT      all stages; separate q and kv
    Swin     T: stages 1-3; S: 1-2; B: 1-2 and the first two blocks of 3. Windows of 7 (12 at 384) elsewhere
    CSwin    stages 1-2, with a learned convolution beside the predicted one, whose kernels come from the block's input before
             its norm; cross-shaped stripes elsewhere

Differences from the official code: any input; positions made for `img_size` are resized to the map. Parameters are those of the
official classes; its README says 50.2 M for PVT-L (here 51.2) and 25, 43, 96 M for CSwin (here 20.6, 33.0, 73.4).
"""

from __future__ import annotations

from torch import Tensor, nn

from sightline.backbones.parts.base import Block
from sightline.backbones.parts.cswin import CSwin
from sightline.backbones.parts.deit import DeiT
from sightline.backbones.parts.pvt import PVT
from sightline.backbones.parts.swin import Swin
from sightline.backbones.variants import Variant, register
from sightline.mix.inline import InLine


class InLineDeiT(DeiT):
    def attention(self, dim: int, heads: int, block: int) -> nn.Module:
        return InLine(dim, heads)


class InLinePVT(PVT):
    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        return InLine(dim, heads, fused=False)


class InLineSwin(Swin):
    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        return InLine(dim, heads)


class MeanBlock(Block):
    """Predicts the kernels from the mean of its input before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mean=x.mean((1, 2))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class InLineCSwin(CSwin):
    block = MeanBlock
    inner = "get_v"

    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        return InLine(dim, heads, learned=True)


def _pvt(*depths: int) -> dict:
    return {"depths": depths, "heads": (2, 4, 10, 16)}


_SWIN_B = {"depths": (2, 2, 18, 2), "mixed": (2, 2, 2, 0), "dim": 128, "heads": 4}
_CSWIN_B = {"depths": (3, 6, 29, 2), "dim": 96, "heads": 4}
register(
    __name__,
    InLineDeiT,
    [
        Variant("inline_deit_tiny", "inline", {"heads": 6}, 6_477_736, macs=1.1, top1=74.5),
        Variant("inline_deit_small", "inline", {"dim": 320, "heads": 10}, 16_734_760, macs=5.0, top1=80.2, size=288),
        Variant("inline_deit_base", "inline", {"dim": 384, "heads": 12}, 23_797_096, macs=17.2, top1=82.3, size=448),
    ],
    first_conv="patch_embed.proj",
)
register(
    __name__,
    InLinePVT,
    [
        Variant("inline_pvt_tiny", "inline", _pvt(2, 2, 2, 2), 12_032_232, macs=2.0, top1=78.2),
        Variant("inline_pvt_small", "inline", _pvt(3, 4, 6, 3), 21_556_136, macs=3.9, top1=82.0),
        Variant("inline_pvt_medium", "inline", _pvt(3, 4, 18, 3), parameters=37_618_856, macs=6.9, top1=83.2),
        Variant("inline_pvt_large", "inline", _pvt(3, 8, 27, 3), parameters=51_154_280, macs=10.2, top1=83.6),
    ],
    first_conv="patch_embed1.proj",
)
register(
    __name__,
    InLineSwin,
    [
        Variant("inline_swin_tiny", "inline", {"mixed": (2, 2, 6, 0)}, 29_223_544, macs=4.5, top1=82.4),
        Variant(
            "inline_swin_small",
            "inline",
            {"depths": (2, 2, 18, 2), "mixed": (2, 2, 0, 0)},
            parameters=49_793_296,
            macs=8.7,
            top1=83.6,
        ),
        Variant("inline_swin_base", "inline", _SWIN_B, parameters=88_350_120, macs=15.4, top1=84.1),
        Variant("inline_swin_base_384", "inline", _SWIN_B, parameters=88_465_320, size=384),
    ],
    first_conv="patch_embed.proj",
)
register(
    __name__,
    InLineCSwin,
    [
        Variant("inline_cswin_tiny", "inline", {}, parameters=20_604_520, macs=4.3, top1=83.2),
        Variant("inline_cswin_small", "inline", {"depths": (3, 6, 29, 2)}, parameters=33_032_872, macs=6.8, top1=83.8),
        Variant("inline_cswin_base", "inline", _CSWIN_B, parameters=73_413_640, macs=14.9, top1=84.5),
        Variant("inline_cswin_base_384", "inline", _CSWIN_B, parameters=73_413_640, size=384),
    ],
    first_conv="stage1_conv_embed.0",
)

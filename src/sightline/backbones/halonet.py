"""Scaling Local Self-Attention for Parameter Efficient Visual Backbones: HaloNet H0 ... H7.

CVPR 2021, arXiv 2103.12731. No official code or weights. The operator is `sightline.mix.halonet`. timm's own halonet_h1,
halonet26t, sehalonet33ts, halonet50ts and haloregnetz_b, which have weights, stay timm's.

    stem     7x7 s2 conv to 64, BN, ReLU, 3x3 s2 max pool
    block    1x1 conv to c, BN, ReLU;  haloed attention (block b, halo h) to c r_v, BN, ReLU;  1x1 conv to c r_b, BN;  + x;  ReLU
    stages   c = 64, 128, 256, 512 with 3, 3, l3, 3 blocks; heads 4, 8, 8, 8; the first block of stages 2-4 has strided queries
    head     1x1 conv to d_f, BN, ReLU where d_f is given; mean over positions; linear

Table 2 of the paper as remembered (b, h, r_v, r_b, l3, size, d_f); with it the parameters come out as the paper rounds them
(see the test), which is the only check there is. Where the sheet and the paper are silent (activation, norm), timm's halonet_h1
is followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, drop_rates
from sightline.backbones.variants import Variant, register
from sightline.mix.halonet import Halo

WIDTHS, HEADS = (64, 128, 256, 512), (4, 8, 8, 8)


def unit(before: int, after: int, *, kernel: int = 1, stride: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, BN, ReLU."""
    conv = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), *([nn.ReLU()] if act else []))


class HaloBlock(nn.Module):
    """The bottleneck on (B, C, H, W)."""

    def __init__(self, before: int, mid: int, after: int, attention: Halo, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = unit(before, mid)
        self.self_attn = attention
        self.bn2 = nn.BatchNorm2d(attention.channels)
        self.conv3 = unit(attention.channels, after, act=False)
        nn.init.zeros_(self.conv3[1].weight)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else unit(before, after, stride=stride, act=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.self_attn(self.conv1(x).movedim(1, -1)).movedim(-1, 1)
        out = self.conv3(F.relu(self.bn2(out)))
        return F.relu(self.shortcut(x) + self.drop_path(out))


class HaloNet(Backbone):
    """See the module's head. block, halo: of the attention; rv, rb: widening of values and of the block's output."""

    def __init__(
        self,
        block: int = 8,
        halo: int = 3,
        rv: float = 1.0,
        rb: float = 1.0,
        l3: int = 10,
        df: int | None = None,
        *,
        img_size: int = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        outs = [int(width * rb) for width in WIDTHS]
        super().__init__(outs, (4, 8, 16, 32), num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)
        self.stem = nn.Sequential(unit(in_chans, 64, kernel=7, stride=2), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        before = 64
        for i, rates in enumerate(drop_rates(drop_path_rate, (3, 3, l3, 3))):
            mid, blocks = WIDTHS[i], []
            for j, rate in enumerate(rates):
                stride = 2 if i and not j else 1
                rule = {"block": block, "halo": halo, "stride": stride, "qk_dim": mid // HEADS[i]}
                attention = Halo(mid, HEADS[i], dim_out=int(mid * rv), **rule)
                blocks.append(HaloBlock(before, mid, outs[i], attention, stride, rate))
                before = outs[i]
            self.stages.append(nn.Sequential(*blocks))
        self.final = unit(before, df) if df else nn.Identity()
        self.num_features = self.head_hidden_size = df or before
        self.finish_init(num_classes)

    def walk(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            yield x.movedim(1, -1)

    def finish(self, state: Tensor) -> Tensor:
        return self.final(state.movedim(-1, 1)).movedim(1, -1)


def _variant(name: str, millions: float, size: int, *table: float | None, top1: float | None = None) -> Variant:
    names = ("block", "halo", "rv", "rb", "l3", "df")
    return Variant(
        f"halonet_{name}", "halonet", dict(zip(names, table, strict=True)), millions=millions, size=size, top1=top1
    )


register(
    __name__,
    HaloNet,
    [
        _variant("h0", 5.5, 256, 8, 3, 1.0, 0.5, 7, None),
        _variant("h2", 9.4, 256, 8, 3, 1.0, 1.25, 11, None),
        _variant("h3", 11.8, 320, 10, 3, 1.0, 1.5, 12, 1024),
        _variant("h4", 19.1, 384, 12, 2, 1.0, 3.0, 12, 1280),
        _variant("h5", 30.7, 448, 14, 2, 2.5, 2.0, 23, 1536),
        _variant("h6", 43.4, 512, 8, 4, 3.0, 2.75, 24, 1536),
        _variant("h7", 67.4, 600, 10, 3, 4.0, 3.5, 26, 2048, top1=84.9),
    ],
    first_conv="stem.0.0",
)

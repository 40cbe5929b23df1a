"""Fast Vision Transformers with HiLo Attention: the backbones LITv2-S, -M, -B.

NeurIPS 2022, arXiv 2205.13213. Official code: ziplab/LITv2 (Apache-2.0). The operator is `sightline.mix.hilo`.

    patches     4x4 s4 conv, LN; no position embedding
    stages 1-2  x += DWMlp(LN(x))                                   fc1, depthwise 3x3, GELU, fc2; no attention
    stages 3-4  x += HiLo(LN(x));  x += DWMlp(LN(x))                windows 2, then 1 (plain attention); alpha 0.9
    between     deformable token merging: offsets = 2x2 s2 conv (C -> 8), deformable 2x2 s2 conv (C -> 2C), BN, GELU
    head        LN, mean over positions, linear

The deformable convolution is torchvision's; its offsets start at zero and train at a hundredth of the learning rate officially.
Differences from the official code: any input; odd maps are padded with zeros right and below before merging and before HiLo,
as its detection code does (its classification model raises).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from sightline.backbones.parts.base import Block, DepthwiseMlp, drop_rates
from sightline.backbones.parts.swin import Layered
from sightline.backbones.variants import Variant, register
from sightline.mix.hilo import HiLo


class DeformableMerging(nn.Module):
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C): the four tokens to merge are looked for near their places."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dconv = nn.Conv2d(dim, 2 * dim, 2, stride=2)  # its weights are applied at moved places
        self.dconv.conv_offset = nn.Conv2d(dim, 8, 2, stride=2)
        nn.init.zeros_(self.dconv.conv_offset.weight)
        nn.init.zeros_(self.dconv.conv_offset.bias)
        self.norm_layer = nn.BatchNorm2d(2 * dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2)).movedim(-1, 1).contiguous()
        offsets = self.dconv.conv_offset(x)  # (B, 8, H/2, W/2): dy, dx of each of the four taps
        merged = deform_conv2d(x, offsets.to(x.dtype), self.dconv.weight, self.dconv.bias, stride=2)
        return self.act(self.norm_layer(merged)).movedim(1, -1)


class LITv2(Layered):
    """See the module's head. windows: HiLo's window by stage, 0: no attention; heads: by stage, None: of 32 channels each."""

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dim: int = 96,
        windows: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        heads: Sequence[int] | None = None,
        mlp_ratio: float = 4,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        head = {"num_classes": num_classes, "drop_rate": drop_rate, "global_pool": global_pool}
        super().__init__(dim, len(depths), in_chans, **head)
        heads = [width // 32 for width in self.widths] if heads is None else heads
        for width, m, window, rates in zip(
            self.widths, heads, windows, drop_rates(drop_path_rate, depths), strict=True
        ):
            blocks = []
            for rate in rates:
                attn = HiLo(width, m, window=window, alpha=alpha) if window else None
                blocks.append(Block(width, attn, DepthwiseMlp(width, int(mlp_ratio * width)), drop_path=rate))
            self.add_layer(blocks, DeformableMerging)
        self.finish_init(num_classes)


register(
    __name__,
    LITv2,
    [
        Variant("litv2_small", "hilo", {}, 27_844_000, macs=3.7, top1=82.0),
        Variant("litv2_medium", "hilo", {"depths": (2, 2, 18, 2)}, 48_830_368, macs=7.5, top1=83.3),
        Variant("litv2_base", "hilo", {"depths": (2, 2, 18, 2), "dim": 128}, 86_520_704, macs=13.2, top1=83.6),
        Variant(
            "litv2_base_384", "hilo", {"depths": (2, 2, 18, 2), "dim": 128}, 86_520_704, macs=39.7, top1=84.7, size=384
        ),
    ],
    first_conv="patch_embed.proj",
)

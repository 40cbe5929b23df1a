"""The Swin skeleton: timm's shifted-window blocks, the first `mixed` of each stage replaced by a global attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, drop_rates, mlp

COMPUTED = ("attn.relative_position_index", "attn_mask")  # buffers of official checkpoints


class Swin(Backbone):
    """patch_embed, layers.S.{blocks, downsample}, LN, mean, head.

    mixed: how many blocks of each stage, from its first, have the family's attention over the whole map. The others attend
    in windows of img_size / 32, 7 at least, every second one shifted, and never larger than the map they were built for.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dim: int = 96,
        heads: int = 3,
        mixed: Sequence[int] = (2, 2, 6, 2),
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        widths = [dim * 2**i for i in range(4)]
        super().__init__(widths, (4, 8, 16, 32), num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)
        self.patch_embed = PatchEmbed(
            None, 4, in_chans, dim, nn.LayerNorm, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
        )
        self.layers = nn.ModuleList()
        for i, (width, rates) in enumerate(zip(widths, drop_rates(drop_path_rate, depths), strict=True)):
            side, window, m = img_size // (4 * 2**i), max(7, img_size // 32), heads * 2**i
            blocks = []
            for j, rate in enumerate(rates):
                if j < mixed[i]:
                    blocks.append(Block(width, self.attention(width, m, i, side), mlp(width, 4), drop_path=rate))
                    continue
                rule = {"window_size": window, "shift_size": j % 2 * (window // 2), "dynamic_mask": True}
                blocks.append(SwinTransformerBlock(width, (side, side), m, drop_path=rate, **rule))
            parts = {"blocks": nn.Sequential(*blocks)}
            if i < 3:
                parts["downsample"] = PatchMerging(width, 2 * width)
            self.layers.append(nn.ModuleDict(parts))
        self.norm = nn.LayerNorm(widths[-1])
        self.finish_init(num_classes)

    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        """The family's attention, (B, H, W, C) -> same; side: of the map at the size built for."""
        raise NotImplementedError

    def renamed(self, key: str) -> str | None:
        return None if key.endswith(COMPUTED) else key

    def walk(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer["blocks"](x)
            yield x
            if "downsample" in layer:
                x = layer["downsample"](x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)

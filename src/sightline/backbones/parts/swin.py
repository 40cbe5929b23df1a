"""The Swin skeleton: timm's shifted-window blocks, the first `mixed` of each stage replaced by a global attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, drop_rates, mlp

COMPUTED = ("attn.relative_position_index", "attn_mask")  # buffers of official checkpoints


class Layered(Backbone):
    """patch_embed (4 x 4 conv, LN), layers.S.{blocks, downsample}, norm (LN), mean, head: Swin's names."""

    def __init__(self, dim: int, stages: int, in_chans: int, **head: Any) -> None:
        self.widths = [dim * 2**i for i in range(stages)]
        super().__init__(self.widths, [4 * 2**i for i in range(stages)], **head)
        self.patch_embed = PatchEmbed(
            None, 4, in_chans, dim, nn.LayerNorm, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
        )
        self.layers = nn.ModuleList()
        self.norm = nn.LayerNorm(self.widths[-1])

    def add_layer(self, blocks: Iterable[nn.Module], downsample: Callable[[int], nn.Module]) -> None:
        """The next stage: its blocks and, unless it is the last, what halves its map and doubles its channels."""
        width, parts = self.widths[len(self.layers)], {"blocks": nn.Sequential(*blocks)}
        if width != self.widths[-1]:
            parts["downsample"] = downsample(width)
        self.layers.append(nn.ModuleDict(parts))

    def walk(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer["blocks"](x)
            yield x
            if "downsample" in layer:
                x = layer["downsample"](x)


class Swin(Layered):
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
        head = {"num_classes": num_classes, "drop_rate": drop_rate, "global_pool": global_pool}
        super().__init__(dim, 4, in_chans, **head)
        for i, (width, rates) in enumerate(zip(self.widths, drop_rates(drop_path_rate, depths), strict=True)):
            side, window, m = img_size // (4 * 2**i), max(7, img_size // 32), heads * 2**i
            blocks = []
            for j, rate in enumerate(rates):
                if j < mixed[i]:
                    blocks.append(Block(width, self.attention(width, m, i, side), mlp(width, 4), drop_path=rate))
                    continue
                rule = {"window_size": window, "shift_size": j % 2 * (window // 2), "dynamic_mask": True}
                blocks.append(SwinTransformerBlock(width, (side, side), m, drop_path=rate, **rule))
            self.add_layer(blocks, lambda width: PatchMerging(width, 2 * width))
        self.finish_init(num_classes)

    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        """The family's attention, (B, H, W, C) -> same; side: of the map at the size built for."""
        raise NotImplementedError

    def renamed(self, key: str) -> str | None:
        return None if key.endswith(COMPUTED) else key

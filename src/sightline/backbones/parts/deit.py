"""The DeiT skeleton: one resolution, a CLS token first, learned positions; families say which attention a block has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from timm.layers import Attention, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, drop_rates, mlp
from sightline.backbones.parts.positions import at_size

NORM = partial(nn.LayerNorm, eps=1e-6)
State = tuple[Tensor, Tensor]  # map (B, H, W, C) and CLS (B, 1, C)


class PlainAttention(Attention):
    """Softmax attention over CLS and map."""

    def forward(self, x: Tensor, cls: Tensor) -> State:
        out = super().forward(torch.cat([cls, x.flatten(1, 2)], 1))
        return out[:, 1:].unflatten(1, x.shape[1:3]), out[:, :1]


class TokenBlock(Block):
    """A block whose attention takes and gives the pair (map, CLS)."""

    def forward(self, state: State) -> State:
        mixed = self.attn(*(self.norm1(x) for x in state))
        state = tuple(x + self.drop_path(y) for x, y in zip(state, mixed, strict=True))
        return tuple(x + self.drop_path(self.mlp(self.norm2(x))) for x in state)


class DeiT(Backbone):
    """patch_embed, CLS and positions, `depth` blocks, LN, head on CLS. Sides that the patch does not divide are padded."""

    output_fmt = "NLC"
    pools = ("token", "avg", "")

    def __init__(
        self,
        dim: int = 192,
        heads: int = 3,
        depth: int = 12,
        patch: int = 16,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
    ) -> None:
        super().__init__(
            [dim] * depth, [patch] * depth, num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool
        )
        self.side = img_size // patch
        self.patch_embed = PatchEmbed(
            None, patch, in_chans, dim, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
        )
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + self.side**2, dim), std=0.02))
        rates = drop_rates(drop_path_rate, (depth,))[0]
        blocks = (TokenBlock(dim, self.attention(dim, heads, i), mlp(dim, 4), NORM, r) for i, r in enumerate(rates))
        self.blocks = nn.Sequential(*blocks)
        self.norm = NORM(dim)
        self.finish_init(num_classes)

    def attention(self, dim: int, heads: int, block: int) -> nn.Module:
        """The attention of a block: (map, CLS) -> (map, CLS)."""
        return PlainAttention(dim, heads, qkv_bias=True)

    def walk(self, x: Tensor) -> Iterator[State]:
        x = self.patch_embed(x)
        places = at_size(self.pos_embed[:, 1:], (self.side, self.side), tuple(x.shape[1:3]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        state = x + places, cls
        for block in self.blocks:
            state = block(state)
            yield state

    def map_of(self, state: State) -> Tensor:
        return state[0]

    def finish(self, state: State) -> Tensor:
        """(B, 1 + N, C), CLS first."""
        return self.norm(torch.cat([state[1], state[0].flatten(1, 2)], 1))

    def pooled(self, x: Tensor) -> Tensor:
        return {"token": lambda: x[:, 0], "avg": lambda: x[:, 1:].mean(1), "": lambda: x}[self.global_pool]()

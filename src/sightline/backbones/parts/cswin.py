"""The CSwin skeleton: cross-shaped stripes, and in the first stages a global attention instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, drop_rates, mlp
from sightline.mix.biformer import from_regions, to_regions
from sightline.mix.parts.base import split_heads
from sightline.mix.parts.groups import sdpa
from sightline.mix.parts.local import convolved, depthwise


class Stripes(nn.Module):
    """Attention inside stripes of the map, (B, H, W, C) -> same: half of the heads in columns, half in rows.

    split: width of a stripe; where it does not divide the map, the widest below it that does. branches = 1: the whole map.
    A depthwise 3 x 3 convolution of the values, inside each stripe, is added.
    """

    def __init__(self, dim: int, heads: int, split: int, branches: int) -> None:
        super().__init__()
        self.heads, self.split, self.branches = heads // branches, split, branches
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.get_v = nn.ModuleList(depthwise(dim // branches, 3) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        sizes = [(height, _divisor(width, self.split)), (_divisor(height, self.split), width)]
        sizes = sizes if self.branches == 2 else [(height, width)]
        qkv = self.qkv(x).unflatten(-1, (3, self.branches, -1)).unbind(-2)  # per branch (B, H, W, 3, C / branches)
        parts = zip(qkv, self.get_v, sizes, strict=True)
        return self.proj(torch.cat([self._inside(part.flatten(-2), conv, size) for part, conv, size in parts], -1))

    def _inside(self, qkv: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
        grid = tuple(qkv.shape[1:3])
        stripes = to_regions(qkv, size)  # (B, R, h w, 3C)
        q, k, v = (t.transpose(1, 2) for t in split_heads(stripes.flatten(0, 1), 3, self.heads))
        out = sdpa(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(-2)  # (B R, h w, C)
        values = v.transpose(1, 2).flatten(-2).unflatten(1, size)
        out = out + convolved(conv, values).flatten(1, 2)
        return from_regions(out.unflatten(0, stripes.shape[:2]), size, grid)


def _divisor(side: int, most: int) -> int:
    """The largest divisor of `side` that is at most `most`."""
    return next(n for n in range(min(side, most), 0, -1) if side % n == 0)


class CSwin(Backbone):
    """stage1_conv_embed, stageN, mergeN, LN, mean, head. mixed: stages, from the first, with the family's attention."""

    block: type[Block] = Block  # of the family's attention
    inner = "dwc"  # our name, in that attention, of the convolution that checkpoints call attns.0.get_v

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 18, 1),
        dim: int = 64,
        heads: int = 2,
        mixed: int = 2,
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
        self.mixed = mixed
        self.stage1_conv_embed = nn.ModuleDict(
            {"0": nn.Conv2d(in_chans, dim, 7, stride=4, padding=2), "2": nn.LayerNorm(dim)}
        )
        splits = (1, 2, img_size // 32, img_size // 32)
        for i, (width, rates) in enumerate(zip(widths, drop_rates(drop_path_rate, depths), strict=True)):
            if i:
                conv = nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1)
                setattr(self, f"merge{i}", nn.ModuleDict({"conv": conv, "norm": nn.LayerNorm(width)}))
            side, m = img_size // (4 * 2**i), heads * 2**i
            if i < mixed:
                make, kind = partial(self.attention, width, m, i, side), self.block
            else:
                make, kind = partial(Stripes, width, m, splits[i], 1 if i == 3 else 2), Block
            blocks = (kind(width, make(), mlp(width, 4), drop_path=rate) for rate in rates)
            setattr(self, f"stage{i + 1}", nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(widths[-1])
        self.finish_init(num_classes)

    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        """The family's attention, (B, H, W, C) -> same; side: of the map at the size built for."""
        raise NotImplementedError

    def renamed(self, key: str) -> str:
        match = re.fullmatch(r"(stage(\d)\.\d+)\.(qkv|proj|attns\.(\d))\.(.+)", key)
        if match is None:
            return key
        block, stage, what, branch, rest = match.groups()
        if branch is None:
            return f"{block}.attn.{what}.{rest}"
        if int(stage) > self.mixed:
            return f"{block}.attn.get_v.{branch}.{rest.removeprefix('get_v.')}"
        return f"{block}.attn.{rest.replace('get_v', self.inner)}"

    def walk(self, x: Tensor) -> Iterator[Tensor]:
        conv, norm = self.stage1_conv_embed["0"], self.stage1_conv_embed["2"]
        for i in range(4):
            if i:
                conv, norm = (getattr(self, f"merge{i}")[name] for name in ("conv", "norm"))
            x = getattr(self, f"stage{i + 1}")(norm(conv(x).movedim(1, -1)))
            yield x
            x = x.movedim(-1, 1)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)

"""Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet).

CVPR 2021, arXiv 2103.12731. Official code: not released; follows timm's halo_attn.py (Apache-2.0), whose weights exist.

The map is cut into b x b blocks of queries; a block attends to its window of (b + 2h) x (b + 2h), itself and a halo.

    q  = conv1x1(x)   stride t              k | v = conv1x1(x) per head            q, k (B, H, W, m, Dqk), v (..., Dv)
    A  = softmax(Dqk^-0.5 q k^T + q (R_h[row_j - row_i + win - 1] + R_w[col_j - col_i + win - 1]))     win = b + 2h
    out = A v                                                                      R_h, R_w (2 win - 1, Dqk), all heads

Rows and columns count from the block's and the window's own corner; with strided queries i counts strided queries (as timm).
Beyond the border k = v = 0 and, as in timm, these keys take part in the softmax; `mask_padding=True` leaves them out.
stride 2 with `avg_down`, or an odd block: unstrided queries, then 2 x 2 average pooling. Differences from timm: H and W need
not be multiples of b (zero keys beyond, cropped), channels are last.

Cost: 2 N win^2 (Dqk + Dv) m operations; keys and values are copied (win / b)^2 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import ParameterError
from sightline.mix.parts.base import Cost, Mixer, check_division, check_grid, flat_index
from sightline.mix.parts.groups import at_once, blocks, gather, product_mask, sdpa, ungroup
from sightline.mix.parts.local import convolved


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    *,
    block: int,
    halo: int,
    stride: int = 1,
    scale: float | None = None,
    scale_rel: bool = False,
    mask_padding: bool = False,
) -> Tensor:
    """Blocks of queries on their haloed windows.

    Args:
        q: (B, ceil(H / stride), ceil(W / stride), m, D). k: (B, H, W, m, D). v: (B, H, W, m, Dv).
        height_rel, width_rel: (2 (block + 2 halo) - 1, D). block: in positions of k; a multiple of stride.
        scale: default D^-0.5; of the relative term too with `scale_rel`. mask_padding: no attention beyond the border.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), m, Dv).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    small = block // stride  # queries of a block per axis
    queries = [blocks(n, small, q.device) for n in q.shape[1:3]]
    tables, _ = zip(*queries, strict=True)
    keys, masks = zip(*(_windows(n, block, halo, q.device) for n in k.shape[1:3]), strict=True)
    k, v = (_padded(x, block, halo) for x in (k, v))
    row = k.shape[0] * k.shape[-2] * prod(keys[1].shape) * keys[0].shape[1]  # keys of a row of blocks, over all heads
    step = max(1, at_once(q, k, v, height_rel) // (row * max(k.shape[-1], v.shape[-1], small**2)))
    rule = {"small": small, "scale": scale, "scale_rel": scale_rel, "mask_padding": mask_padding}
    outs = []
    for rows in range(0, keys[0].shape[0], step):
        part = slice(rows, rows + step)
        of_q, of_k, seen = ((axis[0][part], axis[1]) for axis in (tables, keys, masks))
        outs.append(_attend(q, k, v, height_rel, width_rel, of_q, of_k, seen, **rule))
    out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    return out[:, : q.shape[1], : q.shape[2]]


def _attend(q, k, v, height_rel, width_rel, tables, keys, masks, *, small, scale, scale_rel, mask_padding) -> Tensor:
    """Some rows of blocks, by their positions: (B, rows, columns, m, Dv)."""
    grouped = gather(q, tables)  # (G, B m, b b, D)
    win = keys[0].shape[1]
    bias = _relative(grouped, height_rel, width_rel, small, win) * (scale if scale_rel else 1)
    if mask_padding:
        sizes = [(t.shape[0], 1, t.shape[1]) for t in keys]
        bias = bias.masked_fill(~product_mask(masks, sizes)[:, None], -torch.inf)
    return ungroup(sdpa(grouped, gather(k, keys), gather(v, keys), scale, bias), q.shape[0], tables)


def _windows(length: int, block: int, halo: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys (G, win) of every block in padded positions, and (G, 1, win) whether they lie on the map."""
    count, win = -(-length // block), block + 2 * halo
    keys = torch.arange(count, device=device)[:, None] * block + torch.arange(win, device=device)
    return keys, ((keys >= halo) & (keys < length + halo))[:, None]


def _padded(x: Tensor, block: int, halo: int) -> Tensor:
    """Zeros around (B, H, W, m, D): the halo, and up to a multiple of the block right and below."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, 0, halo, halo + -width % block, halo, halo + -height % block))


def _relative(q: Tensor, height_rel: Tensor, width_rel: Tensor, small: int, win: int) -> Tensor:
    """q (G, B m, b b, D) -> the relative term (G, B m, b b, win win)."""
    at = torch.arange(win, device=q.device) - torch.arange(small, device=q.device)[:, None] + win - 1  # (b, win)
    q = q.unflatten(2, (small, small))
    rows = torch.einsum("gnrcd,rjd->gnrcj", q, height_rel[at].to(q.dtype))
    columns = torch.einsum("gnrcd,cjd->gnrcj", q, width_rel[at].to(q.dtype))
    return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def naive_halo_attention(
    q, k, v, height_rel, width_rel, *, block, halo, stride=1, scale=None, scale_rel=False, mask_padding=False
) -> Tensor:
    """`halo_attention` from the scores of all queries and all padded keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    win, small, grid = block + 2 * halo, block // stride, k.shape[1:3]
    k, v = (_padded(x, block, halo) for x in (k, v))
    query, key = (torch.cartesian_prod(*(torch.arange(n) for n in t.shape[1:3])) for t in (q, k))  # (N, 2), (M, 2)
    offset = key - (query // small * block)[:, None]  # (N, M, 2) place of the key in the query's window
    seen = ((offset >= 0) & (offset < win)).all(-1)
    if mask_padding:
        seen = seen & ((key >= halo) & (key < torch.tensor(grid) + halo)).all(-1)
    at = (offset - (query % small)[:, None] + win - 1).clamp(0, 2 * win - 2)
    flat, keys, values = (x.flatten(1, 2) for x in (q, k, v))
    relative = torch.einsum("bnhd,nmd->bhnm", flat, height_rel[at[..., 0]] + width_rel[at[..., 1]])
    scores = torch.einsum("bnhd,bmhd->bhnm", flat, keys) * scale + relative * (scale if scale_rel else 1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, values).unflatten(1, q.shape[1:3])


class _Positions(nn.Module):
    def __init__(self, win: int, dim: int) -> None:
        super().__init__()
        self.height_rel, self.width_rel = (nn.Parameter(torch.empty(2 * win - 1, dim)) for _ in range(2))
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=dim**-0.5)


@system(
    "halonet",
    kind="mix",
    paper=Paper(
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        authors="Vaswani, Ashish and Ramachandran, Prajit and Srinivas, Aravind and Parmar, Niki and Hechtman, Blake "
        "and Shlens, Jonathon",
        venue="CVPR",
        year=2021,
        arxiv="2103.12731",
    ),
    summary="blocks of queries attend to their window and a halo around it",
    needs=(),
    published=(("HaloNet-H7 ImageNet-1K top-1 (paper)", "84.9"),),
)
@dataclass(eq=False, repr=False)
class Halo(Mixer):
    """Haloed block attention: (B, H, W, C) -> (B, H / stride, W / stride, dim_out)."""

    block: int = param(8, "side b of a block of queries", low=1)
    halo: int = param(3, "halo h around a block", low=0)
    dim_out: int | None = param(None, "channels out; none: as in", low=1)
    qk_dim: int | None = param(None, "channels of a head of q and k; none: dim_out * qk_ratio / heads", low=1)
    qk_ratio: float = param(1.0, "channels of q and k over those of v", low=0.01)
    stride: int = param(1, "1 or 2: downsampling of the queries", low=1, high=2)
    avg_down: bool = param(False, "downsample by average pooling instead of strided queries")
    qkv_bias: bool = param(False, "bias of the projections")
    scale_rel: bool = param(False, "scale the relative term too")
    mask_padding: bool = param(False, "no attention beyond the border (timm's weights have it)")

    def check(self) -> None:
        check_division(self, "dim_out", self.channels, "heads", self.heads)

    @property
    def channels(self) -> int:
        return self.dim if self.dim_out is None else self.dim_out

    def build(self) -> None:
        wide = max(
            8, int(self.channels * self.qk_ratio + 4) // 8 * 8
        )  # a multiple of 8, not 10 % below, as timm has it
        wide += 8 * (wide < 0.9 * self.channels * self.qk_ratio)
        self.qk = self.qk_dim or wide // self.heads
        if self.qk < 1:
            raise ParameterError(f"Halo: {wide} channels of q and k are too few for heads={self.heads}")
        self.pooled = self.stride > 1 and (self.avg_down or self.block % self.stride != 0)
        self.step = 1 if self.pooled else self.stride
        self.q = nn.Conv2d(self.dim, self.heads * self.qk, 1, stride=self.step, bias=self.qkv_bias)
        self.kv = nn.Conv2d(self.dim, self.heads * self.qk + self.channels, 1, bias=self.qkv_bias)
        self.pos_embed = _Positions(self.block + 2 * self.halo, self.qk)

    def forward(self, x: Tensor) -> Tensor:
        check_grid(self, x, axes=(2,))
        q, k, v = self._project(x)
        tables = self.pos_embed.height_rel, self.pos_embed.width_rel
        out = halo_attention(q, k, v, *tables, scale_rel=self.scale_rel, **self._rule()).flatten(-2)
        return F.avg_pool2d(out.movedim(-1, 1), 2).movedim(1, -1) if self.pooled else out

    def _rule(self) -> dict:
        return {"block": self.block, "halo": self.halo, "stride": self.step, "mask_padding": self.mask_padding}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = convolved(self.q, x).unflatten(-1, (self.heads, self.qk))
        k, v = convolved(self.kv, x).unflatten(-1, (self.heads, -1)).split([self.qk, self.channels // self.heads], -1)
        return q, k, v

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The row of one query (B, m, *grid of the keys); below 1 in sum where the window leaves the map."""
        grid = check_grid(self, x, axes=(2,))
        q, k, _ = self._project(x)
        at = flat_index(index, q.shape[1:3])
        marks = torch.eye(prod(grid), device=x.device, dtype=k.dtype).view(1, *grid, 1, -1)  # values that name the keys
        marks = marks.expand(x.shape[0], -1, -1, self.heads, -1)
        tables = self.pos_embed.height_rel, self.pos_embed.width_rel
        out = halo_attention(q, k, marks, *tables, scale_rel=self.scale_rel, **self._rule())
        return out.flatten(1, 2)[:, at].unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n, win = prod(grid), self.block + 2 * self.halo
        wide = self.heads * self.qk
        mixing = 2 * n // self.step**2 * win**2 * (wide + self.channels)
        projections = 2 * n * self.dim * (wide // self.step**2 + wide + self.channels)
        copies = n * win**2 // self.block**2 * (wide + self.channels)
        bias = self.heads * n // self.step**2 * win**2
        return self.priced(grid, mixing=mixing, held=copies + bias, projections=projections)

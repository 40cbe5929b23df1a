"""Sparse attention as dense attention in groups: query groups x key groups x validity -> gather, batched SDPA, scatter.

An `Axis` says, for one axis of the grid, which positions form each group of queries and which keys that group may see; a
pattern over several axes is the product of its axes. Every query is in exactly one group, so scattering is a gather:

    q (B, *X, H, D) -> (G, B H, S, D)    G groups of S queries
    k (B, *X, H, D) -> (G, B H, K, D)    K keys each
    SDPA under a mask (G, 1, S, K), or none where every pair is admissible

Operations 4 G S K H D, memory of the gathered keys and values 2 G K H D, in pieces of at most `at_once` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED = 1 << 20  # numbers gathered at once on a CPU without gradients: its cache holds them
SPARE = 1 << 25  # elsewhere (128 MB in fp32)


@dataclass(frozen=True)
class Axis:
    """Groups along one axis of length L. All tensors are int64 or bool on one device."""

    queries: Tensor  # (G, S) positions; a ragged group repeats one of its queries
    keys: Tensor  # (G, K) positions
    mask: Tensor | None  # (G, S, K) admissible pairs; None: all
    back: Tensor  # (L,) where position i stands in `queries`, flattened

    @property
    def sizes(self) -> tuple[int, int, int]:
        return *self.queries.shape, self.keys.shape[1]

    def part(self, start: int, stop: int) -> Axis:
        mask = None if self.mask is None else self.mask[start:stop]
        return Axis(self.queries[start:stop], self.keys[start:stop], mask, self.back)


def at_once(*tensors: Tensor) -> int:
    """Numbers that may be gathered at once from `tensors`; work is cut into pieces that stay below.

    Pieces that a CPU's cache holds keep time proportional to the number of tokens. With gradients the pieces are large:
    the gradient of every piece is as large as the tensor it was taken from.
    """
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return CACHED if tensors[0].device.type == "cpu" and not graph else SPARE


def gather(x: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """(B, X1, ..., H, D) by tables (G_i, S_i) per axis -> (G1...Gn, B H, S1...Sn, D)."""
    for i, table in enumerate(tables):
        x = x.index_select(i + 1, table.flatten())
    n = len(tables)
    shape = [size for table in tables for size in table.shape]
    x = x.reshape(x.shape[0], *shape, *x.shape[-2:])  # (B, G1, S1, ..., H, D)
    groups, members = range(1, 2 * n, 2), range(2, 2 * n + 1, 2)
    x = x.permute(*groups, 0, 2 * n + 1, *members, 2 * n + 2)
    return x.reshape(prod(shape[::2]), -1, prod(shape[1::2]), x.shape[-1])


def ungroup(y: Tensor, batch: int, tables: Sequence[Tensor]) -> Tensor:
    """(G, B H, S, D) -> (B, G1 S1, ..., Gn Sn, H, D), groups unrolled along each axis."""
    n = len(tables)
    y = y.reshape(*[t.shape[0] for t in tables], batch, -1, *[t.shape[1] for t in tables], y.shape[-1])
    order = [axis for i in range(n) for axis in (i, n + 2 + i)]
    y = y.permute(n, *order, n + 1, 2 * n + 2)
    return y.reshape(batch, *[t.numel() for t in tables], *y.shape[-2:])


def product_mask(masks: Sequence[Tensor | None], sizes: Sequence[tuple[int, int, int]]) -> Tensor | None:
    """Per-axis masks (G_i, S_i, K_i) or None -> (G, S, K); None when all pairs are admissible."""
    if all(m is None for m in masks):
        return None
    total = None
    for mask, (groups, queries, keys) in zip(masks, sizes, strict=True):
        if mask is None:
            device = next(m.device for m in masks if m is not None)
            mask = torch.ones(groups, queries, keys, dtype=torch.bool, device=device)
        if total is None:
            total = mask
            continue
        total = total[:, None, :, None, :, None] & mask[None, :, None, :, None, :]  # (G, G', S, S', K, K')
        total = total.flatten(0, 1).flatten(1, 2).flatten(2, 3)
    return total


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, axes: Sequence[Axis], scale: float, *, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention under a product pattern.

    Args:
        q: (B, *X, H, D). k: (B, *Y, H, D), v: (B, *Y, H, Dv); Y is X, or X padded when key positions say so.
        axes: one per axis. scale: factor of the scores. lse: return log-sum-exp too (explicit softmax, slower).

    Returns:
        Output (B, *X, H, Dv), and log-sum-exp (B, *X, H) fp32 (natural logarithm) or None.
    """
    outs, lses = [], []
    first = axes[0]
    per_group = k.shape[0] * k.shape[-2] * (k.shape[-1] + v.shape[-1])
    per_group *= first.keys.shape[1] * prod([a.keys.numel() for a in axes[1:]])
    step = max(1, at_once(q, k, v) // per_group)
    if step < first.queries.shape[0]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # torch would copy all of them for every piece
    for start in range(0, first.queries.shape[0], step):
        part = [first.part(start, start + step), *axes[1:]]
        out, total = _attend(q, k, v, part, scale, lse)
        outs.append(ungroup(out, q.shape[0], [a.queries for a in part]))
        lses.append(None if total is None else ungroup(total[..., None], q.shape[0], [a.queries for a in part]))
    out = _scatter(torch.cat(outs, 1) if len(outs) > 1 else outs[0], axes)
    return out, _scatter(torch.cat(lses, 1), axes).squeeze(-1) if lse else None


def _attend(q, k, v, axes: Sequence[Axis], scale: float, lse: bool) -> tuple[Tensor, Tensor | None]:
    q = gather(q, [a.queries for a in axes])  # (G, B H, S, D)
    k, v = (gather(x, [a.keys for a in axes]) for x in (k, v))  # (G, B H, K, D)
    mask = product_mask([a.mask for a in axes], [a.sizes for a in axes])
    mask = None if mask is None else mask[:, None]  # (G, 1, S, K)
    return attend_with_lse(q, k, v, scale, mask) if lse else (sdpa(q, k, v, scale, mask), None)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (..., S, D) on (..., K, D); a float mask is added to the scores.

    Values of another width than queries and keys are padded with zeros to a common one: torch would build the whole map.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    width = v.shape[-1]
    if q.shape[-1] != width:
        common = -(-max(q.shape[-1], width) // 8) * 8
        q, k, v = (F.pad(x, (0, common - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :width]


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sdpa` with the log-sum-exp (..., S) of the scores, fp32 (fp64 for fp64)."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if mask is None:
        total = scores.logsumexp(-1)
        return (scores - total[..., None]).exp().to(v.dtype) @ v, total
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite, so that gradients are
    total = scores.logsumexp(-1)
    weights = (scores - total[..., None]).exp().masked_fill(~mask, 0.0)  # a query without keys: zeros, not NaN
    return weights.to(v.dtype) @ v, total.masked_fill(~mask.any(-1), -torch.inf)


def _scatter(y: Tensor, axes: Sequence[Axis]) -> Tensor:
    """(B, G1 S1, ..., H, D) -> (B, *X, H, D)."""
    for i, axis in enumerate(axes):
        y = y.index_select(i + 1, axis.back)
    return y


def blocks(length: int, size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Consecutive groups of `size` positions: (queries (G, S), back (L,)); a ragged last group repeats its last position."""
    count = -(-length // size)
    queries = torch.arange(count * size, device=device).clamp(max=length - 1).view(count, size)
    return queries, torch.arange(length, device=device)

"""The selector: scores and a budget -> which tokens stay. One of each, for every reducer and token router.

All functions take scores (..., N), larger is better, and return a mask (..., N) bool; masks are joined with & and |, and
`columns` turns one into sorted indices. Rules that hold everywhere:

- equal scores: the lower index wins (stable), so the same input always gives the same set;
- `valid` (..., N) bool leaves out positions that are no candidates (padding, separators, text): never chosen;
- `protect` (..., N) bool: always chosen; they count towards the budget, and exceed it when there are more of them;
- NaN is worse than every number; leading dimensions (rows, heads) are independent of each other;
- nothing asks the device for a number, except `columns` without a width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sightline.errors import InputError, ParameterError


@dataclass(frozen=True)
class Keep:
    """A cut: which positions of the running block go on, as a station of a system returns it. The others are dropped."""

    mask: Tensor  # (B, Q) bool; padding and text may be left out too, but rarely should
    positions: Literal["renumber", "keep"] = "renumber"  # count the kept ones without gaps, or leave their positions
    states: Tensor | None = None  # (B, Q, D) what stands at the positions from now on; None: what stood there


def fraction(count: int, ratio: float, *, least: int = 1) -> int:
    """floor(ratio * count), at least `least` and at most `count`: a ratio as a budget."""
    if not 0 <= ratio <= 1:
        raise ParameterError(f"ratio={ratio!r} is out of range: choose ratio in [0, 1]")
    return min(count, max(least, int(count * ratio)))


def ordered(scores: Tensor, *, valid: Tensor | None = None, protect: Tensor | None = None) -> Tensor:
    """(..., N) int64: tokens from best to worst; protected ones before all others, invalid ones behind them."""
    scores = scores.detach()
    scores = scores.masked_fill(scores.isnan(), -math.inf) if scores.is_floating_point() else scores
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if valid is None and protect is None:
        return order
    last = torch.zeros_like(scores, dtype=torch.int8)
    last = last if protect is None else last.masked_fill(protect, -1)
    last = last if valid is None else last.masked_fill(~valid, 1)
    return order.gather(-1, last.gather(-1, order).argsort(dim=-1, stable=True))


def best(scores: Tensor, count: int | Tensor, *, valid: Tensor | None = None, protect: Tensor | None = None) -> Tensor:
    """The `count` best tokens.

    Args:
        scores: (..., N).
        count: one number for all rows, or (...) one per row; more than there are candidates keeps them all.
    """
    if not isinstance(count, Tensor) and count < 0:
        raise ParameterError(f"count={count!r}: 0 or more tokens can be kept")
    limit = count[..., None] if isinstance(count, Tensor) else count
    order = ordered(scores, valid=valid, protect=protect)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return _bounded(_placed(order, places < limit), valid, protect)


def above(
    scores: Tensor,
    threshold: float | Tensor,
    *,
    strict: bool = False,
    valid: Tensor | None = None,
    protect: Tensor | None = None,
) -> Tensor:
    """Tokens whose score is at least `threshold` (more than it when `strict`); a tensor (..., 1) gives one per row."""
    return _bounded(scores > threshold if strict else scores >= threshold, valid, protect)


def mass(
    scores: Tensor, share: float | Tensor, *, valid: Tensor | None = None, protect: Tensor | None = None
) -> Tensor:
    """The fewest best tokens that hold at least `share` of the sum of all (non-negative) scores; at least one.

    `protect`ed tokens are taken first, so that their share counts. share >= 1 keeps every valid token.
    """
    order = ordered(scores, valid=valid, protect=protect)
    plain = scores.float().nan_to_num(0.0, 0.0, 0.0)
    plain = plain if valid is None else plain.masked_fill(~valid, 0.0)
    held = plain.gather(-1, order).cumsum(-1)
    before = held - plain.gather(-1, order)  # what better tokens hold already
    share = torch.as_tensor(share, device=scores.device, dtype=held.dtype)
    wanted = torch.where(share >= 1, torch.inf, share * held[..., -1:])
    first = torch.arange(scores.shape[-1], device=scores.device) == 0
    return _bounded(_placed(order, (before < wanted) | first), valid, protect)


def split(total: int | Tensor, weights: Tensor, *, caps: int | Tensor | None = None) -> Tensor:
    """A budget shared over P partitions in proportion to their weights: floor(w_p / sum(w) * total), then the cap.

    Args:
        total: budget of all partitions, one number or (...).
        weights: (..., P), not negative; all zero counts as all equal.
        caps: most tokens of a partition, one number or (..., P).

    Returns:
        (..., P) int64; flooring and caps leave up to P - 1 tokens (and what was cut) unspent.
    """
    weights = weights.float()
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones_like(weights))
    total = total[..., None] if isinstance(total, Tensor) else total
    shares = (weights / weights.sum(-1, keepdim=True) * total).floor().long()
    return shares if caps is None else shares.minimum(torch.as_tensor(caps, device=shares.device))


def best_in_parts(scores: Tensor, part: Tensor, counts: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """The best tokens of every partition, each with its own budget.

    Args:
        scores: (..., N). part: (..., N) int, partition of every token; negative: a candidate of none.
        counts: (..., P) int, budgets.
    """
    outside = part < 0 if valid is None else (part < 0) | ~valid
    owner = part.long().masked_fill(outside, counts.shape[-1])  # (..., N) those outside in a last partition of budget 0
    by_score = ordered(scores)
    order = by_score.gather(-1, owner.gather(-1, by_score).argsort(dim=-1, stable=True))  # by partition, best first
    owners = owner.gather(-1, order)
    sizes = torch.zeros_like(torch.nn.functional.pad(counts, (0, 1))).long()
    sizes.scatter_add_(-1, owner, torch.ones_like(owner))
    begins = sizes.cumsum(-1) - sizes
    place = torch.arange(scores.shape[-1], device=scores.device) - begins.gather(-1, owners)
    limits = torch.nn.functional.pad(counts.long(), (0, 1)).gather(-1, owners)
    return _placed(order, place < limits)


def best_lines(scores: Tensor, grid: tuple[int, int], count: int | Tensor) -> Tensor:
    """Whole rows of a grid: the `count` rows with the largest sums.

    Args:
        scores: (..., h * w), row-major. grid: (h, w). count: rows to keep.
    """
    height, width = grid
    if height * width != scores.shape[-1]:
        raise InputError(f"{scores.shape[-1]} scores do not fill a grid of {height} x {width}")
    lines = scores.unflatten(-1, (height, width)).sum(-1)  # (..., h)
    return best(lines, count)[..., None].expand(*lines.shape, width).flatten(-2)


def columns(mask: Tensor, *, pad: Literal["left", "right"] = "left", width: int | None = None) -> Tensor:
    """Sorted indices of the chosen columns, row by row.

    Args:
        mask: (B, N) bool.
        pad: where rows with fewer are filled with -1. "left" keeps the last chosen column last in every row.
        width: columns of the result, at least the largest number chosen; None: exactly that (asks the device).

    Returns:
        (B, M) int64, increasing in every row where it is not -1.
    """
    counts = mask.sum(-1)  # (B,)
    width = int(counts.max()) if width is None else width
    keys = mask.to(torch.int8) if pad == "left" else (~mask).to(torch.int8)
    order = keys.argsort(dim=-1, stable=True)  # left: dropped ones first; right: kept ones first; both in their order
    order = order[..., -width:] if pad == "left" and width else order[..., :width]
    place = torch.arange(width, device=mask.device)
    real = place >= width - counts[:, None] if pad == "left" else place < counts[:, None]
    return order.masked_fill(~real, -1)


def take(x: Tensor, index: Tensor, *, fill: float = 0.0, dim: int = 1, filled: bool = True) -> Tensor:
    """Entries `index` (B, M) of `x` along `dim` (x's batch is dimension 0), `fill` where the index is -1.

    filled: whether there may be a -1; False saves the filling.
    """
    if dim == 2 and x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        found = take(x.transpose(1, 2), index, fill=fill, filled=filled)
        return found.transpose(1, 2)  # heads behind tokens, as projections leave them
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    if x.is_contiguous() and x.shape[dim + 1 :].numel() > 1:
        found = _runs(x, index, dim)
    else:
        wide = index.clamp(min=0).reshape(shape).expand(*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :])
        found = x.gather(dim, wide)
    return found.masked_fill((index < 0).reshape(shape), fill) if filled else found


def _runs(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`take` without the filling, by copying what lies behind `dim` in one piece: many times faster than `gather`."""
    before, count = x.shape[1:dim].numel(), x.shape[dim]  # e.g. heads, tokens
    start = torch.arange(x.shape[0] * before, device=index.device).view(-1, before, 1) * count
    place = (start + index.clamp(min=0)[:, None]).flatten()
    found = x.reshape(-1, *x.shape[dim + 1 :]).index_select(0, place)
    return found.view(*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :])


def merge(x: Tensor, target: Tensor, count: int, *, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that share a target: merging instead of dropping.

    Args:
        x: (B, N, C). target: (B, N) int in [0, count), or -1 to leave a token out. count: M, tokens afterwards.
        sizes: (B, N) how many original tokens each stands for; None: one each.

    Returns:
        (B, M, C) means weighted by size (0 for a target without tokens), (B, M) fp32 sizes. sum(size * token) is kept.
    """
    weight = torch.ones_like(target, dtype=torch.float32) if sizes is None else sizes.float()
    weight = weight.masked_fill(target < 0, 0.0)
    place = target.clamp(min=0).long()
    total = weight.new_zeros(target.shape[0], count).scatter_add(1, place, weight)
    summed = weight.new_zeros(x.shape[0], count, x.shape[2])
    summed = summed.scatter_add(1, place[..., None].expand_as(x), x.float() * weight[..., None])
    return (summed / total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).to(x.dtype), total


def entropy(scores: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """(...) entropy in nats of non-negative scores as a distribution over N; 0 log 0 is 0. Adaptive budgets use it."""
    scores = scores.float() if valid is None else scores.float().masked_fill(~valid, 0.0)
    share = scores / scores.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def _placed(order: Tensor, chosen: Tensor) -> Tensor:
    """A mask given in sorted order, put back into the tokens' own order."""
    return torch.empty_like(chosen).scatter_(-1, order, chosen)


def _bounded(chosen: Tensor, valid: Tensor | None, protect: Tensor | None) -> Tensor:
    chosen = chosen if protect is None else chosen | protect
    return chosen if valid is None else chosen & valid

"""What the decoder layers from some depth on have seen, once tokens were cut inside the language model.

transformers builds masks and rotary angles once per forward, for the whole sequence. Layers behind a cut run fewer
tokens, so theirs are taken from the host's: rows and columns of the mask, rows of the angles. `Depth` is the ledger of
such layers. Pure functions on tensors; no model here.

Columns of the whole sequence: N. Seen by a depth: M <= N. Of the running block: Q, of these run by the depth: m <= Q.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sightline.engine.select import columns, take
from sightline.engine.tokens import Role

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.tokens import Tokens


@dataclass(frozen=True)
class Depth:
    """The ledger of layers that see less than the whole sequence."""

    tokens: Tokens  # (B, M), grows with every block
    column: Tensor  # (B, M) of every token in the whole sequence, -1: filler
    filled: bool = False  # some rows are filled up to M with padding of ours
    block: Tensor | None = None  # (B, m) columns of the running block that run here, -1: filler; None: all Q
    shift: Tensor | None = None  # (B,) how far positions of new tokens are moved back; None: positions are the host's
    places: Tensor | None = None  # (A, B, m) positions of the running block on A axes, when they are not the host's

    def queries(self, whole: int) -> int:
        """Tokens of the running block that run here, of `whole` in the host's block."""
        return whole if self.block is None else self.block.shape[1]

    @classmethod
    def of(cls, whole: Tokens) -> Depth:
        """The depth of layers that see everything."""
        batch, width = whole.shape
        return cls(whole, torch.arange(width, device=whole.role.device).expand(batch, -1))

    def grown(self, whole: Tokens, count: int) -> Depth:
        """With the last `count` tokens of the whole sequence behind it, all of which will run here."""
        batch, width = whole.shape
        new = torch.arange(width - count, width, device=self.column.device).expand(batch, -1)
        tokens = self.tokens.append(whole.tail(count))
        return Depth(tokens, torch.cat([self.column, new], 1), self.filled, shift=self.shift)

    def cropped(self, count: int) -> Depth:
        """Without the last `count` columns (generated ones, that every depth has)."""
        width = self.tokens.shape[1] - count
        return replace(self, tokens=self.tokens.crop(width), column=self.column[:, :width], block=None, places=None)


@dataclass(frozen=True)
class Held:
    """Which columns of a depth's ledger a layer's cache still holds after tokens were taken out of it."""

    index: (
        Tensor  # (B, K) columns of the depth's ledger, -1: filler; of the first head, where heads hold different ones
    )
    upto: int  # later columns are all there
    filled: bool  # whether there is filler
    heads: Tensor | None = None  # (B, Hkv, K) columns that every key head holds; None: all the same

    def rows(self, order: Tensor) -> Held:
        """For a cache whose rows were put into another order."""
        return replace(self, index=self.index[order], heads=None if self.heads is None else self.heads[order])

    def columns(self, width: int) -> Tensor:
        """(B, K') the columns held now that the ledger has `width` of them, where only their number matters for a head."""
        return self._grown(self.index, width)

    def of_heads(self, width: int) -> Tensor:
        """The same, (B, Hkv, K') where heads hold different ones."""
        return self._grown(self.index if self.heads is None else self.heads, width)

    def _grown(self, index: Tensor, width: int) -> Tensor:
        new = torch.arange(self.upto, width, device=index.device).expand(*index.shape[:-1], -1)
        return torch.cat([index, new], -1)


def chosen(role: Tensor, keep: Tensor) -> tuple[Tensor, bool] | None:
    """The columns that go on, as (B, m) with -1 for filler, and whether there is filler; None when nothing is dropped.

    The last real column of every row always goes on: it predicts the next token.

    Args:
        role: (B, q) roles of the running block. keep: (B, q) bool.
    """
    real = role != int(Role.PAD)
    order = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, order, -1).amax(1, keepdim=True)
    keep = (keep | (order == last)) & real
    counts = keep.sum(1)
    most, least, dropped = torch.stack([counts.max(), counts.min(), (real & ~keep).sum()]).tolist()  # the one sync
    if dropped == 0:
        return None
    return columns(keep, width=most), most != least


def cut(depth: Depth, index: Tensor, filled: bool, queries: int, host: Tensor | None, renumber: bool) -> Depth:
    """The depth after a cut of its running block.

    Args:
        index: (B, m) which of its `queries` tokens of the running block go on, -1: filler.
        filled: whether there is filler.
        host: (A, B, Q) the host's positions of the running block; None: they are not known, and cannot be renumbered.
        renumber: close the gaps that dropped tokens leave in the positions.
    """
    start = depth.tokens.shape[1] - queries
    past = torch.arange(start, device=index.device).expand(index.shape[0], -1)
    stay = torch.cat([past, torch.where(index < 0, -1, index + start)], 1)  # (B, M')
    block = index if depth.block is None else take(depth.block, index, fill=-1)
    before = None if host is None else _positions(depth, host)
    places, shift = None, depth.shift
    if before is not None and (renumber or shift is not None):
        places = _pick(before, index)
    if renumber:
        real = depth.tokens.role[:, start:] != int(Role.PAD)
        places, closed = close_gaps(before, real, places, index >= 0)
        shift = closed if shift is None else shift + closed
    column = take(depth.column, stay, fill=-1)
    return Depth(depth.tokens.select(stay), column, depth.filled or filled, block, shift, places)


def close_gaps(before: Tensor, was: Tensor, after: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Positions without the values that only dropped tokens used.

    With one axis and no padding these are 0, 1, 2, ... again. With several (time, row, column) a value closes when no
    kept token has it on any axis, so that the rows and columns of a picture keep their order and their distances.

    Args:
        before: (A, B, q) positions of the block; was: (B, q) bool, which are not padding.
        after: (A, B, m) positions of those kept; real: (B, m) bool, which are not filler.

    Returns:
        (A, B, m) new positions, and (B,) how many values were closed.
    """
    low = torch.where(was, before, before.amax()).amin((0, 2))  # (B,)
    size = int((before.amax((0, 2)) - low).amax()) + 2  # the last one takes what is not real
    closed = _used(before, was, low, size) & ~_used(after, real, low, size)  # (B, size)
    gone = closed.long().cumsum(1)
    offset = (after - low[:, None]).clamp(0, size - 1).long()
    back = gone.expand(after.shape[0], -1, -1).gather(2, offset)
    return torch.where(real, after - back.to(after.dtype), after), gone[:, -1]


def mask_of(
    mask: Tensor | None,
    depth: Depth,
    held: Held | None,
    keys: int,
    whole: int,
    queries: int,
    additive: torch.dtype | None,
) -> Tensor | None:
    """The attention mask of layers at this depth, from the host's mask of the whole sequence.

    Args:
        mask: (B|1, 1, Q, K) of the host, its last column the last of the whole sequence; bool (True: attend) or additive;
            None: no padding, every query sees what came before it.
        keys: how many keys the layer's cache gives; the last ones, when a sliding window has let earlier ones go.
        whole: N, columns of the whole sequence so far.
        queries: m, queries at this depth.
        additive: the dtype of an additive mask where one must be made; None: bool.

    Returns:
        (B, 1, m, keys), or None where the kernel's own causal rule is right.
    """
    place = depth.column  # (B, M)
    here = place if held is None else take(place, held.columns(place.shape[1]), fill=-1)
    here = here[:, here.shape[1] - keys :]
    mine = place[:, place.shape[1] - queries :]  # (B, m)
    if mask is None:
        if not (depth.filled or (held is not None and held.filled)):
            return None
        found = (here[:, None] <= mine[:, :, None]) & (here[:, None] >= 0)
        found = _seeing_themselves(found[:, None], mine, True)
        return found if additive is None else _additive(found, additive)
    least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    column = here - (whole - mask.shape[-1])  # a window's mask begins later
    column = torch.where((here < 0) | (column < 0), -1, column)
    found = mask.expand(here.shape[0], -1, -1, -1)
    if depth.block is not None and found.shape[2] > 1:
        found = take(found, depth.block, fill=least, dim=2)
    found = take(found, column, fill=least, dim=3)
    return _seeing_themselves(found, mine, True if mask.dtype == torch.bool else 0.0)


def spread(weights: Tensor, index: Tensor | None, width: int) -> Tensor:
    """Weights (B, H, R, K) on the keys a cache still holds -> (B, H, R, width) on all columns of the ledger, 0 elsewhere.

    `index` (B, K') or (B, Hkv, K') says which columns are held, the last ones being the keys; None: all.
    """
    keys = weights.shape[-1]
    if index is None:
        return F.pad(weights, (width - keys, 0))
    index = index[..., index.shape[-1] - keys :]
    index = torch.where(index < 0, width, index)
    index = index[:, None] if index.dim() == 2 else index.repeat_interleave(weights.shape[1] // index.shape[1], 1)
    index = index[:, :, None].expand_as(weights)
    return weights.new_zeros(*weights.shape[:3], width + 1).scatter(3, index, weights)[..., :width]


def placed(value: Tensor, depth: Depth) -> Tensor:
    """Rows of the host's per-token tensor (..., B|1, Q, d) that run at this depth: (..., B, m, d)."""
    index = depth.block.clamp(min=0)[..., None].expand(-1, -1, value.shape[-1])  # (B, m, d)
    value = value.expand(*value.shape[:-3], index.shape[0], -1, -1)
    return value.gather(-2, index.expand(*value.shape[:-3], -1, -1, -1))


def places_of(depth: Depth, host: Tensor) -> Tensor | None:
    """(A, B, m) positions of the running block; None: the host's. host: (A, B, Q)."""
    if depth.places is not None:
        return depth.places
    return None if depth.shift is None else _positions(depth, host)


def _positions(depth: Depth, host: Tensor) -> Tensor:
    """(A, B, m) positions of the running block as this depth has them before anything more is cut."""
    if depth.places is not None:
        return depth.places
    moved = host if depth.shift is None else host - depth.shift[:, None]
    return moved if depth.block is None else _pick(moved, depth.block)


def _pick(positions: Tensor, index: Tensor) -> Tensor:
    """(A, B, q), (B, m) -> (A, B, m); anything where the index is -1."""
    return positions.gather(2, index.clamp(min=0).expand(positions.shape[0], -1, -1))


def _used(positions: Tensor, real: Tensor, low: Tensor, size: int) -> Tensor:
    """(B, size) bool: which values, counted from `low`, some real token has on some axis."""
    offset = torch.where(real, positions - low[:, None], size - 1).long()  # (A, B, q)
    found = torch.zeros(offset.shape[1], size, dtype=torch.bool, device=offset.device)
    found.scatter_(1, offset.transpose(0, 1).flatten(1), True)
    found[:, -1] = False
    return found


def _seeing_themselves(mask: Tensor, mine: Tensor, allowed: bool | float) -> Tensor:
    """Let filler queries see themselves, for kernels that answer a row without keys with NaN."""
    queries, keys = mask.shape[-2:]
    own = torch.arange(keys, device=mask.device) == torch.arange(keys - queries, keys, device=mask.device)[:, None]
    return mask.masked_fill((mine < 0)[:, None, :, None] & own, allowed)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

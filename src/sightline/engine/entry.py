"""A cut before the decoder: visual tokens that a system drops never enter the language model.

The decoder gets a shorter block: embeddings, mask, positions and whatever else has one entry per token. What it returns
is brought back to the block's length, a dropped position repeating the state of the kept one before it: labels, losses,
`logits_to_keep` and shapes stay as the caller knows them. Rows that keep fewer are padded on the left.

In later forwards the caller still counts the whole prompt: its mask and positions are replaced by those of the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sightline.engine.select import Keep, columns, take
from sightline.engine.tokens import Role
from sightline.errors import HostError

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.tokens import Tokens


@dataclass(frozen=True)
class Cut:
    """What a shortened sequence must remember."""

    offset: Tensor  # (..., B): position of a later token minus its place among the real tokens of its row
    padded: bool  # some row has padding
    source: Tensor | None = None  # (B, Q) where every position of the block now running is found in the shortened one

    def forget(self) -> Cut:
        """For a new block, of which nothing is cut yet."""
        return replace(self, source=None)

    def behind(self, earlier: Cut | None) -> Cut:
        """This cut after an earlier one of the same block."""
        if earlier is None or earlier.source is None:
            return self
        return replace(self, source=self.source.gather(1, earlier.source))


def shorten(
    given: dict[str, Any], keep: Keep, tokens: Tokens, window: int | None = None
) -> tuple[dict[str, Any], Tokens, Cut] | None:
    """The decoder's arguments after a cut, the new ledger, and what to remember; None when nothing is dropped.

    Args:
        given: keyword arguments of the decoder; `inputs_embeds` (B, Q, D) is among them.
        keep: which of the Q positions go on. Padding goes anyway.
        tokens: the ledger up to and including this block.
        window: width of the decoder's sliding windows, where its masks come ready-made.
    """
    embeds = given["inputs_embeds"]
    start = tokens.shape[1] - embeds.shape[1]
    real = tokens.role[:, start:] != int(Role.PAD)
    mask = keep.mask & real
    if not bool((mask != real).any()):
        return None
    index = columns(mask)  # (B, M)
    past = torch.arange(start, device=index.device).expand(len(index), -1)
    new = tokens.select(torch.cat([past, torch.where(index < 0, -1, index + start)], 1))
    alive = new.role != int(Role.PAD)
    padded = not bool(alive.all())
    found = {**given, **_per_token(given, index, embeds.shape[:2])}
    found["position_ids"] = _positions(given.get("position_ids"), keep, mask, real, index, start)
    found["attention_mask"] = _mask(given.get("attention_mask"), index, new, padded or keep.positions == "keep", window)
    if given.get("deepstack_visual_embeds") is not None:
        visual = mask[given["visual_pos_masks"]]
        found["deepstack_visual_embeds"] = [x[visual.to(x.device)] for x in given["deepstack_visual_embeds"]]
    here = alive[:, start:]
    last = found["position_ids"].masked_fill(~here, -1).amax(-1)  # (..., B)
    source = (mask.long().cumsum(1) - 1).clamp(min=0) + index.shape[1] - mask.sum(1, keepdim=True)
    return found, new, Cut(last + 1 - alive.sum(1), padded, source.clamp(max=index.shape[1] - 1))


def restore(states: Tensor, source: Tensor) -> Tensor:
    """(B, M, D) states of the shortened block -> (B, Q, D); a dropped position repeats the kept one before it."""
    return states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))


def later(given: dict[str, Any], tokens: Tokens, queries: int, cut: Cut) -> dict[str, Any]:
    """`attention_mask` and `position_ids` of a block behind a shortened prompt, as the shortened sequence counts them."""
    alive = tokens.role != int(Role.PAD)
    mask = alive.long() if cut.padded or given.get("attention_mask") is not None else None
    places = alive.long().cumsum(1)[:, -queries:] - 1  # (B, Q)
    return {"attention_mask": mask, "position_ids": places + cut.offset[..., None]}


def _per_token(given: dict[str, Any], index: Tensor, shape: torch.Size) -> dict[str, Any]:
    """Every argument with one entry per token of the block (B, Q, ...), cut."""
    ours = ("attention_mask", "position_ids")
    wanted = {k: v for k, v in given.items() if k not in ours and isinstance(v, torch.Tensor) and v.shape[:2] == shape}
    return {k: take(v, index.to(v.device)) for k, v in wanted.items()}


def _positions(given: Tensor | None, keep: Keep, mask: Tensor, real: Tensor, index: Tensor, start: int) -> Tensor:
    """(B, M) positions, or (A, B, M) as the host has them. Several axes (M-RoPE) keep their coordinates in the picture."""
    if given is None:
        given = real.long().cumsum(1) - 1 + start
    given = given.expand(*given.shape[:-2], len(index), -1)
    gone = (real & ~mask).long().cumsum(1)
    if given.dim() == 2:
        given = given - gone if keep.positions == "renumber" else given
    elif given.shape[0] == 4:  # the first axis counts text, for packed sequences; gaps there would look like a border
        given = torch.cat([given[:1] - gone, given[1:]])
    flat = given.reshape(-1, *given.shape[-2:])
    found = torch.stack([take(axis, index.to(axis.device)) for axis in flat])
    return found.view(*given.shape[:-1], index.shape[1])


def _mask(mask: Any, index: Tensor, tokens: Tokens, needed: bool, window: int | None) -> Any:
    if isinstance(mask, dict):
        found = {name: _ready(one, index) for name, one in mask.items()}
        if window is not None and found.get("sliding_attention") is not None:
            found["sliding_attention"] = _windowed(found["full_attention"], found["sliding_attention"], tokens, window)
        return found
    if mask is not None and mask.dim() > 2:
        return _ready(mask, index)
    return (tokens.role != int(Role.PAD)).long() if needed or mask is not None else None


def _ready(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """The rows and columns of what is kept, of a ready-made mask (B|1, 1, Q, K), bool or additive."""
    if mask is None:
        return None
    past = mask.shape[3] - mask.shape[2]
    least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    column = torch.arange(past, device=index.device).expand(len(index), -1)
    column = torch.cat([column, torch.where(index < 0, -1, index + past)], 1)
    found = take(mask.expand(len(index), -1, -1, -1), index, fill=least, dim=2)
    return take(found, column, fill=least, dim=3)


def _windowed(full: Tensor, sliding: Tensor, tokens: Tokens, window: int) -> Tensor:
    """The mask of sliding layers with windows of kept tokens; tokens of one picture see each other at any distance."""
    queries, keys = sliding.shape[-2:]
    column = torch.arange(keys, device=full.device)
    near = column > column[keys - queries :, None] - window  # (M, K)
    image = tokens.image[:, -keys:]
    same = (image[:, -queries:, None] == image[:, None]) & (image[:, None] >= 0)  # (B, M, K)
    least = False if full.dtype == torch.bool else torch.finfo(full.dtype).min
    return full[..., -keys:].masked_fill(~(near | same)[:, None], least)


def refuse_fixed(cache: Any) -> None:
    """HostError for a cache of fixed shape, which cannot hold fewer tokens than the caller counts."""
    if getattr(cache, "is_compileable", False):
        raise HostError(
            f"{type(cache).__name__} has a fixed shape: visual tokens can only be dropped with a dynamic cache "
            "(generate's default; do not set cache_implementation='static')"
        )

"""The beginning that another prompt has in common with one that was just read is not read again.

Second prompts mostly ask something else about the same pictures: up to behind the pictures they are the first prompt, token
for token, and so are keys and values, which depend on what stands before only. `Prefix.resume` cuts them out of the first
prompt's cache, row by row where padding differs, and `generate` reads on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightline.engine.sequences import KEY, Sequence
from sightline.engine.tokens import Role

if TYPE_CHECKING:
    from torch import nn


ALONG = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # (B, N) arguments, one value per token
LEAST = 16  # tokens that must be known, for it to be worth a copy


def plain_cache(cache: Any) -> bool:
    """A dynamic cache that keeps every token of every layer."""
    layers = getattr(cache, "layers", [])
    lengths = {layer.get_seq_length() for layer in layers if type(layer).__name__ == "DynamicLayer"}
    kinds = {type(layer).__name__ for layer in layers}
    return kinds == {"DynamicLayer"} and len(lengths) == 1 and not getattr(cache, "offloading", False)


def counted(position: Any, real: Tensor) -> bool:
    """Whether position ids (B, N) are what `generate` makes of a mask (B, N) bool: places among the real tokens."""
    if not isinstance(position, Tensor) or position.dim() != 2 or position.shape[1] != real.shape[1]:
        return False
    wanted = real.long().cumsum(1) - 1
    return bool((position.expand_as(wanted) == wanted)[real].all())


@dataclass(frozen=True)
class Prefix:
    """A prompt of B rows that stands in a cache, left-padded, with positions counted from each row's first token."""

    ids: Tensor  # (B, N)
    sequence: Sequence
    cache: Any
    placeholders: frozenset[int]  # ids that stand for pictures
    every: int = 1  # rows of the cache per row

    def resume(self, model: nn.Module, inputs: Mapping[str, Any], copies: int) -> dict[str, Any] | None:
        """Arguments of `generate` that begin with a filled cache; None when too little is known. A few syncs.

        Args:
            inputs: B / copies rows, or B / copies / beams, padded on the left, about the same pictures.

        Returns:
            Rows laid out anew: what is known, padded on the left to one width, then the rest, padded on the left likewise.
        """
        rows = {k: v.repeat_interleave(copies, 0) for k, v in inputs.items() if k in ALONG}
        ids = rows["input_ids"]
        real = rows.pop("attention_mask", torch.ones_like(ids)).bool()
        every, more = divmod(len(self.ids), len(ids))  # beams of a row are alike
        if more or not every or not bool(real[:, -1].all()):
            return None
        if every > 1:
            return self._rows(every).resume(model, inputs, copies)
        length = real.sum(1)
        known = torch.minimum(
            self._known(ids, real), (length - 2).clamp(min=0)
        )  # a block of one token would count as an answer's
        width, rest = int(known.max()), int((length - known).max())
        beyond = torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - length + known)[:, None]
        if width < LEAST or any(bool(((ids == token) & beyond).any()) for token in self.placeholders):
            return None
        place = torch.arange(width, device=ids.device) - (width - known)[:, None]  # (B, W) among a row's real tokens
        tail = torch.arange(rest, device=ids.device)
        index = torch.cat(
            [
                (place + (ids.shape[1] - length)[:, None]).clamp(min=0),
                (tail + ids.shape[1] - rest).expand(len(ids), -1),
            ],
            1,
        )
        mask = torch.cat([place >= 0, tail >= (rest - length + known)[:, None]], 1)
        found = {name: value.gather(1, index) for name, value in rows.items()}
        found["input_ids"] = torch.where(mask, found["input_ids"], ids[:, -1:])  # no placeholder among padding
        first = self.sequence.tokens.role == int(Role.PAD)
        cache = self._copy((place + first.sum(1, keepdim=True)).clamp(min=0), place >= 0)
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        return {**found, "attention_mask": mask.long(), name: cache}

    def _rows(self, every: int) -> Prefix:
        """The same of every so many-th row."""
        order = torch.arange(0, len(self.ids), every, device=self.ids.device)
        return replace(self, ids=self.ids[order], sequence=replace(self.sequence, tokens=self.sequence.tokens.rows(order)),
                       every=self.every * every)  # fmt: skip

    def _known(self, ids: Tensor, real: Tensor) -> Tensor:
        """(B,) how many of a row's first real tokens are those of the first prompt."""
        first = self.sequence.tokens.role != int(Role.PAD)  # (B, N)
        padding = (~real).sum(1, keepdim=True)
        column = torch.arange(ids.shape[1], device=ids.device) - padding + (~first).sum(1, keepdim=True)
        inside = column.clamp(0, self.ids.shape[1] - 1)
        same = (self.ids.gather(1, inside) == ids) & (column == inside)
        return (same | ~real).long().cumprod(1).sum(1) - padding[:, 0]

    def _copy(self, column: Tensor, real: Tensor) -> Any:
        """A cache of the columns (B, W) of this one; where not `real` (B, W) they are padding."""
        new = type(self.cache)()
        for i, layer in enumerate(self.cache.layers):
            both = []
            for values in (layer.keys, layer.values):
                at = column.to(values.device)[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
                both.append(values[:: self.every].gather(2, at))
            new.update(*both, i)
        old = self.sequence
        tokens = old.tokens.select(column.masked_fill(~real, -1))
        known = Sequence(tokens, [{} for _ in old.states], old.owner, old.owner.sequences.uncut(), second=True)
        setattr(new, KEY, known)
        return new

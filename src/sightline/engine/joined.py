"""One forward for both streams: the rows of the second stand below those of the first in one cache.

Generating one token reads every weight once however few rows there are, so two forwards of B rows cost about twice one
forward of 2 B rows. Streams are joined at the first generated token when nothing else looks at the rows: no other system in
the language model, plain dynamic caches, positions given as `generate` gives them. The shorter prompt is padded on the left.
`split` undoes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sightline.engine.prefix import plain_cache
from sightline.engine.sequences import KEY
from sightline.engine.tokens import Role

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.second import Stream
    from sightline.engine.sequences import Sequence

SHARED = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values"}

caches: weakref.WeakSet = weakref.WeakSet()  # that hold two streams


def fits(stream: Stream, cache: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether this forward of one token can be made for both streams at once."""
    ids, mask, position = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if ids is None or ids.shape[1] != 1 or position is None or stream.position is None:
        return False
    if position.dim() != stream.position.dim() or position.shape[:-2] != stream.position.shape[:-2]:
        return False
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return False
    others = {k: v for k, v in kwargs.items() if k not in SHARED}
    if any(isinstance(v, (torch.Tensor, dict)) or (k.startswith("output_") and v) for k, v in others.items()):
        return False
    return cache in caches or (plain_cache(cache) and plain_cache(stream.cache))


def join(sequence: Sequence, stream: Stream, cache: Any) -> None:
    """Put the rows of the second stream below those of the first, in the cache of the first."""
    first, second = cache.get_seq_length(), stream.cache.get_seq_length()
    width = max(first, second)
    sequence.shift, stream.shift = width - first, width - second
    for layer, other in zip(cache.layers, stream.cache.layers, strict=True):
        layer.keys = _below(layer.keys, other.keys, width)
        layer.values = _below(layer.values, other.values, width)
    real = sequence.tokens.role[:, :first] != int(Role.PAD)  # (B, N)
    mask = torch.ones(real.shape[0], second, device=real.device) if stream.mask is None else stream.mask
    mask = torch.cat(
        [_left(real.long(), width), _left(F.pad(mask.long(), (0, second - mask.shape[1]), value=1), width)]
    )
    stream.mask = None if first == second and bool(mask.all()) else mask
    stream.cache, stream.sequence = None, getattr(stream.cache, KEY, None)
    caches.add(cache)


def arguments(sequence: Sequence, stream: Stream, cache: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that change for one forward of both streams: (2 B, 1) tokens."""
    past = cache.get_seq_length()
    position = kwargs["position_ids"]
    rows = kwargs["input_ids"].shape[0]
    second = stream.position + (past - stream.shift - stream.length)
    position = torch.cat([p.expand(*p.shape[:-2], rows, 1) for p in (position, second)], -2)
    mask = None if stream.mask is None else F.pad(stream.mask, (0, past + 1 - stream.mask.shape[1]), value=1)
    return {"input_ids": kwargs["input_ids"].repeat(2, 1), "attention_mask": mask, "position_ids": position}


def split(sequence: Sequence, stream: Stream, cache: Any) -> None:
    """Give every stream its own cache again."""
    if cache not in caches:
        return
    caches.discard(cache)
    other, shift = type(cache)(), sequence.shift
    for i, layer in enumerate(cache.layers):
        rows = layer.keys.shape[0] // 2
        other.update(layer.keys[rows:, :, stream.shift :], layer.values[rows:, :, stream.shift :], i)
        layer.keys, layer.values = (
            layer.keys[:rows, :, shift:].contiguous(),
            layer.values[:rows, :, shift:].contiguous(),
        )
    if stream.mask is not None:
        stream.mask = stream.mask[stream.mask.shape[0] // 2 :, stream.shift :]
    if stream.sequence is not None:
        setattr(other, KEY, stream.sequence)
    stream.cache, stream.sequence, sequence.shift, stream.shift = other, None, 0, 0


def _below(first: Tensor, second: Tensor, width: int) -> Tensor:
    """(B, H, N, D) twice -> (2 B, H, width, D), zeros on the left."""
    return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in (first, second)])


def _left(mask: Tensor, width: int) -> Tensor:
    return F.pad(mask, (width - mask.shape[1], 0))

"""A cache layer that holds important tokens in more bits than the others.

    scale = (max - min) / (2^b - 1),   q = round((x - min) / scale),   x ~ q scale + min         scale 0: x = min

Keys are quantised per channel (min and max over the tokens of one precision), values per token after every channel was
divided by c = sqrt(max |v|) over these tokens, and multiplied by it afterwards. Codes of 2 and 4 bits are packed in bytes;
16 bits leave numbers as they are. Tokens that came later are held as they came, until they are compressed too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.engine.select import columns, take
from sightline.errors import AttachError, ParameterError

BITS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Codes:
    """Quantised numbers of a tensor (B, H, n, D)."""

    code: Tensor  # (B, H, n, bytes) uint8; the numbers themselves at 16 bits
    low: Tensor | None  # (B, H, 1, D) or (B, H, n, 1), of the numbers' type
    scale: Tensor | None
    channel: Tensor | None  # (B, H, 1, D) factor of every channel
    bits: int
    dim: int  # D

    def numbers(self) -> Tensor:
        """(B, H, n, D) as they were, up to scale / 2."""
        if self.bits == 16:
            return self.code
        code = unpack(self.code, self.bits, self.dim).to(self.low.dtype)
        found = code * self.scale + self.low
        return found if self.channel is None else found * self.channel

    @property
    def bytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (self.code, self.low, self.scale, self.channel) if t is not None
        )

    def rows(self, change: Any) -> Codes:
        """With every tensor's batch dimension changed."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in parts.items() if isinstance(v, Tensor)})


def pack(code: Tensor, bits: int) -> Tensor:
    """(..., D) uint8 below 2^bits -> (..., ceil(D bits / 8)) uint8."""
    each = 8 // bits
    code = F.pad(code, (0, -code.shape[-1] % each)).unflatten(-1, (-1, each))
    shift = torch.arange(0, 8, bits, device=code.device, dtype=torch.uint8)
    return (code << shift).sum(-1, dtype=torch.uint8)


def unpack(code: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `pack`: (..., dim) uint8."""
    shift = torch.arange(0, 8, bits, device=code.device, dtype=torch.uint8)
    return ((code[..., None] >> shift) & (2**bits - 1)).flatten(-2)[..., :dim]


def quantise(x: Tensor, bits: int, real: Tensor, *, over: int, channels: bool = False) -> Codes:
    """Codes of x.

    Args:
        x: (B, H, n, D). bits: 2, 4, 8 or 16. real: (B, n) bool, tokens whose numbers count for minima and maxima.
        over: the dimension over which these are taken: 2 (tokens) for keys, 3 (channels) for values.
        channels: divide every channel by sqrt(max |x|) before.
    """
    if bits not in BITS:
        raise ParameterError(f"bits={bits!r}: choose one of {BITS}")
    if bits == 16 or x.shape[2] == 0:
        return Codes(x, None, None, None, 16, x.shape[-1])
    here, channel, value = real[:, None, :, None], None, x.float()
    if channels:
        channel = value.abs().masked_fill(~here, 0.0).amax(2, keepdim=True).sqrt()
        channel = torch.where(channel > 0, channel, 1.0)
        value = value / channel
    low = value.masked_fill(~here, torch.inf).amin(over, keepdim=True)
    high = value.masked_fill(~here, -torch.inf).amax(over, keepdim=True)
    low, high = (torch.where(t.isfinite(), t, 0.0) for t in (low, high))  # nothing real: zero
    scale = (high - low) / (2**bits - 1)
    code = ((value - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    code = pack(code.masked_fill(~here, 0.0).to(torch.uint8), bits)
    channel = None if channel is None else channel.to(x.dtype)
    return Codes(code, low.to(x.dtype), scale.to(x.dtype), channel, bits, x.shape[-1])


@dataclass(frozen=True)
class Block:
    """Compressed keys and values of n tokens, in two precisions."""

    parts: tuple[tuple[Codes, Codes], ...]  # (keys, values), important tokens first
    place: Tensor  # (B, n) where among them every token is
    high: Tensor  # (B, n) bool: which are important
    bits: tuple[int, int]  # of important ones and of others

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, high: Tensor, bits: tuple[int, int], real: Tensor) -> Block:
        """keys, values: (B, H, n, D). high: (B, n) bool. real: (B, n) bool, no padding (it counts as unimportant)."""
        parts, index = [], []
        for chosen, width in zip((high, ~high), bits, strict=True):
            where = columns(chosen, pad="right")  # (B, m)
            there = (where >= 0) & take(real, where)
            k, v = take(keys, where, dim=2), take(values, where, dim=2)
            parts.append((quantise(k, width, there, over=2), quantise(v, width, there, over=3, channels=True)))
            index.append(where)
        order = torch.cat(index, 1)  # (B, m + m')
        place = torch.zeros(high.shape[0], high.shape[1] + 1, dtype=torch.long, device=high.device)
        slots = torch.arange(order.shape[1], device=high.device).expand_as(order)
        place = place.scatter(1, torch.where(order < 0, high.shape[1], order), slots)[:, : high.shape[1]]
        return cls(tuple(parts), place, high, bits)

    def restored(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, D) in the tokens' own order."""
        both = (torch.cat([part[i].numbers() for part in self.parts], 2) for i in (0, 1))
        return tuple(take(x, self.place, dim=2) for x in both)

    @property
    def bytes(self) -> int:
        return sum(codes.bytes for part in self.parts for codes in part)

    def rows(self, change: Any) -> Block:
        """With the batch dimension changed."""
        parts = tuple(tuple(codes.rows(change) for codes in part) for part in self.parts)
        return replace(self, parts=parts, place=change(self.place), high=change(self.high))


@lru_cache
def mixed_class() -> type:
    """The cache layer. Made when first needed: the engine loads transformers late."""
    from transformers.cache_utils import DynamicLayer

    class MixedLayer(DynamicLayer):
        """Compressed blocks, then `keys` and `values` (B, H, r, D) of the tokens since."""

        is_croppable = False
        _layer_type = None

        def __init__(self) -> None:
            super().__init__()
            self.blocks: list[Block] = []
            self.cumulative_length = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.cumulative_length += key_states.shape[-2]
            super().update(key_states, value_states)
            return self.all()

        def all(self) -> tuple[Tensor, Tensor]:
            """All keys and values, restored."""
            parts = [*(block.restored() for block in self.blocks), (self.keys, self.values)]
            return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))

        @property
        def nbytes(self) -> int:
            """Bytes held."""
            return sum(b.bytes for b in self.blocks) + 2 * self.keys.numel() * self.keys.element_size()

        def compress(self, high: Tensor, bits: tuple[int, int], real: Tensor) -> None:
            """Compress the tokens since the last time; high, real: (B, r) bool."""
            self.blocks.append(Block.of(self.keys, self.values, high, bits, real))
            self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]

        def get_seq_length(self) -> int:
            return self.cumulative_length

        def _rows(self, change: Any) -> None:
            self.blocks = [block.rows(change) for block in self.blocks]
            self.keys, self.values = change(self.keys), change(self.values)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            self._rows(lambda x: x.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            self._rows(lambda x: x[indices])

        def reset(self) -> None:
            super().reset()
            self.blocks = []

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove:
                raise AttachError(
                    f"a compressed cache cannot be cropped (asked to remove {tokens_to_remove} tokens): begin a new sequence, "
                    "or take the compressing system off"
                )

    return MixedLayer


def mixed(stored: Any) -> Any:
    """A layer's cache as one that can be compressed, with what it holds."""
    layer = mixed_class()()
    layer.lazy_initialization(stored.keys, stored.values)
    layer.keys, layer.values = stored.keys, stored.values
    layer.cumulative_length = stored.get_seq_length()
    return layer

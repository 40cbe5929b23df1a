"""A cache layer that holds important tokens in more bits than the others.

    scale = (max - min) / (2^b - 1),   q = round((x - min) / scale),   x ~ q scale + min         scale 0: x = min

Keys are quantised per channel (min and max over the tokens of one precision), values per token after every channel was
divided by c = sqrt(max |v|) over these tokens, and multiplied by it afterwards. Codes of 2 and 4 bits are packed in bytes;
16 bits leave numbers as they are. Tokens that came later are held as they came, until they are compressed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.engine.select import columns, take
from sightline.errors import AttachError, ParameterError

BITS = (2, 4, 8, 16)
PIECE_BYTES = 1 << 20  # of fp32 numbers worked on at once on a CPU: they stay in its cache between the steps


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
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in parts.items() if isinstance(v, Tensor)}

    def rows(self, change: Any) -> Codes:
        """With every tensor's batch dimension changed."""
        return replace(self, **{k: change(v) for k, v in self.tensors().items()})

    @classmethod
    def of_heads(cls, parts: Sequence[Codes]) -> Codes:
        """The codes of all heads from those of some each."""
        return replace(parts[0], **{k: torch.cat([getattr(p, k) for p in parts], 1) for k in parts[0].tensors()})


def pack(code: Tensor, bits: int) -> Tensor:
    """(..., D) whole numbers below 2^bits, of any type -> (..., ceil(D bits / 8)) uint8, far channels side by side."""
    each = 8 // bits
    first, *others = F.pad(code, (0, -code.shape[-1] % each)).chunk(each, -1)
    for k, other in enumerate(others, 1):
        first = torch.add(first, other, alpha=2 ** (k * bits))
    return first.to(torch.uint8)


def unpack(code: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `pack`: (..., dim) uint8."""
    if bits == 8:
        return code
    return torch.cat([(code >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)[..., :dim]


def quantise(x: Tensor, bits: int, *, over: int, channels: bool = False) -> Codes:
    """Codes of x.

    Args:
        x: (B, H, n, D). bits: 2, 4, 8 or 16.
        over: the dimension over which minima and maxima are taken: 2 (tokens) for keys, 3 (channels) for values.
        channels: divide every channel by sqrt(max |x|) before.
    """
    if bits not in BITS:
        raise ParameterError(f"bits={bits!r}: choose one of {BITS}")
    if bits == 16 or x.shape[2] == 0:
        return Codes(x, None, None, None, 16, x.shape[-1])
    heads = PIECE_BYTES // (4 * x[:, :1].numel()) or 1
    if x.device.type == "cpu" and heads < x.shape[1]:
        return Codes.of_heads([quantise(part, bits, over=over, channels=channels) for part in x.split(heads, 1)])
    value, channel = x.float(), None
    if channels:
        channel = value.abs().amax(2, keepdim=True).sqrt()
        channel = torch.where(channel > 0, channel, 1.0)
        value = value / channel
    low = value.amin(over, keepdim=True)
    scale = (value.amax(over, keepdim=True) - low) / (2**bits - 1)
    step = torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, torch.inf)  # all the same: code 0
    code = pack((value - low).div_(step).round_(), bits)
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
            first = (chosen & real).int().argmax(1, keepdim=True)  # (B, 1)
            source = torch.where(there, where, first)  # padding is held like a real token: it spoils no minimum
            k, v = (take(x, source, dim=2, filled=False) for x in (keys, values))
            parts.append((quantise(k, width, over=2), quantise(v, width, over=3, channels=True)))
            index.append(where)
        order = torch.cat(index, 1)  # (B, m + m')
        place = torch.zeros(high.shape[0], high.shape[1] + 1, dtype=torch.long, device=high.device)
        slots = torch.arange(order.shape[1], device=high.device).expand_as(order)
        place = place.scatter(1, torch.where(order < 0, high.shape[1], order), slots)[:, : high.shape[1]]
        return cls(tuple(parts), place, high, bits)

    def restored(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, D) in the tokens' own order."""
        both = (torch.cat([part[i].numbers() for part in self.parts], 2) for i in (0, 1))
        return tuple(take(x, self.place, dim=2, filled=False) for x in both)

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
            self.keys, self.values = (x[:, :, :0].clone() for x in (self.keys, self.values))  # a view would hold all

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

"""Cuts inside the language model: per sequence the depth of every layer, per model the hooks that make it true.

A system's `cut` station says which tokens of the running block go on; its `cache` station may call `site.cuts.evict`. All
layers behind a cut run, and cache, fewer rows; their masks and rotary angles follow (`engine.depth`). Their caches report
the length of the whole sequence, because transformers plans the next forward by it. After the last layer the block has
its full length again: dropped tokens show the state in which they left.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.engine.checks import STATIC
from sightline.engine.depth import Depth, Held, chosen, cut, mask_of, placed, places_of, spread
from sightline.engine.lean import lean
from sightline.engine.mixed import mixed
from sightline.engine.select import Keep, columns, take
from sightline.engine.tokens import Role, Tokens
from sightline.errors import HostError, InputError
from sightline.hosts import get

if TYPE_CHECKING:
    from sightline.engine.attach import Attachment

CACHES = ("cache", "past_key_values")  # the keyword of a layer, since transformers 5.24 and before


@dataclass
class Cuts:
    """Where one sequence was cut. Depth None: the layer sees everything."""

    depths: list[Depth | None]  # per layer
    held: dict[int, Held] = field(default_factory=dict)  # layers whose cache has lost tokens
    left: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # states at every cut of the running block
    width: int = 0  # how much of the sequence the depths know

    def copy(self) -> Cuts:
        return Cuts(list(self.depths), dict(self.held), width=self.width)

    def follow(self, whole: Tokens) -> None:
        """A new block begins, the last one of `whole`."""
        count, self.width = whole.shape[1] - self.width, whole.shape[1]
        self._map(lambda depth: depth.grown(whole, count))

    def crop(self, whole: Tokens, length: int) -> None:
        """The cache was cropped to the first `length` tokens of `whole`; only tokens that every layer has may go."""
        count = whole.shape[1] - length
        if any(d is not None and bool((d.column[:, -count:] < length).any()) for d in self.depths):
            raise InputError(f"the cache was cropped to {length} tokens, into a block of which some were dropped")
        self._map(lambda depth: depth.cropped(count))
        self.width = length

    def _map(self, change: Any) -> None:
        new = {id(d): change(d) for d in self.depths if d is not None}
        self.depths = [None if d is None else new[id(d)] for d in self.depths]
        self.left = []


class View:
    """What a system may ask about cuts: `site.cuts`."""

    def __init__(self, cutter: Cutter, layer: int) -> None:
        self._cutter, self._layer = cutter, layer

    def tokens(self, layer: int) -> Tokens:
        """The ledger (B, M) of what a layer has seen. `position` tells the columns of the whole sequence."""
        return self._cutter.tokens(layer)

    def shift(self, layer: int) -> Tensor | None:
        """(B,) how far positions of new tokens are moved back at a layer; None: not at all."""
        depth = self._cutter.cuts.depths[layer]
        return None if depth is None else depth.shift

    def rows(self, queries: Tensor) -> Tensor:
        """In the station `cut`: this layer's attention rows as they would be without the cut.

        Args:
            queries: (B, R) which tokens of the running block ask; out of range is not checked.

        Returns:
            (B, H, R, M) fp32, no gradient, over this layer's ledger. Costs the layer's keys, and no Q x M map.
        """
        return self._cutter.rows(self._layer, queries)

    def evict(self, layer: int, keep: Tensor, shift: Tensor | None = None, most: int | None = None) -> None:
        """In the station `cache`: take tokens out of a layer's cache, for good.

        Args:
            layer: of the decoder.
            keep: (B, M) bool over the layer's ledger `tokens(layer)`; what the cache no longer holds is ignored. Or
                (B, Hkv, M), for every key head its own tokens, as many for all heads of a row; no sliding window then.
            shift: (B,) how far positions of tokens to come are moved back at this layer from now on; None: as before.
            most: the largest number of tokens that a row keeps, where it is known: the device is not asked then.
        """
        self._cutter.evict(layer, keep, shift, most)

    def order(self, layer: int) -> Tensor | None:
        """(B,) which row of the forward before every row of this one goes on from, where beams were reordered.

        Known for layers that tokens were taken out of; None: each row from its own.
        """
        return self._cutter.orders.get(layer)

    def loose(self, layer: int) -> int | None:
        """In the station `cache`: how many of a layer's tokens are not compressed; None: it cannot be (a window)."""
        stored = self._cutter.cache.layers[layer]
        return None if getattr(stored, "is_sliding", False) else stored.keys.shape[-2]

    def compress(self, layer: int, high: Tensor, bits: tuple[int, int]) -> None:
        """In the station `cache`: hold the tokens that are not compressed yet in fewer bits.

        Args:
            layer: of the decoder; one with a sliding window is refused.
            high: (B, M) bool over the layer's ledger `tokens(layer)`: the important ones.
            bits: of important and of other tokens: 2, 4, 8 or 16.
        """
        self._cutter.compress(layer, high, bits)

    def precision(self, layer: int) -> Tensor:
        """In the station `cache`: (B, M) int8, in how many bits a layer holds every token of its ledger.

        16: as it came; 0: it no longer holds it (in none of its heads).
        """
        return self._cutter.precision(layer)


class Cutter:
    """The engine of cuts on one model."""

    def __init__(self, owner: Attachment) -> None:
        self.owner = owner
        self._asks = any("cut" in worker.stations for worker in owner.workers)
        self.cache: Any = None  # of the forward now running
        self.orders: dict[int, Tensor] = {}  # how rows of a layer's cache were reordered before it
        self._angles: list[tuple[Any, nn.Module, Any]] = []  # of the forward now running: (what it gave, module, call)
        self._made: dict[Any, tuple] = {}  # masks and angles already made in this forward
        self._moment: tuple[nn.Module, Tensor, dict] | None = None  # the layer whose `cut` station runs
        self._wide = False  # the block has its full length for a while
        self._image_block: bool | None = None

    @property
    def cuts(self) -> Cuts:
        return self.owner.sequences.current.cuts

    @property
    def whole(self) -> Tokens:
        return self.owner.sequences.current.tokens

    def tokens(self, layer: int) -> Tokens:
        """The ledger of a layer."""
        depth = self.cuts.depths[layer] if layer >= 0 else None
        return self.whole if depth is None else depth.tokens

    # -- hooks ------------------------------------------------------------------------------------------------------

    def enter(self, decoder: nn.Module, rotary: nn.Module | None, layers: list[nn.Module], deep: int, undo: ExitStack):
        """Hook in. `deep`: layers behind which the host itself adds to all positions (DeepStack)."""
        undo.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        if rotary is not None:
            undo.callback(rotary.register_forward_hook(self._keep_angles, with_kwargs=True).remove)
        for i, layer in enumerate(layers):
            undo.callback(layer.register_forward_pre_hook(partial(self._layer, i), with_kwargs=True).remove)
        for i in sorted({*range(min(deep, len(layers))), len(layers) - 1}):
            undo.callback(layers[i].register_forward_hook(partial(self._widen, i)).remove)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._angles, self._made, self._wide, self._image_block, self.orders = [], {}, False, None, {}
        if self.owner.sequences.current is not None:
            self.cuts.follow(self.whole)
            for layer, held in self.cuts.held.items():
                order = self.cache.layers[layer].__dict__.pop("order", None)
                if order is not None:
                    self.cuts.held[layer], self.orders[layer] = held.rows(order), order
        self.cache = _cache_of(kwargs)

    def _keep_angles(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.owner.sequences.current is not None:
            self._angles.append((output, module, signature(module.forward).bind(*args, **kwargs)))

    def _layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        sequence = self.owner.sequences.current
        if sequence is None:
            return None
        given = hidden = args[0] if args else kwargs["hidden_states"]
        depth = sequence.cuts.depths[layer]
        if self._wide:
            hidden, self._wide = take(hidden, depth.block), False
        if sequence.prefill and self._asks and self._has_image(sequence):
            hidden = self._ask(layer, module, hidden, kwargs)
        if sequence.cuts.depths[layer] is None:
            return None
        kwargs = self._adapted(layer, module, hidden, kwargs)
        if hidden is given:
            return args, kwargs
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _has_image(self, sequence: Any) -> bool:
        if self._image_block is None:
            whole = sequence.tokens
            self._image_block = bool(whole.visual[:, whole.shape[1] - sequence.queries :].any())
        return self._image_block

    def _ask(self, layer: int, module: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        now = [hidden]

        def show() -> Tensor:
            self._moment = (module, now[0], kwargs)
            return now[0]

        for keep in self.owner.each("cut", "text", layer, show):
            now[0] = self._cut(layer, keep, now[0])
        return now[0]

    def _widen(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        sequence = self.owner.sequences.current
        if sequence is None or not sequence.cuts.left:
            return None
        depth, parts = sequence.cuts.depths[layer], sequence.cuts.left
        hidden = output[0] if isinstance(output, tuple) else output
        if depth is None or depth.block is None:  # the cuts of this block come later
            return None
        full = parts[0][0]
        for state, block in [*parts[1:], (hidden, depth.block)]:
            full = _put(full, state, block)
        self._wide = True
        return (full, *output[1:]) if isinstance(output, tuple) else full

    # -- cutting ------------------------------------------------------------------------------------------------------

    def _cut(self, layer: int, keep: Keep, hidden: Tensor) -> Tensor:
        cuts, queries = self.cuts, hidden.shape[1]
        if keep.mask.shape != hidden.shape[:2]:
            raise InputError(f"a cut keeps {tuple(keep.mask.shape)} of a block of {tuple(hidden.shape[:2])} tokens")
        base = Depth.of(self.whole)
        here = cuts.depths[layer] or base
        found = chosen(here.tokens.role[:, here.tokens.shape[1] - queries :], keep.mask)
        if found is None:
            return hidden
        index, filled = found
        _refuse_static(self.cache)
        cuts.left.append((hidden, here.block))
        renumber = keep.positions == "renumber"
        new: dict[int, Depth] = {}
        for deeper in range(layer, len(cuts.depths)):
            depth = cuts.depths[deeper] or base
            if id(depth) not in new:
                host = self._host_places() if renumber or depth.shift is not None else None
                new[id(depth)] = cut(depth, index, filled, queries, host, renumber)
            cuts.depths[deeper] = new[id(depth)]
        return take(hidden, index)

    def evict(self, layer: int, keep: Tensor, shift: Tensor | None, most: int | None = None) -> None:
        """See `View.evict`."""
        _refuse_static(self.cache)
        stored = self.cache.layers[layer]
        if hasattr(stored, "_quantized_keys") or hasattr(stored, "blocks"):
            raise HostError("tokens cannot be taken out of a quantised cache: use the default (dynamic) cache")
        depth = self.cuts.depths[layer] or Depth.of(self.whole)
        ledger, heads = tuple(depth.tokens.shape), stored.keys.shape[1]
        if keep.shape not in (ledger, (ledger[0], heads, ledger[1])):
            raise InputError(
                f"layer {layer}: keep has shape {tuple(keep.shape)}, its ledger {ledger}, {heads} key heads"
            )
        held, width = self.cuts.held.get(layer), ledger[1]
        now = torch.arange(width, device=keep.device).expand(ledger[0], -1) if held is None else held.of_heads(width)
        now = now[..., now.shape[-1] - stored.keys.shape[-2] :]  # (..., K) a sliding window has let the first ones go
        real = depth.tokens.role != int(Role.PAD)
        if keep.dim() == now.dim() == 2:
            stay = take(keep & real, now)
        elif getattr(stored, "is_sliding", False):
            raise HostError(f"layer {layer} has a sliding window: its heads cannot hold different tokens")
        else:
            keep, now = (x if x.dim() == 3 else x[:, None].expand(-1, heads, -1) for x in (keep, now))
            stay = _rows(take, keep & real[:, None], now)
        counts, filled = stay.sum(-1), True
        if most is None:
            most, least, uneven = torch.stack([counts.max(), counts.min(), _spread(counts)]).tolist()
            filled = most != least
            if uneven:
                raise InputError(f"layer {layer}: the heads of a row keep different numbers of tokens")
        most = min(most, stay.shape[-1])
        if stay.dim() == 2:
            index = columns(stay, width=most)
            stored.keys, stored.values = (take(x, index, dim=2, filled=filled) for x in (stored.keys, stored.values))
            new = Held(take(now, index, fill=-1), width, filled)
        else:
            index = _rows(partial(columns, width=most), stay)
            stored.keys, stored.values = (_rows(take, x, index) for x in (stored.keys, stored.values))
            now = _rows(partial(take, fill=-1), now, index)
            new = Held(now[:, 0], width, filled, now)
        self.cuts.held[layer] = new
        self.cuts.depths[layer] = depth if shift is None else replace(depth, shift=shift)

    def compress(self, layer: int, high: Tensor, bits: tuple[int, int]) -> None:
        """See `View.compress`."""
        _refuse_static(self.cache)
        stored = self.cache.layers[layer]
        if not hasattr(stored, "blocks"):
            if getattr(stored, "is_sliding", False) or hasattr(stored, "_quantized_keys"):
                raise HostError(f"the cache of layer {layer} ({type(stored).__name__}) cannot be compressed")
            stored = self.cache.layers[layer] = mixed(stored)
        tokens, held = self.tokens(layer), self.cuts.held.get(layer)
        if held is not None and held.heads is not None:
            raise HostError(f"the heads of layer {layer} hold different tokens: its cache cannot be compressed")
        width, loose = tokens.shape[1], stored.keys.shape[-2]
        now = torch.arange(width, device=high.device).expand(high.shape[0], -1) if held is None else held.columns(width)
        now = now[:, now.shape[1] - loose :]
        stored.compress(take(high, now), bits, take(tokens.role != int(Role.PAD), now))

    def precision(self, layer: int) -> Tensor:
        """See `View.precision`."""
        stored, tokens, held = self.cache.layers[layer], self.tokens(layer), self.cuts.held.get(layer)
        batch, width = tokens.shape
        parts = [torch.where(b.high, *b.bits) for b in getattr(stored, "blocks", ())]
        found = torch.cat([*parts, torch.full((batch, stored.keys.shape[-2]), 16, device=tokens.role.device)], 1)
        index = None if held is None else held.of_heads(width)
        found = found[:, None, None].expand(-1, 1 if index is None or index.dim() == 2 else index.shape[1], -1, -1)
        return spread(found, index, width).amax(1)[:, 0].to(torch.int8)

    def settle(self, cache: Any) -> None:
        """The forward is over: let the caches of cut layers report what the whole sequence is long."""
        cuts, length = self.cuts, self.whole.shape[1]
        for layer, depth in enumerate(cuts.depths if cache is not None else ()):
            if depth is not None and layer < len(cache.layers):
                _report(cache.layers[layer], length)
        cuts.left = []

    # -- what a layer is given ------------------------------------------------------------------------------------------

    def _adapted(self, layer: int, module: nn.Module, hidden: Tensor, kwargs: dict) -> dict:
        depth, held = self.cuts.depths[layer], self.cuts.held.get(layer)
        if depth is None:
            return kwargs
        new = dict(kwargs)
        angles, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        moved = depth.places is not None or depth.shift is not None
        if angles is not None and (moved or depth.block is not None):
            new["position_embeddings"] = self._once(("angles", id(depth), id(angles)), depth, angles, self._turned)
        if ids is not None and moved:
            new["position_ids"] = places_of(depth, self._host_places())[0]
        elif ids is not None and depth.block is not None:
            new["position_ids"] = placed(ids[..., None], depth)[..., 0]
        mask, cache = kwargs.get("attention_mask"), _cache_of(kwargs)
        keys = depth.tokens.shape[1] if held is None else held.index.shape[1] + depth.tokens.shape[1] - held.upto
        stored = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
        if stored is not None and getattr(stored, "is_sliding", False):
            keys = hidden.shape[1] + (stored.keys.shape[-2] if stored.is_initialized else 0)
        additive = hidden.dtype if self.owner.seats[layer].plain == "eager" else None
        make = partial(self._masked, held, keys, hidden.shape[1], additive)
        new["attention_mask"] = self._once(("mask", id(depth), id(mask), id(held), keys), depth, mask, make)
        return new

    def _masked(
        self, held: Held | None, keys: int, queries: int, additive: torch.dtype | None, depth: Depth, mask: Any
    ):
        return mask_of(mask, depth, held, keys, self.whole.shape[1], queries, additive)

    def _once(self, key: Any, depth: Depth, given: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = (make(depth, given), depth, given)  # kept alive, so that an id means one object
        return self._made[key][0]

    def _turned(self, depth: Depth, angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rotary angles of a depth."""
        places = places_of(depth, self._host_places()) if depth.shift is not None or depth.places is not None else None
        if places is None:
            return tuple(placed(x, depth) for x in angles)
        _, module, call = next((a for a in self._angles if a[0] is angles), self._angles[0])
        arguments = dict(call.arguments)
        arguments["position_ids"] = places if call.arguments["position_ids"].dim() == 3 else places[0]
        return module.forward(**arguments)

    def _host_places(self) -> Tensor:
        """(A, B, Q) the host's positions of the running block."""
        if not self._angles:
            raise HostError("this host's positions are not rotary, or its rotary module is not known: give it as "
                            "Host(..., rotary=<path inside the decoder>), or use positions that are kept")  # fmt: skip
        ids = self._angles[0][2].arguments["position_ids"]
        ids = ids if ids.dim() == 3 else ids.reshape(1, -1, ids.shape[-1])
        return ids.expand(-1, self.whole.shape[0], -1)

    def rows(self, layer: int, queries: Tensor) -> Tensor:
        """See `View.rows`."""
        module, hidden, kwargs = self._moment
        cache = _cache_of(kwargs)
        call = self._adapted(layer, module, hidden, kwargs)
        call = {k: v for k, v in call.items() if k not in (*CACHES, "hidden_states")}
        width, held = self.tokens(layer).shape[1], self.cuts.held.get(layer)
        look = partial(module.forward, hidden, **call)
        with lean(get(module, self.owner.host.attention), self.owner.host, queries):
            weights = self.owner.seats[layer].peek(look, queries, _past(cache, layer))
        return spread(weights, None if held is None else held.of_heads(width), width)


def _rows(change: Any, *tensors: Tensor) -> Tensor:
    """A function of (B, ...) on (B, Hkv, ...), every head a row."""
    return change(*(x.flatten(0, 1) for x in tensors)).unflatten(0, tensors[0].shape[:2])


def _spread(counts: Tensor) -> Tensor:
    """How much counts (B,) or (B, Hkv) differ inside a row, at most."""
    return (counts.amax(-1) - counts.amin(-1)).max() if counts.dim() == 2 else counts.new_zeros(())


def _put(full: Tensor, state: Tensor, block: Tensor) -> Tensor:
    """`full` (B, Q, D) with `state` (B, m, D) in the columns `block` (B, m); -1 goes nowhere."""
    width = full.shape[1]
    index = torch.where(block < 0, width, block)[..., None].expand_as(state)
    return F.pad(full, (0, 0, 0, 1)).scatter(1, index, state)[:, :width]


def _cache_of(kwargs: dict) -> Any:
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def _refuse_static(cache: Any) -> None:
    if getattr(cache, "is_compileable", False):
        raise HostError(STATIC)


def _past(cache: Any, layer: int) -> Tensor | None:
    """The keys a layer has already cached."""
    stored = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    if stored is None or not stored.is_initialized:
        return None
    return stored.all()[0] if hasattr(stored, "blocks") else stored.keys


def _report(stored: Any, length: int) -> None:
    """Let a layer's cache say that it holds `length` tokens, and write down how its rows are reordered."""
    if hasattr(stored, "blocks"):
        stored.cumulative_length = length
    elif stored.is_initialized:
        stored.__class__ = _reporting(type(stored))
        if isinstance(getattr(stored, "cumulative_length", None), int):
            stored.cumulative_length = length
        else:
            stored.missing = length - stored.keys.shape[-2]


@lru_cache
def _reporting(cls: type) -> type:
    """The cache layer class `cls`, whose length counts the tokens that were never cached or were taken out."""
    if hasattr(cls, "missing"):
        return cls

    def get_seq_length(self: Any) -> int:
        return cls.get_seq_length(self) + self.missing

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        cls.reorder_cache(self, beam_idx)
        known = self.__dict__.get("order")
        self.order = beam_idx if known is None else known[beam_idx]

    members = {"get_seq_length": get_seq_length, "reorder_cache": reorder_cache, "missing": 0, "_layer_type": None}
    return type(cls.__name__, (cls,), members)

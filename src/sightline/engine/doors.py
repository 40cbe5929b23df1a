"""The doors of one attachment at the model itself, its decoder's layers and its attention, and what happens at them.

Each is a hook on a module, or a seat beside an attention module; `enter` opens those that the systems' stations need. The
doors before the decoder's first layer (encoding of pictures, cuts before the layers) are `engine.front`'s.
"""

from __future__ import annotations

from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sightline.engine.checks import VISION, check_generation, require_vision
from sightline.engine.compiled import run_uncompiled
from sightline.engine.cuts import Cutter
from sightline.engine.seats import Seat, switch_attention
from sightline.engine.sequences import given_cache, made_cache
from sightline.engine.streams import last_real, run_streams
from sightline.errors import AttachError, HostError
from sightline.hosts import Host, get

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from torch import Tensor

    from sightline.engine.attach import Attachment
    from sightline.engine.attention import Call

CUTTING = {"cut", "cache"}  # stations that may shorten what layers see


class Doors:
    """What one attachment does at the model's own modules."""

    def __init__(self, owner: Attachment) -> None:
        self.owner = owner
        self.heard: set[str] = set()  # towers whose attention has called a seat in the forward now running
        self._tuples = False  # whether this forward was asked for a tuple

    def enter(self, used: set[str], undo: ExitStack) -> None:
        """Open the doors that the stations `used` need; `undo` closes them."""
        owner, model, host = self.owner, self.owner.model, self.owner.host
        text = used - VISION
        if not isinstance(host, Host):
            require_vision(model, text)
        if "vision_attention" in used:
            self._take_seats("vision", owner.tower_attention(), undo)
        if used:
            run_uncompiled(undo)
        if used and not text:  # no sequence will take over what the tower's stations remember: each picture begins anew
            _hook(get(model, host.tower), self._forget, undo)
        if "pixels" in used:
            _hook(get(model, host.tower), self._pixels, undo, with_kwargs=True)
        if text:
            self._enter_decoder(used, text, undo)

    def _enter_decoder(self, used: set[str], text: set[str], undo: ExitStack) -> None:
        owner, model, host = self.owner, self.owner.model, self.owner.host
        decoder = get(model, host.decoder)
        layers = list(get(decoder, host.layers))
        _hook(model, partial(self._before, signature(model.forward)), undo, with_kwargs=True)
        undo.callback(model.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove)
        if hasattr(model, "generate"):
            own = {"generate": model.__dict__["generate"]} if "generate" in model.__dict__ else {}
            undo.callback(model.__dict__.update, own)
            undo.callback(model.__dict__.pop, "generate", None)
            model.__dict__["generate"] = self._around(model.generate)
        owner.front.enter(used, undo)
        if any(w.system.streams() for w in owner.workers if w.stations):
            _hook(decoder, self._streams, undo, with_kwargs=True)
        if "positions" in text:
            _hook(decoder, self._positions, undo, with_kwargs=True)
        parts = {"mlp": [get(layer, host.mlp) for layer in layers] if "mlp" in text else [], "output": layers}
        for station in sorted(text & parts.keys()):
            for i, module in enumerate(parts[station]):
                handle = module.register_forward_hook(partial(self._output, station, i))
                undo.callback(handle.remove)  # before the cutter's, which puts dropped tokens back
        if not text.isdisjoint(CUTTING):
            rotary = get(decoder, host.rotary) if hasattr(decoder, host.rotary) else None
            deep = len(get(model.config, host.deepstack)) if host.deepstack else 0
            owner.cutter = Cutter(owner)
            owner.cutter.enter(decoder, rotary, layers, deep, undo)
        if "hidden" in text:
            for i, layer in enumerate(layers):
                _hook(layer, partial(self._hidden, i), undo, with_kwargs=True)
        if text & {"attention", "mask"} or owner.cutter is not None:
            self._take_seats("text", owner.text_attention(), undo)

    def _take_seats(self, tower: str, modules: list[nn.Module], undo: ExitStack) -> None:
        owner, root = self.owner, self._root(tower)
        fused = getattr(owner.host, "fused", False)
        names = {} if fused else switch_attention(owner.model, root, modules, undo)
        for i, module in enumerate(modules):
            seat = Seat(owner, tower, i, len(modules), plain=names.get(id(module), "fused"))
            seat.take(module, undo)
            if tower == "text":
                owner.seats.append(seat)
        _hook(root, lambda *_: self.heard.discard(tower), undo)
        undo.callback(root.register_forward_hook(partial(self._check_heard, tower)).remove)

    def _root(self, tower: str) -> nn.Module:
        host = self.owner.host
        return get(self.owner.model, host.decoder if tower == "text" else host.tower)

    def _check_heard(self, tower: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Raise HostError when code of the host's own (remote code, say) never asked for its attention by name."""
        if tower not in self.heard:
            raise HostError(
                f"{type(module).__name__} computes attention by itself: it does not use transformers' attention interface, "
                "so that systems can neither see nor edit it"
            )

    # -- at work --------------------------------------------------------------------------------------------------

    def _around(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, refusing before any work what systems cannot follow."""

        @wraps(generate)  # its signature is read
        def generating(*args: Any, **kwargs: Any) -> Any:
            if not self.owner.second_streams.running:
                acting = [worker.system for worker in self.owner.workers if worker.stations]
                check_generation(self.owner.model, acting, kwargs)
                self.owner.second_streams.part_caches(given_cache(kwargs))
            return generate(*args, **kwargs)

        return generating

    def mask(self, call: Call, layer: int) -> Tensor | None:
        """The mask of a prompt's attention call as the systems want it, in the host's form; None: as it is.

        Made once per forward for every mask that the host uses (sliding layers have their own), whatever the layer.

        Raises:
            AttachError: tokens were dropped before this layer, so the host's mask is not the prompt's.
        """
        sequence = self.owner.sequences.current
        if not sequence.prefill or not any("mask" in w.stations for w in self.owner.workers):
            return None
        dropped = max(0, sequence.tokens.shape[1] - call.keys)  # by a sliding-window cache, from the front
        if sequence.cuts.depths[layer] is not None or layer in sequence.cuts.held:
            if any(w.system.slug for w in self.owner.workers if "mask" in w.stations):
                raise AttachError(
                    "a system that changes the mask and one that drops tokens inside the model cannot run together"
                )
            return None
        key = (id(call.mask), call.keys)
        if key not in sequence.masks:
            seen = sequence.tokens.shape[1] - dropped  # a static cache has more keys, still empty
            new = self.owner.thread("mask", "text", -1, F.pad(call.allowed()[..., :seen], (dropped, 0), value=False))
            new = new if new is None else F.pad(new[..., dropped:], (0, call.keys - seen), value=False)
            if new is not None and call.weights:  # the eager kernel adds its mask
                zero = torch.zeros((), dtype=call.query.dtype, device=new.device)
                new = torch.where(new, zero, torch.finfo(call.query.dtype).min)
            sequence.masks[key] = (call.mask, new)  # the host's mask lives as long as its id stands for it
        return sequence.masks[key][1]

    def _before(self, parameters: Any, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if (
            module.training
            and torch.is_grad_enabled()
            and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
        ):
            raise HostError(
                "gradient checkpointing runs layers again when the systems have gone: call "
                "model.gradient_checkpointing_disable() before training through systems"
            )
        given = parameters.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self.owner.given = given
        self.owner.sequences.begin(given)
        wanted = given.get("return_dict")
        self._tuples = not (getattr(module.config, "return_dict", True) if wanted is None else wanted)
        own = {"return_dict": True} if self._tuples else {}
        own |= self.owner.sequences.arguments(given)
        own |= self.owner.second_streams.join(self.owner.sequences.current, args, kwargs)
        return (args, {**kwargs, **own}) if own else None

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        sequence = self.owner.sequences.current
        if sequence is None or output is None:  # the forward failed
            self.owner.sequences.current = None
            return output
        cache = made_cache(output)
        try:
            self.owner.second_streams.part(sequence, output)
            if cache is not None:
                layers, heads = self.owner.shape.layers, self.owner.shape.heads
                if self.owner.cutter is not None:
                    self.owner.cutter.cache = cache
                self.owner.call("cache", "text", -1, layers, heads, cache)
            rows, last = torch.arange(len(output.logits), device=output.logits.device), self._last(output.logits)
            new = self.owner.thread("logits", "text", -1, output.logits[rows, last])
            if new is not None:
                output.logits = output.logits.clone()
                output.logits[rows, last] = new.to(output.logits.dtype)
            if not self.owner.second_streams.running and not sequence.stream:
                weighed = self.owner.second_streams.weigh(sequence, self.owner.given, output.logits, cache)
                output.logits = output.logits if weighed is None else weighed
                self.owner.given = {}
        finally:
            if self.owner.cutter is not None:
                self.owner.cutter.settle(cache)
            self.owner.sequences.finish(output)
        return output.to_tuple() if self._tuples else output

    def _last(self, logits: Tensor) -> Tensor | int:
        """Which position of logits (B, R, V) predicts the next token: the last that is not padding; (B,) or -1."""
        sequence = self.owner.sequences.current
        if not sequence.prefill or logits.shape[1] != sequence.queries:
            return -1
        return (last_real(sequence.tokens) - (sequence.tokens.shape[1] - sequence.queries)).clamp(min=0)

    def head(self, hidden: Tensor, norm: bool = False, mean: bool = False) -> Tensor:
        """Scores (B, V) of states (B, D), by the model's output head; `norm`: behind its last norm.

        `mean`: the mean of the scores of states (W, B, D) in one product, for the head is linear.
        """
        if norm:
            hidden = get(get(self.owner.model, self.owner.host.decoder), self.owner.host.norm)(hidden)
        if mean:
            hidden = hidden.float().mean(0)
        head = self.owner.model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))

    def _forget(self, module: nn.Module, args: tuple) -> None:
        self.owner.vision_states = [{} for _ in self.owner.systems]

    def _pixels(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        name = next(iter(signature(module.forward).parameters))
        value = args[0] if args else kwargs[name]
        new = self.owner.thread("pixels", "vision", -1, value)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    def _streams(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        sequence = self.owner.sequences.current
        if sequence is None or sequence.stream or sequence.step or sequence.queries != sequence.tokens.shape[1]:
            return
        if sequence.tokens.has_image and kwargs.get("inputs_embeds") is not None:
            run_streams(self.owner, module, kwargs)

    def _positions(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        sequence, embeddings = self.owner.sequences.current, kwargs.get("inputs_embeds")
        if sequence is None or embeddings is None:
            return None
        given = kwargs.get("position_ids")
        if given is None:
            start = sequence.tokens.shape[1] - sequence.queries
            given = torch.arange(start, start + sequence.queries, device=embeddings.device)
            given = given.expand(embeddings.shape[0], -1)
        axes = given[None] if given.ndim == 2 else given[-3:]  # a fourth row numbers the text, for packed sequences
        new = self.owner.thread("positions", "text", -1, axes)
        if new is None:
            return None
        new = new[0] if given.ndim == 2 else torch.cat([given[:-3], new])
        more = {"position_ids": new}
        if kwargs.get("attention_mask") is None and given_cache(kwargs) is None:
            more["attention_mask"] = embeddings.new_ones(embeddings.shape[:2], dtype=torch.long)  # else uneven places
        return args, {**kwargs, **more}  # would be read as packed sequences

    def _output(self, station: str, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.owner.sequences.current is None:
            return None
        several = isinstance(output, tuple)
        new = self.owner.thread(station, "text", layer, output[0] if several else output)
        return (new, *output[1:]) if several and new is not None else new

    def _hidden(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.owner.sequences.current is None:
            return None
        value = args[0] if args else kwargs["hidden_states"]
        new = self.owner.thread("hidden", "text", layer, value)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def _hook(module: nn.Module, hook: Any, undo: ExitStack, **options: Any) -> None:
    undo.callback(module.register_forward_pre_hook(hook, **options).remove)

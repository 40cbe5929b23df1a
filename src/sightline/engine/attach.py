"""`attach`: put systems on a model, and take them off again without a trace.

Doors used, all public: hooks on modules, and transformers' attention and mask interfaces. The model's forward code is
never touched. Entering changes, on this one model: `_attn_implementation` of the configs whose attention a system looks
at, one attribute on each of their attention modules, and hooks. Leaving undoes exactly these, also after an exception.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sightline.engine.attention import Call
from sightline.engine.compiled import run_uncompiled
from sightline.engine.cuts import Cutter, View
from sightline.engine.front import Front
from sightline.engine.seats import Seat, switch_attention
from sightline.engine.second import SecondStreams
from sightline.engine.sequences import Sequences, given_cache, made_cache
from sightline.engine.streams import last_real, run_streams
from sightline.engine.system import Shape, Site, System
from sightline.errors import AttachError, HostError, ParameterError, UnknownNameError, nearest
from sightline.hosts import Host, ViTHost, check, feature_layer, find, get, prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

MARK = "_sightline_attachment"
VISION = {"pixels", "vision_hidden", "vision_attention"}  # stations that plain vision transformers have, too
CUTTING = {"cut", "cache"}  # stations that may shorten what layers see


def attach(model: nn.Module, *systems: System, host: Host | ViTHost | None = None) -> Attachment:
    """Put systems on a model; they act in the given order until `detach(model)` or the end of the `with` block.

        with sl.attach(model, sl.steer.VAR()) as attached:
            model.generate(**inputs)
        attached.report()

    Args:
        model: a transformers vision-language model, or a plain vision transformer (transformers or timm).
        systems: what to put on it. With none, nothing changes.
        host: where the model keeps its parts, when its class is not a known host.

    Raises:
        AttachError: the model already carries systems, or two of the given ones conflict.
        HostError: the model's class is unknown, or lacks a part that a system needs.
        ParameterError: a system's parameters do not suit this model.
    """
    return Attachment(model, systems, host)


def detach(model: nn.Module) -> None:
    """Take off what `attach` put on; the model is then as before, bit for bit.

    Raises:
        AttachError: nothing is attached.
    """
    attached = model.__dict__.get(MARK)
    if attached is None:
        raise AttachError(f"nothing is attached to this {type(model).__name__}: call attach(model, ...) first")
    attached.close()


@dataclass
class _Worker:
    """A system at work on one model."""

    system: System
    setup: Any
    stations: frozenset[str]  # where it acts; empty when its parameters make it change nothing
    tally: dict[Any, Any] = field(default_factory=dict)


class Attachment:
    """Systems on a model. A context manager; `report()` also works after leaving."""

    def __init__(self, model: nn.Module, systems: tuple[System, ...], host: Host | ViTHost | None) -> None:
        _check(model, systems)
        self.model = model
        self.systems = systems
        self.host = host or find(model)
        check(model, self.host)
        for system in systems if not isinstance(self.host, Host) else ():
            own = set(System.stations(system))  # a class without a station in the tower has nothing to do here
            _require_vision(model, own if own.isdisjoint(VISION) else ())
        self.shape = shape_of(model, self.host)
        self.workers = [_worker(s, self.shape) for s in systems]
        self.front = Front(self)
        config, names = (
            getattr(model, "config", None),
            (getattr(self.host, n, None) for n in ("image_token", "video_token")),
        )
        self.sequences = Sequences(self, *(getattr(config, name or "", None) for name in names))
        self.second_streams = SecondStreams(self)
        self.given: dict[str, Any] = {}  # arguments of the forward now running
        self.vision_states: list[dict[Any, Any]] = [{} for _ in systems]
        self.heard: set[str] = set()  # towers whose attention has called a seat in the forward now running
        self.seats: list[Seat] = []  # at the decoder's attention, when a system needs them
        self.cutter: Cutter | None = None  # when a system may drop tokens inside the language model
        self._tuples = False  # whether this forward was asked for a tuple
        self._undo = ExitStack()
        try:
            self._enter()
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave. Safe to call twice."""
        self.second_streams.close()
        self._undo.close()

    def setup(self, slug: str) -> Any:
        """What a system prepared on entry, for example parameters to train; UnknownNameError when it is not attached."""
        for worker in self.workers:
            if worker.system.slug == slug:
                return worker.setup
        names = [w.system.slug for w in self.workers]
        raise UnknownNameError(f"{slug!r} is not attached: {nearest(slug, names)}")

    def report(self) -> dict[str, dict[str, Any]]:
        """What every system did since entry: {its name: plain numbers}."""
        return {w.system.slug: w.system.report(w.tally, w.setup) for w in self.workers if w.system.slug}

    # -- entering -----------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self.model.__dict__[MARK] = self
        self._undo.callback(self.model.__dict__.pop, MARK, None)
        used = {station for w in self.workers for station in w.stations}
        if "vision_attention" in used:
            self._take_seats("vision", self.tower_attention())
        if used:
            run_uncompiled(self._undo)
        text = used - VISION
        if (
            used and not text
        ):  # no sequence will ever take over what the tower's stations remember: every picture begins anew
            self._hook(get(self.model, self.host.tower), self._forget)
        if "pixels" in used:
            self._hook(get(self.model, self.host.tower), self._pixels, with_kwargs=True)
        if not isinstance(self.host, Host):
            _require_vision(self.model, text)
        if not text:
            return
        parameters = signature(self.model.forward)
        self._hook(self.model, partial(self._before, parameters), with_kwargs=True)
        handle = self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._undo.callback(handle.remove)
        decoder = get(self.model, self.host.decoder)
        self.front.enter(used, self._undo)
        if any(w.system.streams() for w in self.workers if w.stations):
            self._hook(decoder, self._streams, with_kwargs=True)
        if "positions" in text:
            self._hook(decoder, self._positions, with_kwargs=True)
        layers = list(get(decoder, self.host.layers))
        parts = {"mlp": [get(layer, self.host.mlp) for layer in layers] if "mlp" in text else [], "output": layers}
        for station in sorted(text & parts.keys()):
            for i, module in enumerate(parts[station]):
                handle = module.register_forward_hook(partial(self._output, station, i))
                self._undo.callback(handle.remove)  # before the cutter's, which puts dropped tokens back
        if not text.isdisjoint(CUTTING):
            rotary = get(decoder, self.host.rotary) if hasattr(decoder, self.host.rotary) else None
            deep = len(get(self.model.config, self.host.deepstack)) if self.host.deepstack else 0
            self.cutter = Cutter(self)
            self.cutter.enter(decoder, rotary, layers, deep, self._undo)
        if "hidden" in text:
            for i, layer in enumerate(layers):
                self._hook(layer, partial(self._hidden, i), with_kwargs=True)
        if text & {"attention", "mask"} or self.cutter is not None:
            self._take_seats("text", self.text_attention())

    def _take_seats(self, tower: str, modules: list[nn.Module]) -> None:
        fused = getattr(self.host, "fused", False)
        names = {} if fused else switch_attention(self.model, self._root(tower), modules, self._undo)
        for i, module in enumerate(modules):
            seat = Seat(self, tower, i, len(modules), plain=names.get(id(module), "fused"))
            seat.take(module, self._undo)
            if tower == "text":
                self.seats.append(seat)
        root = self._root(tower)
        self._hook(root, lambda *_: self.heard.discard(tower))
        self._undo.callback(root.register_forward_hook(partial(self._check_heard, tower)).remove)

    def _check_heard(self, tower: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Raise HostError when code of the host's own (remote code, say) never asked for its attention by name."""
        if tower not in self.heard:
            raise HostError(
                f"{type(module).__name__} computes attention by itself: it does not use transformers' attention interface, "
                "so that systems can neither see nor edit it"
            )

    def _hook(self, module: nn.Module, hook: Any, **options: Any) -> None:
        self._undo.callback(module.register_forward_pre_hook(hook, **options).remove)

    # -- parts of the model ---------------------------------------------------------------------------------------

    def text_attention(self) -> list[nn.Module]:
        """The self-attention module of every decoder layer."""
        layers = get(get(self.model, self.host.decoder), self.host.layers)
        return [get(layer, self.host.attention) for layer in layers]

    def tower_attention(self) -> list[nn.Module]:
        """The self-attention module of every layer of the vision tower."""
        layers = get(get(self.model, self.host.tower), self.host.tower_layers)
        return [get(layer, self.host.tower_attention) for layer in layers]

    def _root(self, tower: str) -> nn.Module:
        return get(self.model, self.host.decoder if tower == "text" else self.host.tower)

    # -- at work --------------------------------------------------------------------------------------------------

    def call(
        self, station: str, tower: str, layer: int, layers: int, heads: int, *args: Any, **facts: Any
    ) -> list[Any]:
        """Call a station of every system that has it, in attach order; returns what is not None. `facts`: of the site."""
        results = []
        for i, worker in enumerate(self.workers):
            if station not in worker.stations or not self._takes_part(worker, tower):
                continue
            site = self._site(i, worker, tower, layer, layers, heads)
            found = getattr(worker.system, station)(replace(site, **facts) if facts else site, *args)
            if found is not None:
                results.append(found)
        return results

    def each(self, station: str, tower: str, layer: int, value: Callable[[], Tensor]) -> Iterator[Any]:
        """What a station of every system returns for a value, one after the other; later ones see what became of it."""
        layers, heads = (self.shape.layers, self.shape.heads) if tower == "text" else (self.shape.tower_layers, 0)
        for i, worker in enumerate(self.workers):
            if station in worker.stations and self._takes_part(worker, tower):
                site = self._site(i, worker, tower, layer, layers, heads)
                found = getattr(worker.system, station)(site, value())
                if found is not None:
                    yield found

    def thread(self, station: str, tower: str, layer: int, value: Tensor) -> Tensor | None:
        """Pass a tensor through a station of every system in turn; None when none changed it."""
        changed = None
        for i, worker in enumerate(self.workers):
            if station not in worker.stations or not self._takes_part(worker, tower):
                continue
            layers, heads = (self.shape.layers, self.shape.heads) if tower == "text" else (0, 0)
            site = self._site(i, worker, tower, layer, layers, heads)
            found = getattr(worker.system, station)(site, value if changed is None else changed)
            changed = changed if found is None else found
        return changed

    def _takes_part(self, worker: _Worker, tower: str) -> bool:
        """Whether a system acts in the run now going on: an extra run is for those that asked for it."""
        sequence = self.sequences.current
        if tower == "vision" or sequence is None or not sequence.stream:
            return True
        return worker.system.everywhere or sequence.stream in worker.system.streams()

    def mask(self, call: Call, layer: int) -> Tensor | None:
        """The mask of a prompt's attention call as the systems want it, in the host's form; None: as it is.

        Made once per forward for every mask that the host uses (sliding layers have their own), whatever the layer.

        Raises:
            AttachError: tokens were dropped before this layer, so the host's mask is not the prompt's.
        """
        sequence = self.sequences.current
        if not sequence.prefill or not any("mask" in w.stations for w in self.workers):
            return None
        dropped = max(0, sequence.tokens.shape[1] - call.keys)  # by a sliding-window cache, from the front
        if sequence.cuts.depths[layer] is not None or layer in sequence.cuts.held:
            if any(w.system.slug for w in self.workers if "mask" in w.stations):
                raise AttachError(
                    "a system that changes the mask and one that drops tokens inside the model cannot run together"
                )
            return None
        key = (id(call.mask), call.keys)
        if key not in sequence.masks:
            seen = sequence.tokens.shape[1] - dropped  # a static cache has more keys, still empty
            new = self.thread("mask", "text", -1, F.pad(call.allowed()[..., :seen], (dropped, 0), value=False))
            new = new if new is None else F.pad(new[..., dropped:], (0, call.keys - seen), value=False)
            if new is not None and call.weights:  # the eager kernel adds its mask
                zero = torch.zeros((), dtype=call.query.dtype, device=new.device)
                new = torch.where(new, zero, torch.finfo(call.query.dtype).min)
            sequence.masks[key] = (call.mask, new)  # the host's mask lives as long as its id stands for it
        return sequence.masks[key][1]

    def site(self, worker: int) -> Site:
        """The site of a worker outside the layers."""
        return self._site(worker, self.workers[worker], "text", -1, self.shape.layers, self.shape.heads)

    def _site(self, i: int, worker: _Worker, tower: str, layer: int, layers: int, heads: int) -> Site:
        sequence = self.sequences.current
        if (
            sequence is None or tower == "vision"
        ):  # `generate` encodes pictures before the sequence they belong to begins
            state, running = self.vision_states[i] if sequence is None else sequence.states[i], self.front.running
            seen = {} if running is None else running.notes[i]
            return Site(
                tower,
                layer,
                layers,
                heads,
                None,
                0,
                0,
                True,
                0,
                state,
                worker.setup,
                worker.tally,
                seen,
                running,
                second=self.second_streams.running,
            )
        tokens, queries = sequence.tokens, sequence.queries
        depth = sequence.cuts.depths[layer] if layer >= 0 else None
        if depth is not None:
            tokens, queries = depth.tokens, depth.queries(queries)
        return Site(
            tower,
            layer,
            layers,
            heads,
            tokens,
            tokens.shape[1] - queries,
            queries,
            sequence.prefill,
            sequence.step,
            sequence.states[i],
            worker.setup,
            worker.tally,
            {} if sequence.pictures is None else sequence.pictures.notes[i],
            sequence.pictures,
            whole=sequence.tokens,
            columns=None if depth is None else depth.column,
            labels=sequence.labels_here,
            cuts=None if self.cutter is None else View(self.cutter, layer),
            stream=sequence.stream,
            head=self._head,
            second=sequence.second,
        )

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
        self.given = given
        self.sequences.begin(given)
        wanted = given.get("return_dict")
        self._tuples = not (getattr(module.config, "return_dict", True) if wanted is None else wanted)
        own = {"return_dict": True} if self._tuples else {}
        own |= self.sequences.arguments(given)
        own |= self.second_streams.join(self.sequences.current, args, kwargs)
        return (args, {**kwargs, **own}) if own else None

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        sequence = self.sequences.current
        if sequence is None or output is None:  # the forward failed
            self.sequences.current = None
            return output
        cache = made_cache(output)
        try:
            self.second_streams.part(sequence, output)
            if cache is not None:
                layers, heads = self.shape.layers, self.shape.heads
                if self.cutter is not None:
                    self.cutter.cache = cache
                self.call("cache", "text", -1, layers, heads, cache)
            rows, last = torch.arange(len(output.logits), device=output.logits.device), self._last(output.logits)
            new = self.thread("logits", "text", -1, output.logits[rows, last])
            if new is not None:
                output.logits = output.logits.clone()
                output.logits[rows, last] = new.to(output.logits.dtype)
            if not self.second_streams.running and not sequence.stream:
                weighed = self.second_streams.weigh(sequence, self.given, output.logits, cache)
                output.logits = output.logits if weighed is None else weighed
                self.given = {}
        finally:
            if self.cutter is not None:
                self.cutter.settle(cache)
            self.sequences.finish(output)
        return output.to_tuple() if self._tuples else output

    def _last(self, logits: Tensor) -> Tensor | int:
        """Which position of logits (B, R, V) predicts the next token: the last that is not padding; (B,) or -1."""
        sequence = self.sequences.current
        if not sequence.prefill or logits.shape[1] != sequence.queries:
            return -1
        return (last_real(sequence.tokens) - (sequence.tokens.shape[1] - sequence.queries)).clamp(min=0)

    def _head(self, hidden: Tensor, norm: bool = False) -> Tensor:
        """Scores (B, V) of states (B, D), by the model's output head; `norm`: behind its last norm."""
        if norm:
            hidden = get(get(self.model, self.host.decoder), self.host.norm)(hidden)
        head = self.model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))

    def _forget(self, module: nn.Module, args: tuple) -> None:
        self.vision_states = [{} for _ in self.systems]

    def _pixels(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        name = next(iter(signature(module.forward).parameters))
        value = args[0] if args else kwargs[name]
        new = self.thread("pixels", "vision", -1, value)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    def _streams(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        sequence = self.sequences.current
        if sequence is None or sequence.stream or sequence.step or sequence.queries != sequence.tokens.shape[1]:
            return
        if sequence.tokens.has_image and kwargs.get("inputs_embeds") is not None:
            run_streams(self, module, kwargs)

    def _positions(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        sequence, embeddings = self.sequences.current, kwargs.get("inputs_embeds")
        if sequence is None or embeddings is None:
            return None
        given = kwargs.get("position_ids")
        if given is None:
            start = sequence.tokens.shape[1] - sequence.queries
            given = torch.arange(start, start + sequence.queries, device=embeddings.device)
            given = given.expand(embeddings.shape[0], -1)
        axes = given[None] if given.ndim == 2 else given[-3:]  # a fourth row numbers the text, for packed sequences
        new = self.thread("positions", "text", -1, axes)
        if new is None:
            return None
        new = new[0] if given.ndim == 2 else torch.cat([given[:-3], new])
        more = {"position_ids": new}
        if kwargs.get("attention_mask") is None and given_cache(kwargs) is None:
            more["attention_mask"] = embeddings.new_ones(embeddings.shape[:2], dtype=torch.long)  # else uneven places
        return args, {**kwargs, **more}  # would be read as packed sequences

    def _output(self, station: str, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.sequences.current is None:
            return None
        several = isinstance(output, tuple)
        new = self.thread(station, "text", layer, output[0] if several else output)
        return (new, *output[1:]) if several and new is not None else new

    def _hidden(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.sequences.current is None:
            return None
        value = args[0] if args else kwargs["hidden_states"]
        new = self.thread("hidden", "text", layer, value)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def _require_vision(model: nn.Module, text: Iterable[str]) -> None:
    if text:
        raise HostError(f"{type(model).__name__} has no language model: stations {sorted(text)} do not exist there")


def _worker(system: System, shape: Shape) -> _Worker:
    setup = system.prepare(shape)
    return _Worker(system, setup, frozenset() if system.idle() else frozenset(system.stations()))


def shape_of(model: nn.Module, host: Host | ViTHost) -> Shape:
    """The plain facts about a model that systems may ask for."""
    layers = len(get(get(model, host.tower), host.tower_layers))
    tower = {
        "tower_layers": layers,
        "tower_prefix": prefix(model, host),
        "feature_layer": feature_layer(model, host),
        "merged": getattr(host, "merged", False),
        "tiled": getattr(host, "views", None) is not None and getattr(host, "tower_order", None) is None,
    }
    if not isinstance(host, Host):
        return Shape("", layers, 0, 0, 0, first_states=lambda: torch.zeros(layers, 0), **tower)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        config.model_type,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        config.hidden_size,
        first_states=partial(first_states, model, host),
        input_norm=lambda layer, states: get(_layer(model, host, layer), host.input_norm)(states),
        key_value=lambda layer: tuple(get(_layer(model, host, layer), f"{host.attention}.{n}") for n in host.key_value),
        **tower,
    )


def _layer(model: nn.Module, host: Host, layer: int) -> nn.Module:
    return get(get(model, host.decoder), host.layers)[layer]


def _check(model: nn.Module, systems: tuple[System, ...]) -> None:
    for system in systems:
        if not isinstance(system, System):
            raise ParameterError(
                f"attach(model, *systems): {system!r} is not a system; see `sightline list` for all of them"
            )
    if MARK in model.__dict__:
        names = "+".join(s.slug or type(s).__name__ for s in model.__dict__[MARK].systems) or "none"
        raise AttachError(
            f"this model already carries [{names}]: leave that first, or give all systems to one attach(...)"
        )
    if any("_sightline" in m.__dict__ or MARK in m.__dict__ for m in model.modules()):
        raise AttachError("a part of this model already carries systems: detach them from that part first")
    for i, first in enumerate(systems):
        for second in systems[i + 1 :]:
            why = first.conflicts(second) or second.conflicts(first)
            if why:
                raise AttachError(f"{first.slug or first!r} and {second.slug or second!r} cannot run together: {why}")


def first_states(model: nn.Module, host: Host) -> Tensor:
    """(L, D) fp32: the state of the start token as it enters every decoder layer.

    The first token sees only itself, so a sequence of one token is enough.
    """
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)
    ids = [config.bos_token_id, getattr(generation, "bos_token_id", None), config.pad_token_id, 0]
    start = next(i for i in ids if i is not None)
    decoder = get(model, host.decoder)
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0, 0].float())

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in get(decoder, host.layers)]
    try:
        with torch.no_grad():
            decoder(
                input_ids=torch.tensor([[start]], device=decoder.get_input_embeddings().weight.device), use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([s.to(states[0].device) for s in states])

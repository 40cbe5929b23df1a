"""`attach`: put systems on a model, and take them off again without a trace.

Doors used, all public: hooks on modules, and transformers' attention and mask interfaces. The model's forward code is
never touched. Entering changes, on this one model: `_attn_implementation` of the configs whose attention a system looks
at, one attribute on each of their attention modules, and hooks. Leaving undoes exactly these, also after an exception.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import proxy

from sightline.engine.checks import MARK, check_free, check_host, check_model, check_systems, require_vision
from sightline.engine.cuts import Cutter, View
from sightline.engine.doors import VISION, Doors
from sightline.engine.front import Front
from sightline.engine.seats import Seat
from sightline.engine.second import SecondStreams
from sightline.engine.sequences import Sequences
from sightline.engine.shape import shape_of
from sightline.engine.system import Shape, Site, System
from sightline.errors import AttachError, UnknownNameError, nearest
from sightline.hosts import Host, ViTHost, check, find, get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn


def attach(model: nn.Module, *systems: System, host: Host | ViTHost | None = None) -> Attachment:
    """Put systems on a model; they act in the given order until `detach(model)` or the end of the `with` block.

        lvlm = sl.load("tiny")                       # or any transformers model and its own inputs
        inputs = lvlm.inputs("photo.jpg", "Is there a dog?")
        with sl.attach(lvlm.model, sl.steer.VAR(p=0.4)) as attached:
            ids = lvlm.model.generate(**inputs, max_new_tokens=32)
        attached.report()                            # {"var": {"rows_edited": ...}}

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
        check_model(model)
        check_systems(systems)
        check_free(model)
        check_host(host)
        self.model = model
        self.systems = systems
        self.host = host or find(model)
        check(model, self.host)
        for system in systems if not isinstance(self.host, Host) else ():
            own = set(System.stations(system))  # a class without a station in the tower has nothing to do here
            require_vision(model, own if own.isdisjoint(VISION) else ())
        self.shape = shape_of(model, self.host)
        self.workers = [_worker(s, self.shape) for s in systems]
        # Its parts know it without keeping it alive: it is gone with its last user, not with the collector.
        me = proxy(self)
        self.front = Front(me)
        self.doors = Doors(me)
        config = getattr(model, "config", None)
        tokens = (getattr(self.host, name, None) for name in ("image_token", "video_token"))
        self.sequences = Sequences(me, *(getattr(config, name or "", None) for name in tokens))
        self.second_streams = SecondStreams(me)
        self.given: dict[str, Any] = {}  # arguments of the forward now running
        self.vision_states: list[dict[Any, Any]] = [{} for _ in systems]
        self.seats: list[Seat] = []  # at the decoder's attention, when a system needs them
        self.cutter: Cutter | None = None  # when a system may drop tokens inside the language model
        self._undo = ExitStack()
        try:
            model.__dict__[MARK] = self
            self._undo.callback(model.__dict__.pop, MARK, None)
            self.doors.enter({station for w in self.workers for station in w.stations}, self._undo)
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Attachment:
        if self.model.__dict__.get(MARK) is not self:
            raise AttachError(f"{self!r}: call attach(model, ...) again to put systems on once more")
        return self

    def __repr__(self) -> str:
        names = "+".join(s.slug or type(s).__name__ for s in self.systems) or "no system"
        state = "on" if self.model.__dict__.get(MARK) is self else "taken off"
        return f"<{names} {state} {type(self.model).__name__}>"

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

    # -- parts of the model ---------------------------------------------------------------------------------------

    def text_attention(self) -> list[nn.Module]:
        """The self-attention module of every decoder layer."""
        layers = get(get(self.model, self.host.decoder), self.host.layers)
        return [get(layer, self.host.attention) for layer in layers]

    def tower_attention(self) -> list[nn.Module]:
        """The self-attention module of every layer of the vision tower."""
        layers = get(get(self.model, self.host.tower), self.host.tower_layers)
        return [get(layer, self.host.tower_attention) for layer in layers]

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
        now, changed = [value], False
        for found in self.each(station, tower, layer, lambda: now[0]):
            now[0], changed = found, True
        return now[0] if changed else None

    def _takes_part(self, worker: _Worker, tower: str) -> bool:
        """Whether a system acts in the run now going on: an extra run is for those that asked for it."""
        sequence = self.sequences.current
        if tower == "vision" or sequence is None or not sequence.stream:
            return True
        return worker.system.everywhere or sequence.stream in worker.system.streams()

    def site(self, worker: int) -> Site:
        """The site of a worker outside the layers."""
        return self._site(worker, self.workers[worker], "text", -1, self.shape.layers, self.shape.heads)

    def _site(self, i: int, worker: _Worker, tower: str, layer: int, layers: int, heads: int) -> Site:
        sequence = self.sequences.current
        common = {"setup": worker.setup, "tally": worker.tally}
        if sequence is None or tower == "vision":  # `generate` encodes pictures before their sequence begins
            running = self.front.running
            return Site(
                tower, layer, layers, heads, None, 0, 0, True, 0,
                state=self.vision_states[i] if sequence is None else sequence.states[i],
                seen={} if running is None else running.notes[i],
                pictures=running,
                second=self.second_streams.running,
                **common,
            )  # fmt: skip
        tokens, queries = sequence.tokens, sequence.queries
        depth = sequence.cuts.depths[layer] if layer >= 0 else None
        if depth is not None:
            tokens, queries = depth.tokens, depth.queries(queries)
        start = tokens.shape[1] - queries
        return Site(
            tower, layer, layers, heads, tokens, start, queries, sequence.prefill, sequence.step,
            state=sequence.states[i],
            seen={} if sequence.pictures is None else sequence.pictures.notes[i],
            pictures=sequence.pictures,
            whole=sequence.tokens,
            columns=None if depth is None else depth.column,
            labels=sequence.labels_here,
            cuts=None if self.cutter is None else View(self.cutter, layer),
            stream=sequence.stream,
            head=self.doors.head,
            second=sequence.second,
            **common,
        )  # fmt: skip


def _worker(system: System, shape: Shape) -> _Worker:
    setup = system.prepare(shape)
    return _Worker(system, setup, frozenset() if system.idle() else frozenset(system.stations()))

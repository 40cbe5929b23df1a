"""Toy systems: a station each, as a plain function, and a watcher that writes down every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sightline.engine.attention import Edit, Probe
from sightline.engine.system import STATIONS, Site, System
from sightline.engine.tokens import Role


def toy(prepare: Callable | None = None, name: str = "", **stations: Callable) -> System:
    """A system of its own class: `toy(logits=lambda site, x: x + 1)`."""

    def method(function: Callable) -> Callable:
        return lambda self, *args: function(*args)

    members: dict[str, Any] = {station: method(function) for station, function in stations.items()}
    if prepare is not None:
        members["prepare"] = method(prepare)
    return type("Toy", (System,), {"slug": name, "drafts": True, **members})()


def nothing(without: str = "") -> System:
    """Has all stations, or all but one, and asks for nothing."""
    return toy(**dict.fromkeys((name for name in STATIONS if name != without), lambda *args: None))


def watcher(events: list[dict[str, Any]], stations: tuple[str, ...] = STATIONS) -> System:
    """Writes down every call of a station, and changes nothing."""

    def watch(station: str) -> Callable:
        def call(site: Site, value: Any = None) -> None:
            events.append(
                {
                    "station": station,
                    "tower": site.tower,
                    "layer": site.layer,
                    "layers": site.layers,
                    "heads": site.heads,
                    "start": site.start,
                    "queries": site.queries,
                    "prefill": site.prefill,
                    "step": site.step,
                    "state": site.state,
                    "ledger": None if site.tokens is None else site.tokens,
                    "shape": tuple(value.shape) if isinstance(value, Tensor) else None,
                }
            )

        return call

    return toy(**{station: watch(station) for station in stations})


def weigh(factor: float = 3.0, role: Role = Role.IMAGE, layers: tuple[int, ...] = (1, 2), name: str = "") -> System:
    """Every query of these layers gives keys of a role `factor` times the attention; rows no longer sum to one."""

    def attention(site: Site) -> Edit | None:
        if site.layer not in layers:
            return None
        groups = site.tokens.where(role)[..., None].float()
        return Edit(groups=groups, factors=lambda masses, first: torch.full_like(masses, factor))

    return toy(attention=attention, name=name)


def lean(amount: float = 2.0, role: Role = Role.IMAGE, layers: tuple[int, ...] = (1, 2)) -> System:
    """The same by a bias on the logits; rows sum to one."""

    def attention(site: Site) -> Edit | None:
        if site.layer not in layers:
            return None
        return Edit(bias=amount * site.tokens.where(role)[:, None, None].float())

    return toy(attention=attention)


def look(see: Callable[[Site, Tensor, int], None], station: str = "attention") -> System:
    """Hands every row of attention to `see(site, weights, first row)`."""
    return toy(**{station: lambda site: Probe(lambda weights, first: see(site, weights, first))})

"""Test settings of every system that is attached to a model: adding a system is one line here, the matrix does the rest."""

from __future__ import annotations

from dataclasses import dataclass

from sightline.engine.system import System
from sightline.steer.var import VAR


@dataclass(frozen=True)
class Case:
    """How to try a system on tiny random models."""

    active: System  # parameters with which it acts on random weights
    idle: System  # parameters with which it changes nothing
    refused_by: tuple[str, ...] = ()  # tiny hosts that cannot run it, and must say so
    text_too: bool = False  # it also acts on a prompt without a picture


CASES: dict[str, Case] = {
    "var": Case(VAR(sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False), VAR(p=1.0)),
}

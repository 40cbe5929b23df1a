"""Test settings of every system that is attached to a model: adding a system is one line here, the matrix does the rest."""

from __future__ import annotations

from dataclasses import dataclass

from sightline.engine.system import System
from sightline.prune import VTCCLS, FlowCut, FoPru, HiRED, Random
from sightline.steer.var import VAR


@dataclass(frozen=True)
class Case:
    """How to try a system on tiny random models."""

    active: System  # parameters with which it acts on random weights
    idle: System  # parameters with which it changes nothing
    refused_by: tuple[str, ...] = ()  # tiny hosts that cannot run it, and must say so
    text_too: bool = False  # it also acts on a prompt without a picture
    coupled: bool = False  # pictures encoded together share a decision, so that a batch is not its rows
    chooses: bool = False  # it keeps the best of something: rounding may choose otherwise


NO_CLS = (
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "gemma3",
    "gemma3_pan_and_scan",
)


CASES: dict[str, Case] = {
    "flowcut": Case(FlowCut(9), FlowCut(None), (*NO_CLS, "internvl"), coupled=True, chooses=True),
    "fopru": Case(FoPru(0.3), FoPru(1.0), chooses=True),
    "hired": Case(HiRED(0.3), HiRED(1.0), NO_CLS, chooses=True),
    "random": Case(Random(0.3), Random(1.0)),
    "var": Case(VAR(sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False), VAR(p=1.0)),
    "vtc-cls": Case(VTCCLS(5), VTCCLS(None), NO_CLS, chooses=True),
}

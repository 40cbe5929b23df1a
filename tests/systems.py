"""Test settings of every system that is attached to a model: adding a system is one line here, the matrix does the rest."""

from __future__ import annotations

from dataclasses import dataclass

from sightline.decode import AGLA, DAMRO, LQCD, VDGD, VASparse
from sightline.engine.system import System
from sightline.prune import (
    H2O,
    VTCCLS,
    DyVTE,
    FlowCut,
    FoPru,
    HiRED,
    MustDrop,
    PyramidDrop,
    QuoTA,
    Random,
    SlowFast,
    ZipVL,
)
from sightline.steer.aki_mma import AKIMMA
from sightline.steer.cca import CCA
from sightline.steer.dual_stream_emphasis import DualStreamEmphasis
from sightline.steer.moh_llm import MoHLLM
from sightline.steer.var import VAR
from sightline.steer.vhr import VHR
from sightline.steer.vista import VISTA


@dataclass(frozen=True)
class Case:
    """How to try a system on tiny random models."""

    active: System  # parameters with which it acts on random weights
    idle: System  # parameters with which it changes nothing
    refused_by: tuple[str, ...] = ()  # tiny hosts that cannot run it, and must say so
    text_too: bool = False  # it also acts on a prompt without a picture
    coupled: bool = False  # pictures encoded together share a decision, so that a batch is not its rows
    chooses: bool = False  # it keeps the best of something: rounding may choose otherwise
    late: bool = False  # a prompt's own scores stay; it acts on what is generated
    ties: bool = False  # many answers score alike, so that rounding decides among beams


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


LANGUAGE = {"merge_threshold": None, "keep_rate": 0.0}  # MustDrop without its stage in the tower, for every host

CASES: dict[str, Case] = {
    "flowcut": Case(
        FlowCut(9),
        FlowCut(None),
        (*(name for name in NO_CLS if name not in ("qwen2_vl", "qwen2_5_vl")), "internvl"),  # these need no class token
        coupled=True,
        chooses=True,
    ),
    "fopru": Case(FoPru(0.3), FoPru(1.0), chooses=True),
    "h2o": Case(H2O(0.1, 0.1), H2O(0.5, 0.5), text_too=True, chooses=True, late=True),
    "hired": Case(HiRED(0.3), HiRED(1.0), NO_CLS, chooses=True),
    "random": Case(Random(0.3), Random(1.0)),
    "dyvte": Case(DyVTE(exit_layer=1), DyVTE(exit_layer=-1)),
    "mustdrop": Case(
        MustDrop(tau_g=0.05, tau_i=0.5, prune_layers=(0, 1), **LANGUAGE),
        MustDrop(tau_g=0.0, prune_layers=(0, 1), **LANGUAGE),
        chooses=True,
    ),
    "pyramiddrop": Case(
        PyramidDrop((1, 2), (0.5, 0.25)), PyramidDrop(image_token_ratio_list=(1.0, 1.0, 1.0)), chooses=True
    ),
    "zipvl": Case(ZipVL(tau=0.9, recent=8, random=8), ZipVL(tau=1.0, cache_mode="keep"), text_too=True, chooses=True),
    "quota": Case(QuoTA(enhance_tokens=5, enhance_total=1), QuoTA(enhance_total=0)),
    "slow-fast": Case(SlowFast(spatial_stride=2), SlowFast(temporal_stride=1, pooling_stride=1)),
    "agla": Case(AGLA(alpha=2.0, beta=0.0, ratio=0.3), AGLA(alpha=0.0, beta=0.0)),
    "damro": Case(DAMRO(alpha=2.0, topk=3, beta=0.0), DAMRO(alpha=0.0, beta=0.0), refused_by=NO_CLS),
    "lqcd": Case(LQCD(alpha=2.0, beta=0.0, lead="Yes."), LQCD(alpha=0.0, beta=0.0), text_too=True),
    "vasparse": Case(
        VASparse(alpha=1.0, beta=0.0, penalty=0.5, sparse_layer=1),
        VASparse(mask_rate=1.0, beta=0.0, penalty=0.0),
        chooses=True,
    ),
    "vdgd": Case(VDGD(alpha=0.0, description_tokens=4), VDGD(description_tokens=0), ties=True),
    "var": Case(VAR(sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False), VAR(p=1.0)),
    "vtc-cls": Case(VTCCLS(5), VTCCLS(None), NO_CLS, chooses=True),
    "moh-llm": Case(
        MoHLLM(shared=0.5, routed=0.25),
        MoHLLM(shared=0.75, routed=0.25),
        ("gemma3", "gemma3_pan_and_scan", "qwen3_vl"),
        text_too=True,
        chooses=True,
    ),
    "vhr": Case(VHR(alpha=3.0), VHR(alpha=1.0), chooses=True),
    "vista": Case(VISTA(lam=0.6), VISTA(lam=0.0, logits_alpha=0.0)),
    "dual-stream-emphasis": Case(
        DualStreamEmphasis(alpha=3.0, beta=2.0, first_layer=0),
        DualStreamEmphasis(alpha=0.0, beta=0.0),
        NO_CLS,
        chooses=True,
    ),
    "cca": Case(CCA(trained=True), CCA(positions_by_ring=False, mask_by_ring=False)),
    "aki-mma": Case(AKIMMA(trained=True), AKIMMA(question=0)),
}

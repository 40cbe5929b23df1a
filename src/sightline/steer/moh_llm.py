"""MoH: Multi-Head Attention as Mixture-of-Head Attention, the form without a router, in any decoder.

ICML 2025, arXiv 2410.11842. Official code: SkyworkAI/MoH (Apache-2.0), its LLaMA3 inference code. The trained form is the mixer
`sightline.mix.moh`.

Of H heads the first S = floor(shared H) are always on; of the others every token picks the R = floor(routed H) whose query is
longest. Heads that a token did not pick contribute nothing to it:

    on_h(t)  = 1 for h < S, else 1 if ||q_h(t)|| is among the R largest of heads S ... H-1       (B, H, Q)
    out(t)   = W_o concat_h(on_h(t) softmax(q_h k^T) v_h)

Published models were trained on with these gates; in a model that was not, this is ablation by the query's norm. Differences from
the official code: norms are ranked as they are (it divides by their deviation, which is 0 for equal norms and gives NaN); queries are
read after the rotary embedding, which keeps their norm; decoders that normalise queries themselves are refused (all lengths would be
nearly equal). Cost: the norms. All heads are computed, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sightline.catalog import check_parameters, param, system
from sightline.engine.attention import Edit
from sightline.engine.system import Shape, Site, System
from sightline.errors import HostError, ParameterError
from sightline.mix.moh import PAPER, norm_gates

NORMED = ("gemma3", "gemma4", "qwen3", "olmo2", "olmo3", "cohere2", "hunyuan")  # beginnings of model types


@system(
    "moh-llm",
    kind="steer",
    paper=PAPER,
    summary="every token keeps some shared heads and the others with the longest queries",
    needs=(),
    published=(("LLaMA3-8B, mean of 14 benchmarks, 75 % of the heads (paper)", "61.6 -> 64.0"),),
)
@dataclass(frozen=True)
class MoHLLM(System):
    """Mixture of heads in a decoder, gated by the norm of the queries. No router, no training here."""

    shared: float = param(0.5, "share of the heads that are always on, the first ones", low=0, high=1)
    routed: float = param(0.25, "share of the heads that a token picks among the others", low=0, high=1)

    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.shared + self.routed >= 1

    def prepare(self, shape: Shape) -> tuple[int, int]:
        """(S, R). HostError for a decoder that normalises the queries of every head: their lengths say nothing."""
        if shape.model_type.startswith(NORMED):
            raise HostError(
                f"moh-llm picks heads by the length of their queries, and {shape.model_type} normalises these: "
                "choose a model that does not, such as LLaVA, Qwen2.5-VL or Idefics3"
            )
        shared, routed = int(self.shared * shape.heads), int(self.routed * shape.heads)
        if shared + routed < 1:
            raise ParameterError(
                f"MoHLLM: shared={self.shared} and routed={self.routed} leave none of {shape.heads} heads: choose larger shares"
            )
        return shared, routed

    def attention(self, site: Site) -> Edit | None:
        shared, routed = site.setup
        if shared + routed >= site.heads:
            return None
        gates = norm_gates(site.call.query.transpose(1, 2), shared, routed)  # (B, Q, H)
        site.tally["heads"] = shared + routed, site.heads
        return Edit(gain=gates.transpose(1, 2))

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        active, heads = tally.get("heads", (0, 0))
        return {"heads on per token": active, "heads": heads}

"""Experiment 5: variants of VAR. Without its head test, with its budget given elsewhere, with other strengths.

    A'_qj = p A_qj                              j a sink
    A'_qj = A_qj (1 + (1-p) sum_S A_q / sum_T A_q)     j in T: the receivers

T is the visual tokens that are not sinks (VAR), the text that is not a sink, or both.

Source: the ablations of "See What You Are Told", arXiv 2503.03321 (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from sightline.explain.scoring import Reply, ask
from sightline.steer.var import VAR, edited_rows

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.attention import Edit
    from sightline.engine.system import Site, System
    from sightline.explain.questions import Item
    from sightline.lvlm import LVLM

SWEEP = (0.0, 0.2, 0.4, 0.8)  # beside VAR's own 0.6


@dataclass(frozen=True)
class Redirect(VAR):
    """VAR with another receiver of the sinks' attention. With `to="visual"` it is VAR. Not a published system."""

    to: Literal["visual", "text", "all"] = "visual"
    slug = ""

    def attention(self, site: Site) -> Edit | None:
        edit = super().attention(site)
        if edit is None:
            return None
        count = site.state[site.layer, "visual"]

        def choose(masses: Tensor, first: int) -> Tensor:
            return redirect(masses, count, p=self.p, rho=1 - self.min_nonsink_ratio, summ=self.summ, to=self.to)

        return replace(edit, groups=self._groups(site), factors=choose)

    def _groups(self, site: Site) -> Tensor:
        """(B, N, 4): VAR's three groups, and all text that is no sink, generated tokens too."""
        known = site.state[site.layer, "groups"]
        known = F.pad(known, (0, 0, 0, site.tokens.shape[1] - known.shape[1]))
        rest = known.sum(-1) == 0  # padding too: nobody attends it
        return torch.cat([known, rest[..., None].to(known.dtype)], -1)


def redirect(masses: Tensor, n_visual: Tensor | int, *, p: float, rho: float, summ: float, to: str) -> Tensor:
    """Factors for the keys of (visual non-sinks, visual sinks, text sinks, other text), from their masses (..., 4).

    n_visual, p, rho, summ: as in `sightline.steer.var.factors`. to: "visual", "text" or "all".
    """
    visual, visual_sinks, text_sinks, text = masses.unbind(-1)
    receivers = {"visual": visual, "text": text, "all": visual + text}[to]
    chosen = edited_rows(visual + visual_sinks, visual_sinks, n_visual, rho=rho, summ=summ) & (receivers > 0)
    given = 1 + (1 - p) * (visual_sinks + text_sinks) / torch.where(receivers > 0, receivers, torch.ones_like(visual))
    kept, same = torch.full_like(visual, p), torch.ones_like(visual)
    scale = torch.stack([same if to == "text" else given, kept, kept, same if to == "visual" else given], -1)
    return torch.where(chosen[..., None], scale, torch.ones_like(scale))


def variants(
    tau: float | None = None, sink_dims: tuple[int, ...] | None = None, sweep: Sequence[float] = SWEEP
) -> dict[str, tuple[System, ...]]:
    """{name: systems}: the plain model, VAR, and its variants."""
    base = {"tau": tau, "sink_dims": sink_dims}
    return {
        "none": (),
        "var": (VAR(**base),),
        "no head selection": (VAR(min_nonsink_ratio=0, summ=0, **base),),
        "budget to text": (Redirect(to="text", **base),),
        "budget to all": (Redirect(to="all", **base),),
        **{f"p={p:g}": (VAR(p=p, **base),) for p in sweep},
    }


def ablations(
    lvlm: LVLM,
    items: Sequence[Item],
    *,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
    sweep: Sequence[float] = SWEEP,
) -> dict[str, list[Reply]]:
    """Answers of one batch of questions under every variant; the plain model is "none".

    Args:
        lvlm: a loaded model. items: the questions.
        tau, sink_dims: as in VAR. sweep: further values of p.
    """
    parts = [i.scene.image for i in items], [i.text for i in items], [i.answer for i in items]
    return {name: ask(lvlm, *parts, systems) for name, systems in variants(tau, sink_dims, sweep).items()}

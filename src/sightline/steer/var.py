"""See What You Are Told: Visual Attention Sink in Large Multimodal Models (VAR: visual attention redistribution).

ICLR 2025, arXiv 2503.03321. Official code: seilk/VisAttnSink (Apache-2.0).

Some visual tokens get large attention from every text token although they show background: visual sinks, known by huge
values in the few dimensions D_sink of the residual stream. VAR takes a share of what all sinks get and gives it to the
other visual tokens, in the heads that look at the image:

    phi(x)   = max_{d in D_sink} |x_d| / sqrt(mean_k x_k^2 + 1e-6)      input of layer l, before its norm   (B, N)
    S        = {j : phi(x_j) > tau},  VS = S ∩ I,  TS = S \\ I           I: visual tokens
    sigma_q  = sum_{j in I} A_qj                                        A (B, H, Q, K) after softmax
    rho_q    = sum_{j in VS} A_qj / sum_{j in I} (A_qj + 1e-6)
    row q of a head is edited iff VS is not empty, sigma_q >= summ and rho_q <= 1 - min_nonsink_ratio:
    A'_qj    = p A_qj                                                   j in VS ∪ TS
    A'_qj    = A_qj (1 + (1-p) sum_{VS ∪ TS} A_q / sum_{I \\ VS} A_q)    j in I \\ VS

Where: layers 2 .. L-2 (0-based); queries after the image at prefill, every new query at decode. Sinks are found on prompt
tokens only; each layer has its own.

Against the official code: (1) it tests the sink share <= rho, the paper the non-sink ratio >= rho; here the paper's
form, named `min_nonsink_ratio` (equal at 0.5). (2) It edits the last layer although paper and configuration say not to:
`skip_last_layer=False` does the same. (3) It keeps the sinks of the first sample of a process for all later ones and
then edits rows before the image too, mixes sinks within a batch, and edits after rounding to fp16; here sinks are found
per sample, and the edit is in fp32. (4) Sink dimensions are looked up or found, not always those of LLaMA-2-7B.

Cost: O(R K) per head for the R edited rows; no N x N map. The four groups' masses decide, so a row needs its weights once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Edit
from sightline.engine.sinks import check_tau, default_tau, sink_dims_of, sink_value
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import warn

EPS = 1e-6


def sink_mask(hidden: Tensor, dims: tuple[int, ...], tau: float) -> Tensor:
    """Which tokens are sinks: (B, N, D) input states of a layer -> (B, N) bool."""
    return sink_value(hidden, dims) > tau


def edited_rows(sigma: Tensor, sinks: Tensor, n_visual: Tensor | int, *, rho: float, summ: float) -> Tensor:
    """The head test. sigma, sinks: mass on all visual tokens and on visual sinks, any shape; rho bounds the sink SHARE."""
    share = sinks / (sigma + EPS * n_visual)
    return (share <= rho) & (sigma >= summ)


def factors(masses: Tensor, n_visual: Tensor | int, *, p: float, rho: float, summ: float) -> Tensor:
    """Factors for the keys of the groups (visual non-sinks, visual sinks, text sinks), from their masses.

    Args:
        masses: (..., 3). n_visual: visual tokens per sample, broadcastable to (...).
        p: share kept by the sinks. rho: largest sink share of the image mass. summ: smallest image mass.

    Returns:
        (..., 3); ones where the row is not edited.
    """
    others, visual_sinks, text_sinks = masses.unbind(-1)
    chosen = edited_rows(others + visual_sinks, visual_sinks, n_visual, rho=rho, summ=summ) & (others > 0)
    freed = (1 - p) * (visual_sinks + text_sinks)
    given = 1 + freed / torch.where(others > 0, others, torch.ones_like(others))
    kept = torch.full_like(others, p)
    return torch.where(chosen[..., None], torch.stack([given, kept, kept], -1), torch.ones_like(masses))


def redistribute(
    attention: Tensor,
    sinks: Tensor,
    visual: Tensor,
    *,
    p: float = 0.6,
    rho: float = 0.5,
    summ: float = 0.2,
    rows: Tensor | None = None,
) -> Tensor:
    """VAR on whole attention maps: the readable truth, and the form of the official code.

    Args:
        attention: (B, H, Q, K) after softmax.
        sinks: (B, K) bool, visual and text sinks. visual: (B, K) bool, image tokens.
        p: share of the sinks' attention that they keep, in [0, 1].
        rho: largest sink share of the image mass (the official code's rho; 1 - `min_nonsink_ratio`).
        summ: smallest attention mass on the image.
        rows: (B, Q) bool, queries that may be edited; None: all.

    Returns:
        (B, H, Q, K), each row with the sum it had.
    """
    groups = group_members(sinks, visual)[:, None]  # (B, 1, K, 3)
    masses = attention.float() @ groups  # (B, H, Q, 3)
    scale = factors(masses, visual.sum(-1)[:, None, None], p=p, rho=rho, summ=summ)
    allowed = (sinks & visual).any(-1)[:, None, None, None]  # no visual sink: leave the sample alone
    if rows is not None:
        allowed = allowed & rows[:, None, :, None]
    change = (torch.where(allowed, scale, torch.ones_like(scale)) - 1) @ groups.transpose(-1, -2)
    return (attention * (1 + change)).to(attention.dtype)


def group_members(sinks: Tensor, visual: Tensor) -> Tensor:
    """(B, K, 3) fp32 0/1: visual non-sinks, visual sinks, text sinks."""
    return torch.stack([visual & ~sinks, visual & sinks, sinks & ~visual], -1).float()


@system(
    "var",
    kind="steer",
    paper=Paper(
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        authors="Kang, Seil and Kim, Jinyeong and Kim, Junhyeok and Hwang, Seong Jae",
        venue="ICLR",
        year=2025,
        arxiv="2503.03321",
        code="seilk/VisAttnSink",
        licence="Apache-2.0",
    ),
    summary="takes attention from visual and text sinks and gives it to the other image tokens",
)
@dataclass(frozen=True)
class VAR(System):
    """Visual attention redistribution. No training, no second forward."""

    p: float = param(0.6, "share of the sinks' attention that they keep; 1 changes nothing", low=0, high=1)
    min_nonsink_ratio: float = param(
        0.5,
        "edit a row only if at least this share of its image attention is on non-sinks (paper's rho: 0.8 general, "
        "0.5 hallucination, 0.9 vision-centric tasks)",
        low=0,
        high=1,
    )
    summ: float = param(0.2, "edit a row only if its attention on the image is at least this", low=0, high=1)
    tau: float | None = param(
        None, "a token is a sink when phi exceeds this; none: 20 (narrow models: 0.31 sqrt(D))", low=0
    )
    sink_dims: tuple[int, ...] | None = param(
        None, "sink dimensions; none: the known table, or found at the start token"
    )
    first_layer: int = param(2, "first decoder layer that is edited (0-based)", low=0)
    skip_last_layer: bool = param(True, "leave the last decoder layer alone (the paper; the released code edits it)")

    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.p == 1

    def prepare(self, shape: Shape) -> dict[str, Any]:
        tau = default_tau(shape.hidden_size) if self.tau is None else self.tau
        check_tau(tau, shape.hidden_size)
        dims = sink_dims_of(shape, tau) if self.sink_dims is None else tuple(self.sink_dims)
        if not dims:
            warn(
                f"no sink dimension at tau={tau:g}: this model shows no sinks, VAR changes nothing",
            )
        last = shape.layers - 1 if self.skip_last_layer else shape.layers
        return {"dims": dims, "tau": tau, "layers": range(self.first_layer, last)}

    def hidden(self, site: Site, hidden: Tensor) -> None:
        """Find this layer's sinks among the prompt tokens of the block."""
        if not site.prefill or site.layer not in site.setup["layers"] or not site.tokens.has_image:
            return
        sinks = sink_mask(hidden, site.setup["dims"], site.setup["tau"])  # (B, Q)
        here = site.tokens.role[:, site.start :]
        sinks = sinks & (here != int(Role.PAD)) & (here != int(Role.GENERATED))
        before = site.state.get((site.layer, "sinks"))
        if before is not None and site.start > 0:  # a later chunk of the prompt
            gap = max(0, site.start - before.shape[1])  # generated in between: never sinks
            sinks = torch.cat([F.pad(before[:, : site.start], (0, gap)), sinks], 1)
        visual = site.tokens.visual
        site.state[site.layer, "sinks"] = sinks
        site.state[site.layer, "groups"] = group_members(sinks, visual)
        site.state[site.layer, "visual"] = visual.sum(-1)[:, None, None]
        site.state[site.layer, "has"] = (sinks & visual).any(-1)  # (B,)
        site.state[site.layer, "active"] = bool(site.state[site.layer, "has"].any())  # one sync, at prefill only

    def attention(self, site: Site) -> Edit | None:
        state, layer = site.state, site.layer
        if not state.get((layer, "active")):
            return None
        start = max(site.tokens.first_after - site.start, 0)
        if start >= site.queries:
            return None
        has = state[layer, "has"]
        everywhere = not site.prefill and has.shape[0] == 1
        rows = has[:, None].expand(-1, site.queries - start)
        if site.prefill:
            role = site.tokens.role[:, site.start + start :]
            rows = rows & ((role == int(Role.AFTER)) | (role == int(Role.GENERATED)))

        def choose(masses: Tensor, first: int) -> Tensor:  # (B, H, R, 3)
            scale = factors(masses, state[layer, "visual"], p=self.p, rho=1 - self.min_nonsink_ratio, summ=self.summ)
            if not everywhere:
                may = rows[:, None, first - start : first - start + masses.shape[2], None]
                scale = torch.where(may, scale, torch.ones_like(scale))
            _count(site, scale, masses)
            return scale

        return Edit(start=start, rows=None if everywhere else rows, groups=state[layer, "groups"], factors=choose)

    def report(self, tally: dict[Any, Any], setup: dict[str, Any]) -> dict[str, Any]:
        rows, edited, moved = (float(x) for x in _fold(tally))
        layers = sorted(tally.get("layers", {}))
        return {
            "sink_dims": list(setup["dims"]),
            "tau": setup["tau"],
            "layers_with_visual_sinks": layers,
            "rows_seen": int(rows),  # (head, query) pairs in those layers
            "rows_edited": int(edited),
            "share_edited": edited / rows if rows else 0.0,
            "mean_mass_moved": moved / edited if edited else 0.0,  # attention per edited row
        }


def _count(site: Site, scale: Tensor, masses: Tensor) -> None:
    """Keep what was edited for the report: no arithmetic on the hot path, folded now and then."""
    site.tally.setdefault("layers", {})[site.layer] = True
    site.tally.setdefault("pending", []).append((scale.detach(), masses.detach()))
    if len(site.tally["pending"]) >= 1024:
        _fold(site.tally)


def _fold(tally: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """(rows seen, rows edited, attention moved) so far."""
    total = tally.get("total", (0, 0, 0))
    for scale, masses in tally.pop("pending", []):
        sinks = masses[..., 1] + masses[..., 2]
        edited = scale[..., 0] > 1
        moved = ((scale[..., 0] - 1) * masses[..., 0]).sum()
        total = (total[0] + sinks.numel(), total[1] + edited.sum(), total[2] + moved)
    tally["total"] = total
    return total

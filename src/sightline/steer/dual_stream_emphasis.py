"""Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model (dual-stream emphasis).

2025, arXiv 2501.12206 (later PAINT: Paying Attention to INformed Tokens). Official code: hasanar1f/llava-hallunication-fix,
hasanar1f/PAINT (Apache-2.0), built on PAI.

Attention to the picture fades in deep layers. Two groups of visual tokens are raised, each by its own factor: local ones
(patches that the class token looks at in the first tower layer: objects) and summary ones (outliers of its attention in
the last but one: registers of the whole picture). With A_l (H, P+1, P+1) the tower's attention and P patches:

    a1 = sum_h A_first[h, CLS, patches]              a2 = sum_h A_last-but-one[h, CLS, patches]          (P,)
    local   = top floor(local_ratio P) of a1         summary = top floor(P o) of a2
    o       = share of patches with a2 > Q3 + 1.5 (Q3 - Q1)                     quartiles over the patches, interpolated
    local  <- local \\ summary                        a token is in one group; summary wins
    w_j    <- w_j + alpha |w_j|  j in local,   w_j + beta |w_j|  j in summary         scores w before the softmax

Where: decoder layers from 2 on, all heads, the prompt's last position and every generated one.

Guidance (PAI's, off by default): a second stream reads the prompt without its pictures, and so without the edit. With s and u
the log-probabilities (B, V) of both,

    out = gamma (s - u) + u   where s >= max s + log cfg_beta, -inf elsewhere          gamma = 1: s, nothing cut

Against the official code: (1) it chooses for the first picture of the process's last batch and edits every row with that;
here every picture of every row has its own, and every tile of one (its class token's attention is a softmax of its own). (2) Its third criterion (`spatial_ratio`, 0 as released) ranks patches by the
sum of their softmax rows, which is 1 for all: kept as an option, without its off-by-one at the class token. (3) Head
weights, which the abstract names and no code shows, multiply alpha and beta (`head_weights`; see `explain.divergence`).
(4) floor(P o) is taken in floating point as there: 1 outlier of 49 patches gives floor(0.99...) = 0 tokens.
PAI itself is local_ratio=1 with beta = alpha, and gamma 1.1. (5) A host's own markers around a picture stay in the prompt
without it.

Cost: two class-token rows of the tower, and the edited rows' scores: O(K) per head. No N x N map. With gamma also a short
second prompt and a second forward per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Edit, Probe
from sightline.engine.pictures import columns_of
from sightline.engine.prompts import Prompt
from sightline.engine.streams import answering
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import HostError, InputError, ParameterError


def outlier_ratio(scores: Tensor) -> float:
    """Share of scores (P,) above the upper Tukey fence."""
    low, high = scores.float().quantile(torch.tensor([0.25, 0.75], device=scores.device)).unbind()
    return int((scores > high + 1.5 * (high - low)).sum()) / len(scores)


def select_tokens(
    first: Tensor,
    penultimate: Tensor,
    *,
    local_ratio: float = 0.25,
    spatial: Tensor | None = None,
    spatial_ratio: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The two groups of one picture.

    Args:
        first, penultimate: (P,) class-token attention to the patches, summed over heads.
        local_ratio: share of the patches in the local group. spatial: (P,) further scores, spatial_ratio: their share.

    Returns:
        Sorted indices of the local and of the summary tokens; no index is in both.
    """
    count = len(first)
    local = first.topk(int(count * local_ratio)).indices
    if spatial is not None and spatial_ratio > 0:
        local = torch.cat([local, spatial.topk(int(count * spatial_ratio)).indices])
    summary = penultimate.topk(int(count * outlier_ratio(penultimate))).indices
    local = local.unique()
    return local[~torch.isin(local, summary)], summary.sort().values


def emphasise(scores: Tensor, boost: Tensor) -> Tensor:
    """The readable truth: scores (B, H, Q, K), of which the last row becomes w + boost |w|; boost (B, K)."""
    last = scores[:, :, -1]
    return torch.cat([scores[:, :, :-1], (last + boost[:, None] * last.abs())[:, :, None]], 2)


def guided(logits: Tensor, blind: Tensor, gamma: float, beta: float = 0.1) -> Tensor:
    """(B, V) log-probabilities moved away from those without the picture; where `logits` finds a token implausible, -inf.

    Args:
        logits, blind: (B, V) scores with and without the picture. gamma: 1 gives the log-probabilities of `logits`, uncut.
    """
    seeing, unseeing = logits.log_softmax(-1), blind.log_softmax(-1)
    if gamma == 1:
        return seeing
    kept = seeing >= math.log(beta) + seeing.amax(-1, keepdim=True) if beta else seeing.isfinite()
    return (gamma * (seeing - unseeing) + unseeing).masked_fill(~kept, -torch.inf)


@system(
    "dual-stream-emphasis",
    kind="steer",
    paper=Paper(
        title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        authors="Arif, Kazi Hasan Ibn and Dip, Sajib Acharjee and Hussain, Khizar and Zhang, Lang and Thomas, Chris",
        venue="arXiv",
        year=2025,
        arxiv="2501.12206",
        code="hasanar1f/llava-hallunication-fix",
        licence="Apache-2.0",
    ),
    summary="raises attention to object patches and to the tower's register patches, each by its own factor",
    needs=("image_tokens", "cls"),
)
@dataclass(frozen=True)
class DualStreamEmphasis(System):
    """Emphasis on local and on summary tokens. No training, no second forward. Needs a tower with a class token."""

    alpha: float = param(0.7, "emphasis on local tokens", low=0)
    beta: float = param(0.3, "emphasis on summary tokens", low=0)
    local_ratio: float = param(0.25, "share of a view's tokens in the local group", low=0, high=1)
    spatial_ratio: float = param(0.0, "share added by the released code's row sums (a degenerate score)", low=0, high=1)
    first_layer: int = param(2, "first decoder layer that is edited (0-based)", low=0)
    head_weights: tuple[float, ...] | None = param(
        None, "factors on alpha and beta, layers x heads numbers, layer after layer; none: 1 for all", low=0
    )

    gamma: float = param(1.0, "guidance: above 1 away from what is said without the picture; 1: none", low=0)
    cfg_beta: float = param(0.1, "guidance: tokens less likely than this share of the likeliest are cut", low=0, high=1)

    def __post_init__(self) -> None:
        check_parameters(self)

    def stations(self) -> tuple[str, ...]:
        return tuple(s for s in super().stations() if s != "second" or self.gamma != 1)

    def idle(self) -> bool:
        return self.alpha == 0 and self.beta == 0 and self.gamma == 1

    def prepare(self, shape: Shape) -> tuple[int, Tensor | None]:
        if shape.heads and shape.tower_prefix == 0:
            raise HostError("dual-stream-emphasis ranks patches by the class token's attention: this tower has none")
        if self.head_weights is None:
            return shape.tower_prefix, None
        if len(self.head_weights) != shape.layers * shape.heads:
            raise ParameterError(
                f"DualStreamEmphasis: head_weights has {len(self.head_weights)} numbers, this model needs "
                f"{shape.layers} layers x {shape.heads} heads = {shape.layers * shape.heads}"
            )
        return shape.tower_prefix, torch.tensor(self.head_weights).view(shape.layers, 1, shape.heads, 1, 1)

    def vision_attention(self, site: Site) -> list[Probe] | None:
        probes = []
        if site.layer == 0:
            probes.append(Probe(partial(_keep, site, "first"), stop=1))
            if self.spatial_ratio > 0:
                site.seen["spatial"] = []
                probes.append(Probe(lambda rows, first: site.seen["spatial"].append(rows.mean(1).sum(-1))))
        if site.layer == max(site.layers - 2, 0):
            probes.append(Probe(partial(_keep, site, "penultimate"), stop=1))
        return probes or None

    def visual_tokens(self, site: Site, embeddings: Tensor) -> None:
        """Rank the block's visual tokens and set their boosts, by column of the whole prompt."""
        here, before = site.tokens.visual[:, site.start :], site.state.get("boost")
        anything = bool(here.any()) and (self.alpha, self.beta) != (0, 0)
        if not anything and before is None:
            return
        block = torch.zeros(here.shape, device=embeddings.device)
        if anything:
            if "penultimate" not in site.seen:
                raise InputError("the pictures were encoded before the systems were attached: give pixel_values")
            values = self._boosts(site)
            try:
                block[here] = values[columns_of(len(values), here)]
            except InputError as error:
                raise InputError(
                    f"{error}; beside a system that drops tokens, name dual-stream-emphasis first"
                ) from None
        first = int(site.tokens.position[:, site.start :].min())  # a cut prompt keeps its columns' numbers
        if site.start > 0:
            known = 0 if before is None else before.shape[1]
            gap = block.new_zeros(len(block), max(0, first - known))  # generated in between
            block = torch.cat([gap, block] if before is None else [before[:, :first], gap, block], 1)
        site.state["boost"] = block

    def _boosts(self, site: Site) -> Tensor:
        """(V,) boost of every visual token of the encoding; 0 for those in neither group."""
        places, prefix = site.pictures.places, site.setup[0]
        scores = {name: places.pool(site.seen[name][:, prefix:]) for name in ("first", "penultimate")}
        if self.spatial_ratio > 0:
            scores["spatial"] = places.pool(torch.cat(site.seen["spatial"], 1)[:, prefix:])
        boosts = torch.zeros_like(scores["first"])
        for view in range(sum(places.views)):
            mine = (places.view == view).nonzero().flatten()
            if len(mine) == 0:  # a tile of pure padding
                continue
            local, summary = select_tokens(
                scores["first"][mine],
                scores["penultimate"][mine],
                local_ratio=self.local_ratio,
                spatial=scores["spatial"][mine] if "spatial" in scores else None,
                spatial_ratio=self.spatial_ratio,
            )
            boosts[mine[local]], boosts[mine[summary]] = self.alpha, self.beta
            for name, count in (("local", len(local)), ("summary", len(summary)), ("views", 1)):
                site.tally[name] = site.tally.get(name, 0) + count
        return boosts

    def attention(self, site: Site) -> Edit | None:
        state, layer = site.state, site.layer
        if "boost" not in state or layer < self.first_layer:
            return None
        if not site.prefill:
            return Edit(boost=state[layer, "boost"])
        tokens = site.tokens
        columns = tokens.position.long().clamp(0, state["boost"].shape[1] - 1)
        boost = (state["boost"].gather(1, columns) * tokens.visual)[:, None, None]  # (B, 1, 1, N)
        weights = site.setup[1]
        state[layer, "boost"] = boost if weights is None else boost * weights[layer].to(boost.device)  # (B, H, 1, N)
        block = (site.step, site.start, site.queries)
        if state.get("block") != block:
            answer = answering(tokens, site.start)
            start = int(answer.any(0).int().argmax())  # one sync per prompt
            state["block"], state["rows"] = block, (start, answer[:, start:])
        start, rows = state["rows"]
        return Edit(start=start, rows=rows, boost=state[layer, "boost"])

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any] | None:
        """The prompt without its pictures."""
        tokens = prompt.tokens
        if not tokens.has_image:
            return None
        site.state["seeing"] = tokens.visual.any(1, keepdim=True)  # (B, 1)
        words = ~tokens.visual & (tokens.role != int(Role.PAD))
        return prompt.pick([row.nonzero().flatten() for row in words])

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        return torch.where(site.state["seeing"], guided(logits, second, self.gamma, self.cfg_beta), logits)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        views = tally.get("views", 0)
        mean = {f"mean_{name}_tokens": tally.get(name, 0) / max(views, 1) for name in ("local", "summary")}
        return {"views": views, **mean}


def _keep(site: Site, name: str, weights: Tensor, first: int) -> None:
    """Remember the class token's row (R, H, 1, N), summed over heads: (R, N)."""
    site.seen[name] = weights[:, :, 0].sum(1)

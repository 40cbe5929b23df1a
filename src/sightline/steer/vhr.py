"""Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (VHR: vision-aware head reinforcement).

ACL 2025, arXiv 2412.13949. Code by the paper: jinghan1he/VHR, which could not be obtained: what follows is the paper's text
(equations 4, 6 and 7, algorithm 1, section 4.4), checked against no code.

Few attention heads depend on the picture, and hallucinated words come when these are quiet. The output of head i of layer
l at the last position, a_li(c) (D_head,), before the output projection, with and without the picture in the context:

    VHD_li   = || a_li(picture, text) - a_li(text) ||_2                                   (B, H) per layer
    T_li     = || a_li(text) ||^2
    VHD_li   = 0    where VHD_li and T_li both exceed their layer's mean + std               heads that surge without it
    S_l      = { i : VHD_li > median_l }                                  the more vision-aware half; ties are out
    a_li     = alpha a_li      for i in S_l, then the output projection as ever

Where: layers 1 and the last 14 of 32 (0-based; in proportion elsewhere; the paper takes the last 18 for InstructBLIP), the
prompt's last position and every generated one. S_l is found once, at the prompt's last position, layer after layer. The
paper does not say whether the layers before are reinforced by then: here they are, on the side with the picture only; nor
which standard deviation it takes: here squares are divided by H - 1. T-VHD, the sum over heads at every generated token, is
in `sightline.explain.divergence`.

Without a picture nothing is selected. Grouped-query attention: heads are query heads. Each row of a batch has its own.

Cost: one run of the prompt without its pictures (short), then one product per layer and token. No attention map.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Edit
from sightline.engine.streams import answering, last_prompt, rounding
from sightline.engine.system import Shape, Site, System
from sightline.errors import ParameterError


def head_divergence(seeing: Tensor, blind: Tensor) -> Tensor:
    """VHD: (..., H, D) head outputs with and without the picture -> (..., H) fp32, Euclidean; 0 where it is rounding."""
    divergence = (seeing.float() - blind.float()).norm(dim=-1)
    return divergence.where(divergence > rounding(seeing.dtype) * seeing.float().norm(dim=-1), 0.0)


def without_outliers(divergence: Tensor, blind: Tensor) -> Tensor:
    """(..., H): divergence set to 0 for heads that stand out in it and in their activation without the picture.

    Args:
        divergence: (..., H). blind: (..., H, D) head outputs without the picture.
    """
    return divergence.masked_fill(_high(divergence) & _high(blind.float().square().sum(-1)), 0.0)


def _high(values: Tensor) -> Tensor:
    """(..., H) bool: more than a standard deviation above the mean of the layer; none of a single head."""
    if values.shape[-1] == 1:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)


def select_heads(divergence: Tensor, share: float = 0.5) -> Tensor:
    """(..., H) bool: heads strictly above the (1 - share) quantile of their layer; share 0.5: above the median."""
    return divergence > divergence.quantile(1 - share, dim=-1, keepdim=True)


def default_layers(layers: int) -> tuple[int, ...]:
    """The second layer and the last 14 of 32, in proportion."""
    late = range(layers - max(1, round(14 * layers / 32)), layers)
    return tuple(sorted({min(1, layers - 1), *late}))


@system(
    "vhr",
    kind="steer",
    paper=Paper(
        title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        authors="He, Jinghan and Zhu, Kuan and Guo, Haiyun and Fang, Junfeng and Hua, Zhenglin and Jia, Yuheng and "
        "Tang, Ming and Chua, Tat-Seng and Wang, Jinqiao",
        venue="ACL",
        year=2025,
        arxiv="2412.13949",
    ),
    summary="amplifies the attention heads whose output changes most when the picture is taken away",
    published=(
        ("CHAIR C_S / C_I, LLaVA-1.5-7B, 512 tokens, mean of 5 draws", "49.68/14.32 -> 33.32/9.71"),
        ("POPE F1, mean of three splits, LLaVA-1.5-7B", "84.98 -> 85.47"),
    ),
)
@dataclass(frozen=True)
class VHR(System):
    """Vision-aware head reinforcement. No training; one short run of the prompt without its pictures."""

    alpha: float = param(2.0, "factor on the outputs of the chosen heads; 1 changes nothing", low=0)
    layers: tuple[int, ...] | None = param(None, "decoder layers (0-based); none: 1 and the last 14 of 32", low=0)
    share: float = param(0.5, "share of a layer's heads that is amplified: the most vision-aware", low=0, high=1)
    drop_outliers: bool = param(True, "never choose heads that change much because they surge without the picture")

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.alpha == 1 or self.share == 0

    def streams(self) -> tuple[str, ...]:
        return ("text",)

    def prepare(self, shape: Shape) -> frozenset[int]:
        chosen = default_layers(shape.layers) if self.layers is None else self.layers
        if any(layer >= shape.layers for layer in chosen):
            raise ParameterError(f"VHR: layers={self.layers} is out of range; choose layers in [0, {shape.layers - 1}]")
        return frozenset(int(layer) for layer in chosen)

    def attention(self, site: Site) -> Edit | None:
        if site.layer not in site.setup:
            return None
        if site.stream:
            return Edit(start=site.queries - 1, after=partial(_keep, site))
        if not site.prefill:
            gain = site.state.get((site.layer, "gain"))
            return None if gain is None else Edit(gain=gain)
        known = (site.layer, "gain") in site.state
        if not known and (site.layer, "blind") not in site.state:
            return None  # no picture when the sequence began
        start, rows = _rows(site)
        if known:
            return Edit(start=start, rows=rows, gain=site.state[site.layer, "gain"])
        return Edit(start=start, rows=rows, after=partial(self._choose, site))

    def _choose(self, site: Site, outputs: Tensor, first: int) -> Tensor:
        """The outputs (B, R, H, D) under the gain (B, H, 1) that those of the prompts' last positions give."""
        state, layer = site.state, site.layer
        place = last_prompt(site.tokens) - site.start - first  # (B,)
        seeing = outputs[torch.arange(len(place), device=place.device), place.clamp(min=0)]
        blind = state[layer, "blind"]  # (B, H, D)
        divergence = head_divergence(seeing, blind)
        score = without_outliers(divergence, blind) if self.drop_outliers else divergence
        chosen = select_heads(score, self.share) & site.tokens.visual.any(1)[:, None]  # (B, H)
        gain = state[layer, "gain"] = torch.where(chosen[..., None], self.alpha, 1.0)
        site.tally.setdefault("seen", []).append((layer, divergence, chosen))
        return outputs * gain.transpose(1, 2)[..., None].to(outputs.dtype)

    def report(self, tally: dict[Any, Any], setup: frozenset[int]) -> dict[str, Any]:
        layers = sorted(setup)
        seen = tally.get("seen", [])
        chosen, divergence = [], []
        for layer in layers:
            mine = [(d, c) for at, d, c in seen if at == layer]
            chosen.append(int(sum(c.sum() for _, c in mine)))
            values = torch.cat([d.flatten() for d, _ in mine]) if mine else torch.zeros(1)
            divergence.append(round(float(values.mean()), 6))
        return {"layers": layers, "heads_chosen": chosen, "mean_divergence": divergence}


def _keep(site: Site, outputs: Tensor, first: int) -> None:
    """Remember the head outputs (B, H, D) of the last position of the run without pictures."""
    site.state[site.layer, "blind"] = outputs[:, -1].clone()


def _rows(site: Site) -> tuple[int, Tensor]:
    """First query that predicts the answer, and which of those from it on do: (B, Q - start) bool. One sync."""
    answer = answering(site.tokens, site.start)
    start = int(answer.any(0).int().argmax())
    return start, answer[:, start:]

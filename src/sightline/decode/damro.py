"""DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination.

EMNLP 2024, arXiv 2410.04514. Official code: coder-gx/DAMRO (no licence file).

The class token of the vision tower attends to a few outlier patches of the background, and the language model looks at the
same ones, most when it hallucinates. A second stream sees only these patches; what they alone suggest is subtracted:

    A     = softmax(q k^T / sqrt(C))     the tower layer whose output is used (LLaVA: the last but one), over the whole width C (heads are not split), (R, 1+P, 1+P)
    idx   = the k patches p with the largest A[cls, p], largest first; of the view that shows the whole picture
    L     = next-token scores of the prompt                                                             (B, V)
    L_neg = of the same prompt whose only visual tokens are idx, in that order
    L*    = (1 + alpha) L - alpha L_neg  where L >= log(beta) + max L, else -inf

Of the separators (newlines) only the last remains. LLaVA-NeXT's tiles are ranked, too, but the released packing keeps the first
view alone, which is the whole picture; `views="all"` takes k patches of every view, one view after the other.

Against the official code: (1) `heads="mean"` offers the mean of the real heads' attention instead of the released single-head
softmax (the default, "merged"). It is computed from the heads' own weights: q k^T / sqrt(C) = sum_h log A_h / sqrt(H) up to
a constant of the row. (2) Of LLaVA-NeXT's tiles, patches that show only padding are no visual tokens and cannot be chosen.
(3) Where one visual token is made of several patches (InternVL) it has their mean score. (4) InstructBLIP is not a host here;
its released code takes patch numbers as places in a sequence that begins with the class token, so off by one. (5) The released loop skips
temperature and top-p; here `generate` applies what it is asked for, after L*.

Cost: a second prefill with k visual tokens and a second forward per token; one attention row of one tower layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.decode.contrast import weigh
from sightline.engine.attention import Probe
from sightline.engine.pictures import columns_of
from sightline.engine.prompts import Prompt
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import HostError, ParameterError


def cls_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the class token (place 0) to the patches with the heads merged: (B, 1+P, C) twice -> (B, P)."""
    scores = query[:, :1] @ key.transpose(1, 2) * query.shape[-1] ** -0.5  # (B, 1, 1+P)
    return scores.softmax(-1)[:, 0, 1:]


def head_attention(qkv: Tensor, heads: int) -> Tensor:
    """Mean over heads of the class token's attention to the patches: (B, 1+P, 3C) -> (B, P)."""
    query, key, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, 1+P, d)
    scores = (query[:, :, :1] * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1).mean(1)[:, 0, 1:]


def merged_heads(weights: Tensor) -> Tensor:
    """The same row of `cls_attention` from the heads' own: (R, H, K) after softmax, scaled by sqrt(d) -> (R, K)."""
    logs = weights.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    return (logs.sum(1) * weights.shape[1] ** -0.5).softmax(-1)


def top_patches(scores: Tensor, topk: int) -> Tensor:
    """(B, min(topk, P)) the patches with the largest scores (B, P), largest first."""
    return scores.topk(min(topk, scores.shape[-1]), dim=-1).indices


def select(features: Tensor, index: Tensor) -> Tensor:
    """Rows of features (B, P, C) at index (B, k): (B, k, C)."""
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))


def outlier_columns(real: Tensor, scores: Tensor, pictures: Tensor, views: Tensor, topk: int) -> Tensor:
    """The columns of one row that the second stream reads: its text, and in the place of a picture its outliers.

    Args:
        real: (N,) bool, no padding.
        scores: (N,) of visual tokens; NaN for text and separators, -inf for tokens that are out of the question.
        pictures, views: (N,) number of the picture and of its view; -1 for text.
    """
    columns, parts, at = torch.arange(len(real), device=real.device), [], 0
    text = real & (pictures < 0)
    for k in pictures[pictures >= 0].unique().tolist():
        mine = columns[pictures == k]
        begin, end = int(mine[0]), int(mine[-1]) + 1
        parts.append(columns[at:begin][text[at:begin]])
        for view in views[mine].unique().tolist():
            inside = mine[(views[mine] == view) & scores[mine].isfinite()]
            parts.append(inside[top_patches(scores[inside][None], topk)[0]])
        parts.append(mine[scores[mine].isnan()][-1:])  # one separator stays
        parts.append(columns[begin:end][text[begin:end]])
        at = end
    return torch.cat([*parts, columns[at:][text[at:]]])


def contrast(logits: Tensor, negative: Tensor, *, alpha: float, beta: float) -> Tensor:
    """L* (..., V) from the scores of the prompt and of the outlier patches alone; -inf for implausible tokens."""
    return weigh(logits, negative, first_weight=1 + alpha, second_weight=-alpha, beta=beta)


@system(
    "damro",
    kind="decode",
    paper=Paper(
        title="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
        authors="Gong, Xuan and Ming, Tianshi and Wang, Xinpeng and Wei, Zhihua",
        venue="EMNLP",
        year=2024,
        arxiv="2410.04514",
        code="coder-gx/DAMRO",
        licence="none stated",
    ),
    summary="subtracts what the vision tower's outlier patches alone would suggest",
    needs=("image_tokens", "cls"),
    published=(
        ("POPE F1, LLaVA-1.5, mean of three COCO splits, sampled", "80.48 -> 84.72"),
        ("CHAIR C_S / C_I, LLaVA-1.5, sampled", "12.4/7.2 -> 6.0/3.6"),
    ),
)
@dataclass(frozen=True)
class DAMRO(System):
    """Contrast with the outlier patches. No training; a second stream."""

    alpha: float = param(0.5, "strength of the contrast (released: 2 for MME, 0.5 for POPE)", low=0)
    topk: int = param(10, "outlier patches of a view that the second stream sees", low=1)
    beta: float = param(0.1, "tokens less likely than this share of the likeliest are cut; 0 cuts none", low=0, high=1)
    heads: Literal["merged", "mean"] = param(
        "merged", "merged: one softmax over the whole width (released); mean: of heads"
    )
    views: Literal["base", "all"] = param(
        "base", "base: patches of the view of the whole picture (released); all: of every view"
    )
    vision_layer: int | None = param(
        None, "tower layer (0-based) whose class token is read; none: the one whose output is used"
    )

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def prepare(self, shape: Shape) -> dict[str, int]:
        if shape.heads and not shape.tower_prefix:
            raise HostError(
                "damro reads the outliers off the vision tower's class token, and this model's tower has none "
                "(SigLIP, Qwen-VL and the like): take a host with a CLIP or InternViT tower, for example LLaVA-1.5"
            )
        layer = shape.feature_layer if self.vision_layer is None else self.vision_layer
        if not 0 <= layer < max(shape.tower_layers, 1):
            raise ParameterError(
                f"damro: vision_layer={layer} is out of range; choose one of 0..{shape.tower_layers - 1}"
            )
        return {"prefix": shape.tower_prefix, "layer": layer}

    def vision_attention(self, site: Site) -> Probe | None:
        if site.second or site.layer != site.setup["layer"]:
            return None

        def see(weights: Tensor, first: int) -> None:  # (R, H, 1, K)
            row = weights[:, :, 0]
            site.seen["cls"] = merged_heads(row) if self.heads == "merged" else row.float().mean(1)  # (R, K)

        return Probe(see, start=0, stop=1)

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any] | None:
        """The same prompt with the outliers alone for a picture."""
        visual = prompt.tokens.visual
        if site.pictures is None or "cls" not in site.seen or not prompt.tokens.has_image:
            return None
        places, cls = site.pictures.places, site.seen["cls"]
        scores = places.pool(cls[:, site.setup["prefix"] :]).masked_fill(~places.real, torch.nan)  # (V,)
        if self.views == "base":
            base = torch.tensor(places.base, device=scores.device)
            scores = scores.masked_fill(places.real & ~torch.isin(places.view, base), -torch.inf)
        order = columns_of(len(scores), visual)
        rows = torch.full(visual.shape, torch.nan, device=scores.device).masked_scatter(visual, scores[order])
        none = torch.full(visual.shape, -1, device=scores.device)
        pictures, views = (none.masked_scatter(visual, x[order]) for x in (places.image, places.view))
        real = prompt.tokens.role != int(Role.PAD)
        site.state["seeing"] = visual.any(1, keepdim=True)  # (B, 1)
        return prompt.pick([outlier_columns(*row, self.topk) for row in zip(real, rows, pictures, views, strict=True)])

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        new = contrast(logits, second, alpha=self.alpha, beta=self.beta)
        site.tally["tokens"] = site.tally.get("tokens", 0) + new.shape[0]
        return torch.where(site.state["seeing"], new, logits)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        return {"tokens_weighed": tally.get("tokens", 0)}

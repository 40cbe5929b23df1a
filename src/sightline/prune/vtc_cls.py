"""[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (VTC-CLS: visual token compression by CLS).

arXiv 2412.05819, 2024. Official code: THU-MIG/VTC-CLS (Apache-2.0).

Patches are ranked by how strongly the vision tower's class token attends to them, summed over a range of its layers; the K
best stay, in raster order, and only they enter the language model:

    a_l[j]   = mean_h A_l[h, 0, 1+j]              A_l (H, N+1, N+1): softmax attention of tower layer l
    score[j] = sum_{l=s}^{F} a_l[j]               F: the layer whose output is projected (LLaVA: the last but one)
    keep     K largest, sorted                    positions in the language model are those of the shorter prompt

Text plays no part: the same picture keeps the same tokens whatever is asked.

Against the official code: (1) batches and several pictures work, each scored by itself. (2) Tiled pictures, which it does
not prune: K tokens of every tile and of the whole view, and newline tokens go as soon as any token goes. (3) Where a visual
token is made of several patches (InternVL), its score is their mean. (4) `start_layer` none is layer 16 of CLIP-L's 24, its
default, and two thirds of the depth elsewhere. (5) Its programs default to K = 36, its tables use 64, 128 and 256.
(6) `score="mean-received"` ranks by what all patches give to a patch, for towers without a class token (SigLIP, Qwen).
(7) Cut before the decoder rather than before the projector: the same tokens, and a projector that also runs those dropped.
(8) Equal scores: the lower index stays.

Cost: one row of attention per scored layer, O(N C); "mean-received" needs all rows, in chunks, and no N x N map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.select import Keep, best, best_in_parts
from sightline.engine.system import Shape, Site
from sightline.errors import ParameterError
from sightline.prune.parts.budget import per_view
from sightline.prune.parts.tower import Chooser, noted, require_cls, see_cls, see_sums

ENSEMBLES = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
}


def scores(attention: Tensor, ensemble: str = "sum") -> Tensor:
    """Scores of patches from the class token's rows in several layers: (L, ..., H, N) -> (..., N) fp32."""
    return ENSEMBLES[ensemble](attention.float().mean(-2))


def kept(scores: Tensor, keep: int) -> Tensor:
    """(..., min(keep, N)) indices of the largest scores (..., N), sorted."""
    chosen = best(scores, keep)
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], -1)


@system(
    "vtc-cls",
    kind="prune",
    paper=Paper(
        title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        authors="Wang, Ao and Sun, Fengyuan and Chen, Hui and Lin, Zijia and Han, Jungong and Ding, Guiguang",
        venue="arXiv",
        year=2024,
        arxiv="2412.05819",
        code="THU-MIG/VTC-CLS",
        licence="Apache-2.0",
    ),
    summary="keeps the patches that the vision tower's class token attends to most, over several of its layers",
    needs=("image_tokens", "cls"),
)
@dataclass(frozen=True)
class VTCCLS(Chooser):
    """A fixed number of visual tokens by the attention of the class token. No training."""

    keep: int | None = param(
        64, "visual tokens that stay of every picture (of every tile, when tiled); none: all", low=1
    )
    start_layer: int | None = param(
        None,
        "first tower layer (0-based) whose attention counts; none: 16 of 24, in proportion for other depths",
        low=0,
    )
    ensemble: Literal["sum", "mean", "max", "min"] = param("sum", "how the layers are joined")
    score: Literal["cls", "mean-received"] = param(
        "cls", "cls: attention of the class token; mean-received: of all patches, for towers without one"
    )

    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.keep is None

    def prepare(self, shape: Shape) -> dict[str, object]:
        if self.score == "cls":
            require_cls("vtc-cls", shape, "set score=mean-received (attention that a patch gets from all patches)")
        start = shape.tower_layers * 2 // 3 if self.start_layer is None else self.start_layer
        start = min(start, shape.feature_layer) if self.start_layer is None else start
        if start > shape.feature_layer:
            raise ParameterError(
                f"vtc-cls: start_layer={start} is behind the layer that is projected: choose start_layer in "
                f"[0, {shape.feature_layer}]"
            )
        return {"layers": range(start, shape.feature_layer + 1), "prefix": shape.tower_prefix}

    def vision_attention(self, site: Site) -> Probe | None:
        if site.layer not in site.setup["layers"]:
            return None
        return (see_cls if self.score == "cls" else see_sums)(site, site.setup["prefix"])

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        places = site.pictures.places
        rows = torch.stack([noted(site, layer) for layer in site.setup["layers"]])  # (L, R, N) or (L, R, 2, N)
        rows = rows if self.score == "cls" else rows[:, :, 0]
        values = places.pool(scores(rows[..., None, :], self.ensemble))
        return self.choose(site, best_in_parts(values, places.view, per_view(places, count=self.keep)))

"""FoPru: Focal Pruning for Efficient Large Vision-Language Models.

arXiv 2411.14164, 2024. No official code was found; built from the paper's description.

One attention map of the vision tower says how much every patch matters; the best tokens, or the best whole rows of the
grid, stay in raster order. Works without a class token, as it averages over queries:

    A        (H, N, N)   patches x patches of the softmax attention of the layer that is projected, over all keys;
                         rows and columns of a class token are left out afterwards, without renormalising
    received = mean_{h,i} A[h, i, j]      given = mean_{h,j} A[h, i, j]
    sigma    = the one with the larger variance over the N patches; `given` on a tie
    rank     keep the floor(r n) tokens with the largest sigma
    row      keep the floor(r G) rows of the grid with the largest sums of sigma

Where the paper leaves it open: (1) a choice per view (the whole picture, or a tile of it), each with its own ratio and its
own candidate; at least one token or row of every view stays. (2) Where a visual token is made of several patches, sigma is
their mean; rows are rows of visual tokens. (3) When any token of tiled pictures goes, the newline tokens go as well.
(4) In towers with windows, a patch is seen by the queries of its window only. (5) Without a class token every row of A sums
to 1, so `given` has no variance and `received` is chosen, up to rounding: it is taken to be 0 there.

Cost: all queries of one layer, in chunks of bounded size: O(N^2 C) time, O(N) memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.select import Keep, best_in_parts, fraction
from sightline.engine.system import Shape, Site
from sightline.errors import ParameterError
from sightline.prune.parts.budget import per_view
from sightline.prune.parts.tower import Chooser, noted, see_sums


def significance(received: Tensor, given: Tensor) -> Tensor:
    """The candidate with the larger unbiased variance over the last axis, row by row: (..., N) each -> (..., N)."""
    wins = received.var(-1, keepdim=True) > given.var(-1, keepdim=True)
    return torch.where(wins, received, given)


def candidates(attention: Tensor, cls: bool) -> tuple[Tensor, Tensor]:
    """(received, given), each (..., N), of whole maps (..., H, N', N'): the readable truth.

    cls: position 0 is a class token; its row and column are left out.
    """
    mean = attention.float().mean(-3)
    mean = mean[..., 1:, 1:] if cls else mean
    return mean.mean(-2), mean.mean(-1)


@system(
    "fopru",
    kind="prune",
    paper=Paper(
        title="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
        authors="Jiang, Lei and Huang, Weizhe and Liu, Tongxuan and Zeng, Yuting and Li, Jing and Cheng, Lechao and Xu, Xiaohua",
        venue="arXiv",
        year=2024,
        arxiv="2411.14164",
    ),
    summary="keeps the visual tokens, or rows of them, that one layer of the vision tower attends to most on average",
)
@dataclass(frozen=True)
class FoPru(Chooser):
    """A share of the visual tokens by mean attention in the tower. No training, no class token needed."""

    ratio: float = param(0.25, "share of the visual tokens that stays; 1 changes nothing", low=0, high=1)
    strategy: Literal["rank", "row"] = param("rank", "rank: the best tokens; row: whole rows of the grid (for text)")
    layer: int | None = param(None, "tower layer (0-based) that is looked at; none: the one that is projected", low=0)

    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.ratio == 1

    def prepare(self, shape: Shape) -> dict[str, int]:
        layer = shape.feature_layer if self.layer is None else self.layer
        if layer > shape.feature_layer:
            raise ParameterError(
                f"fopru: layer={layer} is behind the layer that is projected: choose layer in [0, {shape.feature_layer}]"
            )
        return {"layer": layer, "prefix": shape.tower_prefix}

    def vision_attention(self, site: Site) -> Probe | None:
        return see_sums(site, site.setup["prefix"]) if site.layer == site.setup["layer"] else None

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        places = site.pictures.places
        sums = noted(site, site.setup["layer"])  # (R, 2, N)
        received, given = places.pool(sums[:, 0]), places.pool(sums[:, 1])  # (V,)
        if site.setup["prefix"] == 0:
            given = torch.ones_like(given)
        values = torch.zeros_like(received)
        for view in range(sum(places.views)):  # few views: a loop is plainer than segments
            mine = places.view == view
            values[mine] = significance(received[mine], given[mine])
        if self.strategy == "rank":
            return self.choose(site, best_in_parts(values, places.view, per_view(places, ratio=self.ratio)))
        return self.choose(site, self._rows(values, places))

    def _rows(self, values: Tensor, places) -> Tensor:
        """(V,) bool: tokens of the best grid rows of every view."""
        height = int(places.line.max()) + 1
        line = places.view * height + places.line  # (V,) a number for every row of every view
        lines = sum(places.views) * height
        totals = values.new_zeros(lines).scatter_add(0, line.clamp(min=0), values.masked_fill(~places.real, 0.0))
        there = torch.zeros(lines, dtype=torch.bool, device=values.device)
        there[line[places.real]] = True
        view = torch.arange(lines, device=values.device) // height
        counts = there.view(-1, height).sum(1).tolist()
        budget = torch.tensor([fraction(n, self.ratio) for n in counts], device=values.device)
        chosen = best_in_parts(totals, view, budget, valid=there)
        return chosen[line.clamp(min=0)] & places.real

"""Dropping visual tokens at random: the baseline that every reducer must beat.

Of every view (the whole picture, or a tile of it) floor(ratio * n) of its n visual tokens stay, at least one, drawn
without replacement under a seed; order and positions are those of any reducer that acts before the language model. The
same picture in the same place of a batch of pictures always keeps the same tokens.

No paper: sanity baseline of most comparisons of visual token reduction. Cost: one sort of V random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.catalog import check_parameters, param, system
from sightline.engine.select import Keep, best_in_parts
from sightline.engine.system import Site
from sightline.prune.parts.budget import per_view
from sightline.prune.parts.tower import Chooser


@system(
    "random",
    kind="prune",
    paper=None,
    summary="drops visual tokens at random under a seed: the baseline that every reducer must beat",
)
@dataclass(frozen=True)
class Random(Chooser):
    """Random visual tokens, a share of every view."""

    ratio: float = param(0.25, "share of the visual tokens that stays; 1 changes nothing", low=0, high=1)
    seed: int = param(0, "of the draw", low=0)

    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.ratio == 1

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        places = site.pictures.places
        lengths = torch.bincount(places.view[places.real]).tolist()
        drawn = torch.cat([self._draw(n) for n in lengths]) if lengths else torch.zeros(0)
        scores = torch.zeros(len(places.real))
        order = places.view.cpu().masked_fill(~places.real.cpu(), len(lengths)).argsort(stable=True)
        scores[order[: len(drawn)]] = drawn
        scores = scores.to(places.view.device)
        return self.choose(site, best_in_parts(scores, places.view, per_view(places, ratio=self.ratio)))

    def _draw(self, count: int) -> Tensor:
        """(count,) random numbers, the same for every view of that size."""
        return torch.rand(count, generator=torch.Generator().manual_seed(self.seed))

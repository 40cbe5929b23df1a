"""Budgets of reducers that keep so many tokens of every view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sightline.engine.select import fraction

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.pictures import Places


def per_view(places: Places, *, count: int | None = None, ratio: float = 1.0) -> Tensor:
    """(views,) how many tokens of every view stay: `count`, or a `ratio` of what it has (floored, at least one)."""
    views = sum(places.views)
    lengths = torch.bincount(places.view[places.real], minlength=views)
    if count is not None:
        return lengths.clamp(max=count)
    return torch.tensor([fraction(n, ratio) for n in lengths.tolist()], device=lengths.device)

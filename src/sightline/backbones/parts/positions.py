"""Learned position embeddings on maps of other sizes than they were learned for."""

from __future__ import annotations

from torch import Tensor

from sightline.mix.parts.local import resize


def at_size(embedding: Tensor, learned: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(1, h w, C) of a `learned` map -> (1, H, W, C) of `grid`, bilinear; exact where the sizes are equal."""
    image = embedding.unflatten(1, learned)
    return image if learned == grid else resize(image.movedim(-1, 1), grid).movedim(1, -1)

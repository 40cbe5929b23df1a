"""LLaVA-NeXT (1.6): the whole picture and up to four tiles of 336 pixels, unpadded, a newline after every row of patches.

transformers: `models/llava_next`. Five views at most enter CLIP as rows of one batch; padding views are dropped first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import HostError
from sightline.hosts.anyres import anyres, tiles
from sightline.hosts.base import Host, register
from sightline.hosts.checks import require_sizes
from sightline.hosts.geometry import Layout
from sightline.hosts.llava import class_tokens
from sightline.hosts.views import anyres_counts, anyres_views


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """Base view, then the tiles' tokens row by row with newlines."""
    require_sizes(inputs, sizes)
    vision = model.config.vision_config
    tile = int(inputs["pixel_values"].shape[-1])
    if tile != vision.image_size or class_tokens(model) != (processor.vision_feature_select_strategy == "default"):
        raise HostError(
            f"views of {tile} pixels and strategy {processor.vision_feature_select_strategy!r} do not suit a tower of "
            f"{vision.image_size} pixels with {class_tokens(model)} class tokens"
        )
    pinpoints, patch = model.config.image_grid_pinpoints, vision.patch_size
    return [anyres(size, tiles(size, pinpoints, tile, patch), tile, patch) for size in sizes]


LLAVA_NEXT = register(
    Host(
        "llava_next",
        ("LlavaNextForConditionalGeneration",),
        tower_prefix=class_tokens,
        layouts=layouts,
        image_counts=anyres_counts,
        views=anyres_views,
    )
)

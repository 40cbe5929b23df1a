"""CLIP's vision transformer (transformers): a class token, then the patches of the centre square, row-major."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sightline.hosts.base import ViTHost, register
from sightline.hosts.canvas import join
from sightline.hosts.checks import require_count
from sightline.hosts.geometry import Layout
from sightline.hosts.plain import fields, pair, patch_grid, preprocessed


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """The patches of every picture (neither class token nor registers), row-major."""
    require_count("pixel_values", fields(inputs), sizes)
    pictures = getattr(processor, "image_processor", processor)  # a CLIPProcessor holds one
    config = getattr(model.config, "vision_config", model.config)
    found = []
    for size in sizes:
        part, grid = patch_grid(preprocessed(pictures, size), pair(config.patch_size))
        found.append(join(size, [part], [grid], [grid]))
    return found


CLIP = register(ViTHost("clip", ("CLIPVisionModel",), tower_prefix=1, layouts=layouts))
CLIP_INSIDE = register(
    ViTHost(
        "clip_inside",
        ("CLIPModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
        tower="vision_model",
        tower_prefix=1,
        layouts=layouts,
    )
)

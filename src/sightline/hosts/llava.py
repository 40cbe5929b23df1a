"""LLaVA-1.5: one view of 24 x 24 CLIP patches (336 pixels, patch 14), projected one to one.

transformers: `models/llava`. The class token is dropped when `vision_feature_select_strategy` is "default". The released
processor cuts out the centre square: what lies outside it is seen by no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import HostError
from sightline.hosts.base import Host, get, register
from sightline.hosts.canvas import join, separators
from sightline.hosts.checks import require_count
from sightline.hosts.geometry import Layout
from sightline.hosts.plain import pair, patch_grid, preprocessed


def class_tokens(model: Any) -> int:
    """1 when the tower has a class token (CLIP), 0 when not (SigLIP)."""
    tower = get(model, "model.vision_tower")
    return int(hasattr(getattr(tower, "embeddings", tower), "class_embedding"))


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """One view per picture, row-major; with strategy "full" the class token comes first, as a separator."""
    require_count("pixel_values", inputs, sizes)
    if inputs["pixel_values"].ndim != 4 or "image_sizes" in inputs:
        raise HostError(
            f"host 'llava' knows one view of fixed size per picture, not that of {type(processor).__name__}"
        )
    extra = class_tokens(model) - (processor.vision_feature_select_strategy == "default")
    if extra < 0:
        raise HostError("strategy 'default' drops a patch, for the tower has no class token: set it to 'full'")
    patch = pair(model.config.vision_config.patch_size)
    found = []
    for size in sizes:
        part, grid = patch_grid(preprocessed(processor.image_processor, size, square=True), patch)
        found.append(join(size, [separators(extra), part], [grid], [grid]))
    return found


def image_counts(model: Any, given: Mapping[str, Any], ids: Any) -> list[int] | None:
    """Every picture has as many tokens as the next: nothing stands between two of them in a prompt."""
    pictures = given.get("pixel_values")
    count = 0 if pictures is None else len(pictures)
    tokens = int((ids == model.config.image_token_id).sum())
    return [tokens // count] * count if count and tokens % count == 0 else None


LLAVA = register(
    Host(
        "llava",
        ("LlavaForConditionalGeneration",),
        tower_prefix=class_tokens,
        layouts=layouts,
        image_counts=image_counts,
    )
)

"""LLaVA-OneVision: SigLIP of 384 pixels (27 x 27 patches of 14: the last 6 pixels of a view are unseen), up to 6 x 6 tiles.

transformers: `models/llava_onevision`. More than `anyres_max_9` tiles' worth of tokens are shrunk bilinearly. A question
with several pictures gives each of them one padded view and a newline instead of tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import HostError
from sightline.hosts.anyres import anyres, tiles, view
from sightline.hosts.base import Host, register
from sightline.hosts.canvas import Canvas
from sightline.hosts.checks import require_count, require_sizes
from sightline.hosts.geometry import Layout
from sightline.hosts.llava import class_tokens
from sightline.hosts.views import anyres_counts, anyres_views, shrunk_frames, shrunk_video_views


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """Base view and tiles for a lone picture; one square view each for pictures that share a question."""
    require_sizes(inputs, sizes)
    vision = model.config.vision_config
    tile, patch = int(inputs["pixel_values"].shape[-1]), vision.patch_size
    if tile != vision.image_size or class_tokens(model) != (processor.vision_feature_select_strategy == "default"):
        raise HostError(f"views of {tile} pixels do not suit a tower of {vision.image_size} pixels")
    most = int(re.sub(r"\D", "", processor.vision_aspect_ratio))
    found = []
    for size, alone in zip(sizes, _alone(inputs, len(sizes)), strict=True):
        if alone:
            cut = tiles(size, model.config.image_grid_pinpoints, tile, patch)
            found.append(anyres(size, cut, tile, patch, most))
        else:
            found.append(view(Canvas(*size).pad_square().resize(tile, tile), size, tile // patch, patch))
    return found


def frame_counts(config: Any, given: Mapping[str, Any], runs: list[int]) -> list[int]:
    """Frames of half as many rows and columns as a view; the newline behind a video counts to its last frame."""
    side = pooled_side(config)
    return [side**2 + (k == frames - 1) for n in runs for frames in [(n - 1) // side**2] for k in range(frames)]


def pooled_side(config: Any) -> int:
    """Rows (and columns) of a frame's tokens."""
    return math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)


def frame_layouts(
    processor: Any, inputs: Mapping[str, Any], shapes: Sequence[tuple[int, int, int]], model: Any
) -> list[Layout]:
    """Every frame is stretched to one view, whose patches are shrunk bilinearly; a newline ends the video."""
    require_count("pixel_values_videos", inputs, shapes)
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return [
        layout
        for width, height, frames in shapes
        for layout in shrunk_frames((width, height), side, vision.patch_size, frames)
    ]


def _alone(inputs: Mapping[str, Any], count: int) -> list[bool]:
    """Whether each picture is the only one of its question."""
    if "batch_num_images" not in inputs:
        return [True] * count
    return [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]


LLAVA_ONEVISION = register(
    Host(
        "llava_onevision",
        ("LlavaOnevisionForConditionalGeneration",),
        tower_prefix=class_tokens,
        layouts=layouts,
        image_counts=anyres_counts,
        views=anyres_views,
        video_views=shrunk_video_views,
        video=True,
        video_token="video_token_id",
        frame_counts=frame_counts,
        frame_layouts=frame_layouts,
    )
)

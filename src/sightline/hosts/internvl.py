"""InternVL 2.5 and 3: tiles of 448 pixels and a thumbnail, 32 x 32 patches shuffled 2 x 2 to 16 x 16 tokens a tile.

transformers: `models/internvl`, picture processing of `models/got_ocr2`. The picture is stretched onto the tile grid whose
aspect ratio is nearest; a picture of one tile has no thumbnail. The tower has a class token, dropped before the shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import InputError
from sightline.hosts.base import Host, register
from sightline.hosts.canvas import Canvas, edge, join
from sightline.hosts.checks import ADVICE, require_count
from sightline.hosts.geometry import Layout
from sightline.hosts.plain import pair, patch_grid


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """Tiles row-major, then the thumbnail."""
    require_count("pixel_values", inputs, sizes, exact=False)
    pictures = processor.image_processor
    settings = getattr(processor, "images_kwargs", {})
    tile = edge(pictures.size, "height"), edge(pictures.size, "width")
    patch, merge = pair(model.config.vision_config.patch_size), round(1 / model.config.downsample_ratio)
    split = settings.get("crop_to_patches", pictures.crop_to_patches)
    limits = settings.get("min_patches", pictures.min_patches), settings.get("max_patches", pictures.max_patches)
    for cut in (split, not split):  # whether to cut may have been said in the call: the number of tiles tells
        shapes = [_shape(size, tile, limits) if cut else (1, 1) for size in sizes]
        if sum(r * c + (r * c > 1) for r, c in shapes) == inputs["pixel_values"].shape[0]:
            return [_tiled(size, shape, tile, patch, merge) for size, shape in zip(sizes, shapes, strict=True)]
    raise InputError(f"pictures of sizes {list(sizes)} do not give {inputs['pixel_values'].shape[0]} tiles: {ADVICE}")


def frame_layouts(
    processor: Any, inputs: Mapping[str, Any], shapes: Sequence[tuple[int, int, int]], model: Any
) -> list[Layout]:
    """Every frame is stretched to one tile."""
    side = processor.video_processor.size
    patch, merge = pair(model.config.vision_config.patch_size), round(1 / model.config.downsample_ratio)
    tile = edge(side, "height"), edge(side, "width")
    return [_tiled((w, h), (1, 1), tile, patch, merge) for w, h, frames in shapes for _ in range(frames)]


def _shape(size: tuple[int, int], tile: tuple[int, int], limits: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of tiles, of which there are between the two limits."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), tile, *limits)
    return rows, columns


def _tiled(
    size: tuple[int, int], shape: tuple[int, int], tile: tuple[int, int], patch: tuple[int, int], merge: int
) -> Layout:
    height, width = tile
    rows, columns = shape
    canvas = Canvas(*size).resize(width * columns, height * rows)
    views = [canvas.crop(c * width, r * height, width, height) for r in range(rows) for c in range(columns)]
    if len(views) > 1:
        views.append(Canvas(*size).resize(width, height))
    parts, grids = zip(*(patch_grid(v, patch, crop, merge) for crop, v in enumerate(views)), strict=True)
    patches = [(r * merge, c * merge) for r, c in grids]
    return join(size, parts, grids, patches, base=len(views) - 1)


INTERNVL = register(
    Host(
        "internvl",
        ("InternVLForConditionalGeneration",),
        tower_layers="encoder.layer",
        tower_attention="attention",
        tower_prefix=1,
        layouts=layouts,
        merged=True,
        video=True,
        frame_layouts=frame_layouts,
    )
)

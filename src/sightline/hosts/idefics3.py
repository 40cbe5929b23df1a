"""Idefics3 and SmolVLM: tiles (364 or 512 pixels) and the whole picture, patches shuffled 2 x 2, 3 x 3 or 4 x 4.

transformers: `models/idefics3`, `models/smolvlm`. The longer edge is brought to `size`, then both to multiples of the tile;
tile after tile, each behind its own marker tokens, then the whole. One picture's placeholders are thus not contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import InputError
from sightline.hosts.base import Host, register
from sightline.hosts.canvas import Canvas, edge, join
from sightline.hosts.checks import ADVICE, require_count
from sightline.hosts.geometry import Layout
from sightline.hosts.plain import patch_grid

LONGEST = 4096  # the processors' own upper bound on a picture's edge


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """Tiles row-major, then the whole picture; one view when it is not split."""
    require_count("pixel_values", inputs, sizes, exact=False)
    pictures = processor.image_processor
    tile, patch = edge(pictures.max_image_size, "longest_edge"), int(model.config.vision_config.patch_size)
    mask = inputs.get("pixel_attention_mask")  # (B, views, H, W), zero for the views that fill up rows
    views = None if mask is None else int((mask.reshape(*mask.shape[:2], -1) > 0).any(-1).sum())
    split = pictures.do_image_splitting
    for cut in (split, not split):  # whether to split may have been said in the call: the number of views tells
        found = [_views(size, pictures, tile, cut) for size in sizes]
        if views in (None, sum(map(len, found))):
            factor = model.config.scale_factor
            return [_layout(size, views, patch, factor) for size, views in zip(sizes, found, strict=True)]
    raise InputError(f"pictures of sizes {list(sizes)} do not give {views} views: {ADVICE}")


def image_counts(model: Any, given: Mapping[str, Any], ids: Any) -> list[int]:
    """Tokens of every picture: its views stand apart, the whole picture last, and behind the same marker everywhere."""
    counts, token = [], model.config.image_token_id
    for row in ids.tolist():
        starts = [k for k, i in enumerate(row) if i == token and (k == 0 or row[k - 1] != i)]
        whole = row[starts[-1] - 1] if starts else None  # the marker: what stands before the last view of a row
        begun = 0
        for k, start in enumerate(starts):
            end = starts[k + 1] if k + 1 < len(starts) else len(row)
            begun += row[start:end].count(token)
            if row[start - 1] == whole:
                counts.append(begun)
                begun = 0
    return counts


def frame_layouts(
    processor: Any, inputs: Mapping[str, Any], shapes: Sequence[tuple[int, int, int]], model: Any
) -> list[Layout]:
    """SmolVLM: every frame is stretched to one view."""
    tile = edge(processor.video_processor.max_image_size, "longest_edge")
    patch, factor = int(model.config.vision_config.patch_size), model.config.scale_factor
    views = ((w, h, Canvas(w, h).resize(tile, tile)) for w, h, frames in shapes for _ in range(frames))
    return [_layout((w, h), [view], patch, factor) for w, h, view in views]


def _views(size: tuple[int, int], pictures: Any, tile: int, split: bool) -> list[Canvas]:
    """The tiles of a picture and last the whole; each is tile x tile pixels."""
    canvas = Canvas(*size)
    if pictures.do_resize:
        canvas = canvas.resize(*_longest(size, pictures.size))
    if split:
        canvas = canvas.resize(*_multiple(canvas, tile))
    rows, columns = canvas.height // tile, canvas.width // tile
    whole = canvas.resize(tile, tile)
    if not split or rows * columns == 1:
        return [whole]
    return [canvas.crop(c * tile, r * tile, tile, tile) for r in range(rows) for c in range(columns)] + [whole]


def _longest(size: tuple[int, int], wanted: Any) -> tuple[int, int]:
    """(width, height) with the longer edge as wanted; the shorter rounded down, then up to even; then within bounds."""
    longest = edge(wanted, "longest_edge")
    if longest is None:
        return edge(wanted, "width"), edge(wanted, "height")
    width, height = _scaled(*size, longest)
    width, height = (width, _even(height)) if size[0] >= size[1] else (_even(width), height)
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > LONGEST:
        width, height = _scaled(width, height, LONGEST)
    return max(width, 1), max(height, 1)


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) with the longer edge brought to `longest`, the shorter rounded down."""
    ratio = width / height
    if width >= height:
        return longest, int(longest / ratio)
    return int(longest * ratio), longest


def _even(length: int) -> int:
    return length + length % 2


def _multiple(canvas: Canvas, tile: int) -> tuple[int, int]:
    """(width, height): the longer edge up to a multiple of the tile, the shorter in proportion and up as well."""
    ratio = canvas.width / canvas.height
    if canvas.width >= canvas.height:
        width = math.ceil(canvas.width / tile) * tile
        return width, math.ceil(int(width / ratio) / tile) * tile
    height = math.ceil(canvas.height / tile) * tile
    return math.ceil(int(height * ratio) / tile) * tile, height


def _layout(size: tuple[int, int], views: list[Canvas], patch: int, factor: int) -> Layout:
    cut = [patch_grid(v, (patch, patch), crop, factor) for crop, v in enumerate(views)]
    parts, grids = zip(*cut, strict=True)
    return join(size, parts, grids, [(r * factor, c * factor) for r, c in grids], base=len(views) - 1)


IDEFICS3 = register(
    Host(
        "idefics3",
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        decoder="model.text_model",
        tower="model.vision_model",
        projector="model.connector",
        layouts=layouts,
        merged=True,
        image_counts=image_counts,
        video=True,
        frame_layouts=frame_layouts,
    )
)

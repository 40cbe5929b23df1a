"""Gemma 3: SigLIP of 896 pixels, 64 x 64 patches averaged 4 x 4 to 256 tokens; with pan-and-scan also for crops.

transformers: `models/gemma3`. The picture is stretched to a square. Image tokens attend to each other both ways, sliding
and full decoder layers alternate, and the attention scale is `query_pre_attn_scalar ** -0.5`.
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
from sightline.hosts.plain import pair, patch_grid


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """The whole picture, then the crops of pan-and-scan, each a square grid of averaged patches."""
    require_count("pixel_values", inputs, sizes, exact=False)
    settings = getattr(processor, "images_kwargs", {})
    views = inputs["pixel_values"].shape[0]
    scan = bool(settings.get("do_pan_and_scan"))
    for cut in (scan, not scan):  # pan-and-scan is mostly asked for in the call: the number of views tells
        crops = [_pan_and_scan(size, processor) if cut else [] for size in sizes]
        if len(sizes) + sum(map(len, crops)) == views:
            return [_layout(size, found, processor, model) for size, found in zip(sizes, crops, strict=True)]
    raise InputError(f"pictures of sizes {list(sizes)} do not give {views} views: {ADVICE}")


def _pan_and_scan(size: tuple[int, int], processor: Any) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of the crops along the longer edge; none for pictures that are nearly square."""
    settings, pictures = getattr(processor, "images_kwargs", {}), processor.image_processor
    least, most, ratio = (
        settings.get(f"pan_and_scan_{name}", getattr(pictures, f"pan_and_scan_{name}", None))
        for name in ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
    )
    width, height = size
    long, short = max(size), min(size)
    if long / short < ratio:
        return []
    count = min(most, max(2, min(long // least, math.floor(long / short + 0.5))))
    step = math.ceil(long / count)
    if min(step, short) < least:
        return []
    spans = [(k * step, min(step, long - k * step)) for k in range(count)]
    return [(at, 0, wide, height) if width >= height else (0, at, width, wide) for at, wide in spans]


def _layout(size: tuple[int, int], crops: list[tuple[int, int, int, int]], processor: Any, model: Any) -> Layout:
    wanted = processor.image_processor.size
    width, height = edge(wanted, "width"), edge(wanted, "height")
    patch = pair(model.config.vision_config.patch_size)
    merge = width // patch[1] // math.isqrt(model.config.mm_tokens_per_image)
    views = [Canvas(*size), *(Canvas(*size).crop(*crop) for crop in crops)]
    cut = [patch_grid(v.resize(width, height), patch, crop, merge) for crop, v in enumerate(views)]
    parts, grids = zip(*cut, strict=True)
    return join(size, parts, grids, [(height // patch[0], width // patch[1])] * len(views))


GEMMA3 = register(Host("gemma3", ("Gemma3ForConditionalGeneration",), layouts=layouts, merged=True))

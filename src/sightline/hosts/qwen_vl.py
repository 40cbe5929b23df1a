"""Qwen2-VL and Qwen2.5-VL: any size, patches of 14 pixels merged 2 x 2, so 28 x 28 pixels of the resized picture a token.

transformers: `models/qwen2_vl`, `models/qwen2_5_vl`. The tower packs all pictures into one sequence without a batch axis,
patches in the order of their 2 x 2 blocks; Qwen2.5-VL moves blocks into windows first, and back after the merger.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sightline.errors import InputError
from sightline.hosts.base import Host, register
from sightline.hosts.canvas import Canvas, grid, join
from sightline.hosts.checks import ADVICE, require_count
from sightline.hosts.geometry import Layout
from sightline.hosts.views import packed_video_views, packed_views


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """Row-major tokens of merge x merge patches; the grid is read from `image_grid_thw`."""
    require_count("image_grid_thw", inputs, sizes)
    vision = model.config.vision_config
    patch, merge = int(vision.patch_size), int(vision.spatial_merge_size)
    grids = inputs["image_grid_thw"].tolist()
    return [_layout(size, rows, columns, patch, merge) for size, (_, rows, columns) in zip(sizes, grids, strict=True)]


def frame_counts(config: Any, given: Mapping[str, Any], runs: list[int]) -> list[int]:
    """Tokens of every group of `temporal_patch_size` frames.

    From `video_grid_thw`; `generate` keeps that to itself once the videos are encoded, and gives positions instead:
    there a frame begins where the row number falls back, or the column number does without a new row.
    """
    if given.get("video_grid_thw") is not None:
        merge = int(config.vision_config.spatial_merge_size)
        return [h * w // merge**2 for t, h, w in given["video_grid_thw"].tolist() for _ in range(t)]
    if given.get("position_ids") is None:
        return runs
    video = given["input_ids"] == config.video_token_id
    down, across = (axis[video].diff() for axis in given["position_ids"][-2:])  # (n - 1,) in the order of the prompt
    new = (down < 0) | ((across < 0) & (down == 0))
    new[np.cumsum(runs)[:-1] - 1] = True
    edges = [0, *(new.nonzero().flatten() + 1).tolist(), sum(runs)]
    return [b - a for a, b in itertools.pairwise(edges)]


def frame_layouts(
    processor: Any, inputs: Mapping[str, Any], shapes: Sequence[tuple[int, int, int]], model: Any
) -> list[Layout]:
    """One layout per group of merged frames; they all look at the same places."""
    require_count("video_grid_thw", inputs, shapes)
    vision = model.config.vision_config
    found = []
    for (*size, _), (t, rows, columns) in zip(shapes, inputs["video_grid_thw"].tolist(), strict=True):
        found += [_layout(tuple(size), rows, columns, int(vision.patch_size), int(vision.spatial_merge_size))] * t
    return found


def _layout(size: tuple[int, int], rows: int, columns: int, patch: int, merge: int) -> Layout:
    canvas = Canvas(*size).resize(columns * patch, rows * patch)
    shape = (rows // merge, columns // merge)
    _require_ratio(size, shape)
    part = grid(canvas, 0, *shape, (patch * merge, patch * merge), merge)
    return join(size, [part], [shape], [(rows, columns)])


def _require_ratio(size: tuple[int, int], shape: tuple[int, int]) -> None:
    """InputError when the picture's aspect ratio is not that of its grid, whose sides are rounded by under one token."""
    (width, height), (rows, columns) = size, shape
    if not (columns - 1) * height <= width * (rows + 1) or not width * (rows - 1) <= (columns + 1) * height:
        raise InputError(f"a picture of {width} x {height} pixels does not give {columns} x {rows} tokens: {ADVICE}")


def packed_order(model: Any, layouts: Sequence[Layout]) -> list[np.ndarray]:
    """Patches of all pictures in one row, token after token."""
    return _packed(layouts, np.arange(sum(map(len, layouts))))


def window_order(model: Any, layouts: Sequence[Layout]) -> list[np.ndarray]:
    """The same with the tokens' blocks of patches moved into windows, as all tower layers of Qwen2.5-VL see them."""
    import torch

    grids = torch.tensor([[1, *layout.patch_grids[0]] for layout in layouts])
    index = np.asarray(_window_index(model, grids))
    return _packed(layouts, np.argsort(index))


def _window_index(model: Any, grids: Any) -> Any:
    """Which block of patches stands at every place of the windowed sequence."""
    tower = model.model.visual
    if hasattr(tower, "get_window_index"):
        return tower.get_window_index(grids)[0]
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(
        grids, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )[0]


def _packed(layouts: Sequence[Layout], place: np.ndarray) -> list[np.ndarray]:
    """(n, k, 2) per picture, when token t of the batch stands at block `place[t]` of the one row."""
    found, start = [], 0
    for layout in layouts:
        k = len(layout.patches[0])
        where = place[start : start + len(layout), None] * k + np.arange(k)
        found.append(np.stack([np.zeros_like(where), where], axis=-1).astype(np.int64))
        start += len(layout)
    return found


QWEN2_VL = register(
    Host(
        "qwen2_vl",
        ("Qwen2VLForConditionalGeneration",),
        tower="model.visual",
        tower_layers="blocks",
        tower_attention="attn",
        projector="model.visual.merger",
        layouts=layouts,
        video=True,
        video_token="video_token_id",
        frame_counts=frame_counts,
        frame_layouts=frame_layouts,
        tower_order=packed_order,
        views=packed_views,
        video_views=packed_video_views,
        merged=True,
    )
)
QWEN2_5_VL = register(
    replace(QWEN2_VL, name="qwen2_5_vl", classes=("Qwen2_5_VLForConditionalGeneration",), tower_order=window_order)
)

"""Layouts without a processor: what can be told of a batch of pictures from the arguments of the host's own encoding.

A host's `views` function gets these arguments and returns one `Layout` per picture, of which crops, cells and patches
are those of the real picture; its pixels are those that the tower saw. Systems that drop tokens need no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sightline.errors import HostError
from sightline.hosts.anyres import anyres, shrunk_view, tiles, view
from sightline.hosts.base import Host, prefix
from sightline.hosts.canvas import Canvas, grid, join, separators
from sightline.hosts.geometry import Layout


def views(
    model: Any, host: Host, given: Mapping[str, Any], tower: tuple[int, int], tokens: int, video: bool = False
) -> list[Layout]:
    """One Layout per picture, or frame, of an encoding.

    Args:
        given: arguments of the host's `get_image_features`.
        tower: (rows, tokens per row) of the tower's batch, class token included.
        tokens: visual tokens that came out for all pictures together.
        video: whether it is the encoding of videos; `given` are then arguments of `get_video_features`.

    Raises:
        HostError: they do not explain that number of tokens.
    """
    find = (host.video_views if video else host.views) or one_view_per_row
    found = find(model, given, (tower[0], tower[1] - prefix(model, host)), tokens)
    if sum(len(layout) for layout in found) != tokens:
        raise HostError(
            f"host {host.name!r}: the geometry gives {sum(len(x) for x in found)} visual tokens, the tower {tokens}; "
            "an encoding with settings of its own is not understood here"
        )
    return found


def one_view_per_row(model: Any, given: Mapping[str, Any], tower: tuple[int, int], tokens: int) -> list[Layout]:
    """Every row of the tower's batch is a square view of its own, its patches merged m x m; tiles count as pictures."""
    rows, patches = tower
    each = tokens // max(rows, 1)
    extra = each - patches if each > patches else 0  # the class token was not taken away
    return [square(patches, each - extra, extra)] * rows


@lru_cache
def square(patches: int, tokens: int, extra: int = 0) -> Layout:
    """A square view of so many patches and tokens, `extra` separators in front."""
    side, short = math.isqrt(patches), math.isqrt(tokens)
    if side * side != patches or short * short != tokens or short == 0 or side % short:
        raise HostError(f"{tokens} visual tokens of {patches} patches are no square grid of merged patches")
    part = grid(Canvas(side, side), 0, short, short, (side // short, side // short), side // short)
    return join((side, side), [separators(extra), part], [(short, short)], [(side, side)])


def anyres_views(model: Any, given: Mapping[str, Any], tower: tuple[int, int], tokens: int) -> list[Layout]:
    """LLaVA's any-resolution tiles, from `image_sizes` and, where there is one, `batch_num_images`."""
    sizes = [(int(width), int(height)) for height, width in _numbers(given["image_sizes"])]
    together = given.get("batch_num_images")
    alone = [True] * len(sizes) if together is None else [n == 1 for n in _numbers(together) for _ in range(n)]
    config = model.config
    most = given.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", "")
    most = int("".join(c for c in most if c.isdigit()) or 0) or None
    pinpoints = tuple(tuple(point) for point in config.image_grid_pinpoints)
    vision = config.vision_config
    return [
        _anyres(size, one, pinpoints, vision.image_size, vision.patch_size, most)
        for size, one in zip(sizes, alone, strict=True)
    ]


def anyres_counts(model: Any, given: Mapping[str, Any], ids: Any) -> list[int] | None:
    """Visual tokens of every picture of a forward with pictures: nothing stands between two of them in a prompt."""
    if given.get("pixel_values") is None or given.get("image_sizes") is None:
        return None
    return [len(layout) for layout in anyres_views(model, given, (0, 0), 0)]


@lru_cache
def _anyres(size: tuple[int, int], alone: bool, pinpoints: tuple, tile: int, patch: int, most: int | None) -> Layout:
    if not alone:
        return view(Canvas(*size).pad_square().resize(tile, tile), size, tile // patch, patch)
    return anyres(size, tiles(size, [list(point) for point in pinpoints], tile, patch), tile, patch, most)


def packed_views(model: Any, given: Mapping[str, Any], tower: tuple[int, int], tokens: int) -> list[Layout]:
    """Qwen's pictures of any size, from `image_grid_thw`."""
    merge = int(model.config.vision_config.spatial_merge_size)
    return [packed(int(rows), int(columns), merge) for _, rows, columns in _numbers(given["image_grid_thw"])]


def packed_video_views(model: Any, given: Mapping[str, Any], tower: tuple[int, int], tokens: int) -> list[Layout]:
    """Qwen's videos, one layout per group of merged frames, from `video_grid_thw`."""
    merge = int(model.config.vision_config.spatial_merge_size)
    grids = _numbers(given["video_grid_thw"])
    return [packed(int(rows), int(columns), merge) for t, rows, columns in grids for _ in range(t)]


def shrunk_video_views(model: Any, given: Mapping[str, Any], tower: tuple[int, int], tokens: int) -> list[Layout]:
    """LLaVA-OneVision's videos: every frame one view, shrunk to half its rows and columns; a newline ends the video."""
    videos, frames = given["pixel_values_videos"].shape[:2]
    side = math.isqrt(tower[1])
    return shrunk_frames((side, side), side, 1, frames) * videos


def shrunk_frames(size: tuple[int, int], side: int, patch: int, frames: int) -> list[Layout]:
    """The layouts of a video of frames of `size`, each a view of side x side patches that is shrunk to half of it."""
    count = math.ceil(side / 2)
    part = shrunk_view(Canvas(*size).resize(side * patch, side * patch), side, patch, count)
    whole = join(size, [part], [(count, count)], [(side, side)])
    last = join(size, [part, separators()], [(count, count)], [(side, side)])
    return [whole] * (frames - 1) + [last]


@lru_cache
def packed(rows: int, columns: int, merge: int) -> Layout:
    """A picture of rows x columns patches, merged merge x merge."""
    shape = (rows // merge, columns // merge)
    part = grid(Canvas(columns, rows), 0, *shape, (merge, merge), merge)
    return join((columns, rows), [part], [shape], [(rows, columns)])


def _numbers(value: Any) -> Sequence[Any]:
    return value.tolist() if hasattr(value, "tolist") else value

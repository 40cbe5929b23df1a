"""A video as one page: its frames side by side, and one `Layout` that knows where every visual token lies on the page.

So that everything made for a picture (heat maps, regions, the report) shows a video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.errors import InputError
from sightline.hosts.geometry import Layout
from sightline.images import tiled

if TYPE_CHECKING:
    from PIL.Image import Image

    from sightline.clips import Clip
    from sightline.lvlm import LVLM

GAP = 4  # pixels between frames


def page(lvlm: LVLM, inputs: Any, clip: Clip) -> tuple[Image, Layout]:
    """The page of a clip that was asked about alone, and the layout of all its visual tokens.

    Where a host merges neighbouring frames, the first of each group is shown.
    """
    from sightline.hosts import layouts

    if lvlm.takes_videos and lvlm.host.frame_layouts is not None:
        found = lvlm.host.frame_layouts(lvlm.processor, inputs, [(*clip.size, len(clip))], lvlm.model)
    else:
        found = layouts(lvlm.model, lvlm.processor, inputs, [clip.size] * len(clip), host=lvlm.host)
    wanted = sum(int((inputs["input_ids"] == i).sum()) for i in lvlm.visual_ids)
    if wanted != sum(map(len, found)):
        raise InputError(f"{clip.name}: the frames have {sum(map(len, found))} visual tokens, the prompt has {wanted}")
    step = len(clip) // len(found)
    shown = clip.frames[::step][: len(found)]
    columns = math.ceil(math.sqrt(len(shown) * clip.size[1] / clip.size[0]))
    sheet = tiled(shown, columns, GAP)
    sheet.info = {k: v for k, v in shown[0].info.items() if k == "Software"}
    return sheet, side_by_side(found, clip.size, columns)


def side_by_side(layouts: Sequence[Layout], size: tuple[int, int], columns: int, gap: int = GAP) -> Layout:
    """One layout for pictures of `size` that lie row by row on a page, `columns` to a row, `gap` pixels apart."""
    width, height = size[0] + gap, size[1] + gap
    boxes, crops, bases, begin = [], [], [], 0
    for k, layout in enumerate(layouts):
        x, y = gap + k % columns * width, gap + k // columns * height
        boxes.append(layout.visible_boxes() + np.array([x, y, x, y], np.float32))
        crops.append(np.where(layout.crop < 0, -1, layout.crop + begin))
        bases.append(layout.base + begin)
        begin += len(layout.grids)
    return Layout(
        size=(columns * width + gap, -(-len(layouts) // columns) * height + gap),
        boxes=np.concatenate(boxes).astype(np.float32),
        crop=np.concatenate(crops),
        cell=np.concatenate([layout.cell for layout in layouts]),
        grids=tuple(grid for layout in layouts for grid in layout.grids),
        patches=tuple(token for layout in layouts for token in layout.patches),
        patch_grids=tuple(grid for layout in layouts for grid in layout.patch_grids),
        base=layouts[0].base,
        bases=tuple(bases),
    )

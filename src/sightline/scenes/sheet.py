"""Many scenes on one page."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from sightline.errors import ParameterError
from sightline.scenes.scene import Scene


def contact_sheet(scenes: Sequence[Scene], columns: int = 8) -> Image.Image:
    """The pictures row by row, `columns` to a row, with thin white gaps."""
    if not scenes or columns < 1:
        raise ParameterError(f"columns={columns!r}, {len(scenes)} scenes: give at least one scene and one column")
    cell, gap = max(scene.size for scene in scenes), 4
    rows = -(-len(scenes) // columns)
    page = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), (255, 255, 255))
    for k, scene in enumerate(scenes):
        page.paste(scene.image, (gap + k % columns * (cell + gap), gap + k // columns * (cell + gap)))
    return page

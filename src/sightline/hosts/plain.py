"""The plain preprocessing that CLIP began: pad to a square, resize, cut out the centre, one grid of patches."""

from __future__ import annotations

from typing import Any

from sightline.errors import HostError
from sightline.hosts.canvas import Canvas, Part, edge, grid


def preprocessed(processor: Any, size: tuple[int, int], square: bool = False) -> Canvas:
    """The canvas that an image processor of transformers makes of a picture of `size` (width, height).

    square: the processor honours `do_pad` by padding to a square first (LLaVA).
    """
    canvas = Canvas(*size)
    if square and getattr(processor, "do_pad", False):
        canvas = canvas.pad_square()
    if processor.do_resize:
        canvas = canvas.resize(*resized(canvas, processor.size))
    if getattr(processor, "do_center_crop", False):
        width, height = edge(processor.crop_size, "width"), edge(processor.crop_size, "height")
        canvas = centre_crop(canvas, width, height, late=getattr(processor, "backend", "") == "pil")
    return canvas


def resized(canvas: Canvas, size: Any) -> tuple[int, int]:
    """(width, height) after resizing by a processor's `size`: {"height", "width"} or {"shortest_edge"}."""
    shortest = edge(size, "shortest_edge")
    if edge(size, "height") and edge(size, "width"):
        return edge(size, "width"), edge(size, "height")
    if shortest is None or edge(size, "longest_edge"):
        raise HostError(f"image size {size!r} is not understood: 'height' and 'width', or 'shortest_edge' is expected")
    short, long = sorted((canvas.width, canvas.height))
    long = int(shortest * long / short)
    return (shortest, long) if canvas.width <= canvas.height else (long, shortest)


def centre_crop(canvas: Canvas, width: int, height: int, late: bool = False) -> Canvas:
    """Cut out the centre, after padding edges that are too short (`late`: the odd pixel of padding goes left and top)."""
    x, y = max(width - canvas.width, 0), max(height - canvas.height, 0)
    left, top = ((x + 1) // 2, (y + 1) // 2) if late else (x // 2, y // 2)
    canvas = canvas.pad(left, top, x - left, y - top)
    return canvas.crop((canvas.width - width) // 2, (canvas.height - height) // 2, width, height)


def patch_grid(canvas: Canvas, patch: tuple[int, int], crop: int = 0, merge: int = 1) -> tuple[Part, tuple[int, int]]:
    """Tokens of merge x merge patches of `patch` (height, width) pixels, and their grid; a rest at the edges is unseen."""
    rows, columns = canvas.height // (patch[0] * merge), canvas.width // (patch[1] * merge)
    return grid(canvas, crop, rows, columns, (patch[0] * merge, patch[1] * merge), merge), (rows, columns)


def pair(value: Any) -> tuple[int, int]:
    """(height, width) from a number or a pair, as configurations hold patch sizes."""
    return (int(value[0]), int(value[-1])) if isinstance(value, (tuple, list)) else (int(value), int(value))


def fields(inputs: Any) -> Any:
    """Processor outputs as a mapping; a bare tensor is taken as `pixel_values`."""
    return {"pixel_values": inputs} if hasattr(inputs, "shape") else inputs

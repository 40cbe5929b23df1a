"""timm's VisionTransformer (ViT, DeiT, DINO, CLIP, SigLIP, registers ...): class and register tokens, then the patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sightline.errors import HostError
from sightline.hosts.base import ViTHost, register
from sightline.hosts.canvas import Canvas, join
from sightline.hosts.checks import require_count
from sightline.hosts.geometry import Layout
from sightline.hosts.plain import fields, pair, patch_grid, resized


def layouts(processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], model: Any) -> list[Layout]:
    """The patches of every picture (neither class token nor registers), row-major.

    processor: the transform the pictures went through, a data configuration (dict), or None for the model's own.
    """
    require_count("pixel_values", fields(inputs), sizes)
    steps = _steps(processor, model)
    found = []
    for size in sizes:
        canvas = Canvas(*size)
        for step in steps:
            canvas = _after(canvas, step)
        part, grid = patch_grid(canvas, pair(model.patch_embed.patch_size))
        found.append(join(size, [part], [grid], [grid]))
    return found


def _steps(processor: Any, model: Any) -> list[Any]:
    """The transform's steps, in order."""
    if hasattr(processor, "transforms"):
        return list(processor.transforms)
    from timm.data import create_transform, resolve_data_config

    config = processor if processor is not None else resolve_data_config({}, model=model)
    return list(create_transform(**config).transforms)


def _after(canvas: Canvas, step: Any) -> Canvas:
    """The canvas after one step of torchvision or timm; steps that move no pixel leave it as it is."""
    name = type(step).__name__
    if name == "Resize":
        if isinstance(step.size, int) or len(step.size) == 1:
            return canvas.resize(*resized(canvas, {"shortest_edge": pair(step.size)[0]}))
        return canvas.resize(step.size[1], step.size[0])
    if name == "ResizeKeepRatio":
        return _keep_ratio(canvas, pair(step.size), step.longest)
    if name in ("CenterCrop", "CenterCropOrPad"):
        height, width = pair(step.size)
        x, y = max(width - canvas.width, 0), max(height - canvas.height, 0)
        canvas = canvas.pad(x // 2, y // 2, x - x // 2, y - y // 2)
        left, top = round((canvas.width - width) / 2), round((canvas.height - height) / 2)  # half to even, as they do
        return canvas.crop(left, top, width, height)
    if name in ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "Normalize", "ToDtype", "ToImage"):
        return canvas
    raise HostError(f"step {name!r} of the transform is not known: give timm's evaluation transform")


def _keep_ratio(canvas: Canvas, target: tuple[int, int], longest: float) -> Canvas:
    """timm's ResizeKeepRatio without its random parts; target (height, width)."""
    down, across = canvas.height / target[0], canvas.width / target[1]
    ratio = max(down, across) * longest + min(down, across) * (1 - longest)
    return canvas.resize(round(canvas.width / ratio), round(canvas.height / ratio))


TIMM_VIT = register(
    ViTHost(
        "timm_vit",
        ("VisionTransformer",),
        tower_layers="blocks",
        tower_attention="attn",
        fused=True,
        tower_prefix=lambda model: model.num_prefix_tokens,
        layouts=layouts,
    )
)

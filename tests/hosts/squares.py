"""Find a bright square in the visual tokens: a picture's pixels against a layout, through the real processor and tower."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sightline import hosts
from sightline.hosts.geometry import Layout

SUPPORT = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3}
Square = tuple[int, int, int, int]


def make_local(model: torch.nn.Module) -> None:
    """Silence attention and MLP of every tower layer, so that a patch's feature depends on its own pixels only."""
    host = hosts.find(model)
    for layer in hosts.get(model, f"{host.tower}.{host.tower_layers}".strip(".")):
        for module in (hosts.get(layer, host.tower_attention), layer.mlp):
            module.register_forward_hook(lambda _m, _i, out: _zeros(out))


def _zeros(out: Any) -> Any:
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def grey(size: tuple[int, int], square: Square | None = None) -> Image.Image:
    """A grey picture, with a white square x0, y0, x1, y1."""
    image = Image.new("RGB", size, (118, 118, 118))
    if square is not None:
        image.paste((255, 255, 255), square)
    return image


@torch.no_grad()
def visual_tokens(tiny: Any, rows: list[list[Image.Image]]) -> tuple[torch.Tensor, Any]:
    """((sum of n, d) features of all visual tokens of a batch in the order of the prompts, processor outputs)."""
    inputs = tiny.inputs(["What is it?"] * len(rows), rows)
    wanted = inspect.signature(tiny.model.model.get_image_features).parameters
    out = tiny.model.model.get_image_features(**{k: v for k, v in inputs.items() if k in wanted}).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in out]), inputs


@torch.no_grad()
def patch_tokens(tiny: Any, images: list[Image.Image]) -> tuple[torch.Tensor, Any]:
    """((sum of n, d) patch features of a plain vision transformer, inputs)."""
    inputs = tiny.inputs(images)
    host = hosts.find(tiny.model)
    if tiny.processor is None:
        hidden = tiny.model.forward_features(inputs)
    else:
        hidden = hosts.get(tiny.model, host.tower)(inputs["pixel_values"]).last_hidden_state
    return hidden[:, hosts.prefix(tiny.model, host) :].flatten(0, 1), inputs


@dataclass(frozen=True)
class Sight:
    """What a square changed."""

    layout: Layout
    square: Square
    change: np.ndarray  # (n,) size of the change of every token

    @property
    def seen(self) -> np.ndarray:
        """(n,) bool: tokens that changed."""
        return self.change > 1e-4 * max(self.change.max(), 1e-6)


def overlaps(layout: Layout, square: Square, grow: np.ndarray | float = 0.0) -> np.ndarray:
    """(n,) bool: tokens whose boxes overlap the square, grown by `grow` pixels (shrunk when negative)."""
    x0, y0, x1, y1 = layout.boxes.T
    grow = np.broadcast_to(np.asarray(grow, dtype=float), (len(layout),))
    return (x0 < square[2] + grow) & (x1 > square[0] - grow) & (y0 < square[3] + grow) & (y1 > square[1] - grow)


def slack(layout: Layout, cell: int, resample: int, steps: int = 1, mixed: bool = False) -> np.ndarray:
    """(n,) how far beyond the square resampling may carry it, in original pixels.

    cell: pixels of the processed picture along a token; steps: resizes in a row; mixed: tokens mix neighbouring ones.
    """
    sides = (layout.boxes[:, 2:] - layout.boxes[:, :2]).max(axis=1)
    pixel = np.maximum(sides / cell, 1)  # an original or a processed pixel, whichever is larger
    return steps * SUPPORT[resample] * pixel + 0.5 + (1.5 * sides if mixed else 0)


def inner_square(box: np.ndarray, size: tuple[int, int], share: float = 0.7) -> Square | None:
    """Whole pixels in the middle of a token's box; None when none fit."""
    x0, y0, x1, y1 = box
    dx, dy = (x1 - x0) * (1 - share) / 2, (y1 - y0) * (1 - share) / 2
    left, top = int(np.ceil(x0 + dx)), int(np.ceil(y0 + dy))
    right, bottom = int(np.floor(x1 - dx)), int(np.floor(y1 - dy))
    if right <= left or bottom <= top or right > size[0] or bottom > size[1] or left < 0 or top < 0:
        return None
    return left, top, right, bottom

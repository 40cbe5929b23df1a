"""Experiment 4: text-to-image attention with and without the sinks, and whether sinks lie on background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sightline.errors import InputError, check_range
from sightline.explain.observing import Observation, observe

if TYPE_CHECKING:
    from PIL import Image

    from sightline.hosts.geometry import Layout
    from sightline.lvlm import LVLM

LEAST = 0.05  # a token is background when less than this share of its box is object


@dataclass(frozen=True, eq=False)
class TextToImage:
    """Attention maps of one question. L layers, V visual tokens. Tokens that show no pixel count nowhere."""

    layout: Layout
    attention: np.ndarray  # (L, V): mean over text queries and heads
    without: np.ndarray  # (L, V): the same with the sinks' columns at zero
    sinks: np.ndarray  # (L, V) bool
    background: np.ndarray  # (V,) bool
    shown: np.ndarray  # (V,) bool: the token shows a part of the picture

    def counts(self) -> dict[str, np.ndarray]:
        """(L,) ints: "sinks", "sinks on background", "tokens", "background"."""
        sinks = self.sinks & self.shown
        return {
            "sinks": sinks.sum(1),
            "sinks on background": (sinks & self.background).sum(1),
            "tokens": np.full(len(sinks), self.shown.sum()),
            "background": np.full(len(sinks), (self.background & self.shown).sum()),
        }

    def on_objects(self) -> tuple[np.ndarray, np.ndarray]:
        """(L,) share of the attention on the picture that lies on objects: with all tokens, and without the sinks."""
        objects = self.shown & ~self.background
        return tuple(_share(map_, objects, self.shown) for map_ in (self.attention, self.without))


def text_to_image(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    objects: Sequence[np.ndarray],
    *,
    least: float = LEAST,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
) -> list[TextToImage]:
    """Text-to-image attention with and without the sinks, and which tokens are background, of one batch.

    Args:
        lvlm, images, questions, tau, sink_dims: see `observe`.
        objects, least: one mask per picture; see `maps_of`.
    """
    if len(objects) != len(images):
        raise InputError(f"{len(objects)} masks for {len(images)} pictures: give one per picture")
    seen = observe(lvlm, images, questions, tau=tau, sink_dims=sink_dims)
    return [maps_of(one, mask, least) for one, mask in zip(seen, objects, strict=True)]


def maps_of(seen: Observation, objects: np.ndarray, least: float = LEAST) -> TextToImage:
    """Maps of a prompt already seen, with the truth of its picture.

    Args:
        seen: the prompt.
        objects: (height, width) bool: pixels that belong to any object, for the picture in its original size.
        least: a token is background when a smaller share of its box is object.
    """
    share = object_share(seen.layout, objects)
    attention = seen.received.mean(1)
    without = np.where(seen.sinks, 0, attention)
    shown = np.isfinite(share)
    return TextToImage(seen.layout, attention, without, seen.sinks, background(share, least), shown)


def background(share: np.ndarray, least: float = LEAST) -> np.ndarray:
    """(V,) bool from the object share of every token; False for tokens that show nothing."""
    check_range("least", least, 0, 1)
    return np.nan_to_num(share, nan=2.0) < least


def object_share(layout: Layout, objects: np.ndarray) -> np.ndarray:
    """(V,) share of every token's visible box that is object, exact area; NaN for tokens that show no pixel.

    Args:
        layout: where the tokens lie. objects: (height, width) bool in the picture's original size.
    """
    width, height = layout.size
    if objects.shape != (height, width):
        raise InputError(f"the mask has shape {objects.shape}: (height, width) of the picture is {(height, width)}")
    total = np.pad(objects.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # area left of and above a corner
    x0, y0, x1, y1 = layout.visible_boxes().astype(np.float64).T
    covered = _at(total, x1, y1) - _at(total, x0, y1) - _at(total, x1, y0) + _at(total, x0, y0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(covered / ((x1 - x0) * (y1 - y0)), 0, 1)


def _at(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The summed-area table at real corners: linear between pixels, which is exact for whole-pixel masks."""
    nothing = ~(np.isfinite(x) & np.isfinite(y))
    x, y = np.where(nothing, 0, x), np.where(nothing, 0, y)
    i, j = np.minimum(y.astype(int), table.shape[0] - 2), np.minimum(x.astype(int), table.shape[1] - 2)
    v, u = y - i, x - j
    upper = (1 - u) * table[i, j] + u * table[i, j + 1]
    lower = (1 - u) * table[i + 1, j] + u * table[i + 1, j + 1]
    return np.where(nothing, np.nan, (1 - v) * upper + v * lower)


def _share(values: np.ndarray, member: np.ndarray, of: np.ndarray) -> np.ndarray:
    whole = values[:, of].sum(1)
    return np.where(whole > 0, values[:, member].sum(1) / np.where(whole > 0, whole, 1), np.nan)

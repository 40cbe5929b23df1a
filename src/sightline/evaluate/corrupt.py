"""Corrupted pictures by severity 1 to 5, after ImageNet-C (Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261).

Strengths are theirs; lengths in pixels, which are meant for a side of 224, scale with the picture. Everything random comes from the
seed: the same picture, corruption, severity and seed give the same pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from sightline.errors import ParameterError, UnknownNameError, nearest

SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation of Gaussian noise, of 1
    "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of values that are black or white
    "blur": (1, 2, 3, 4, 6),  # standard deviation of a Gaussian, pixels of 224
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # what is left of the distance from the mean
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value, of 1
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # of the side
    "jpeg": (25, 18, 15, 10, 7),  # quality
}


def _noise(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return x + strength * rng.standard_normal(x.shape)


def _impulse(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.random(x.shape)
    return np.where(drawn < strength / 2, 0.0, np.where(drawn < strength, 1.0, x))


def _contrast(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1))
    return (x - mean) * strength + mean


def _brightness(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Raises the value (largest channel) and keeps hue and saturation."""
    value = x.max(-1, keepdims=True)
    grey = np.broadcast_to(np.minimum(value + strength, 1), x.shape)
    scaled = np.divide(x, value, out=np.ones_like(x), where=value > 0)
    return grey * scaled


def _blur(picture: Image.Image, strength: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(strength * min(picture.size) / 224))


def _pixelate(picture: Image.Image, strength: float) -> Image.Image:
    small = picture.resize([max(1, int(side * strength)) for side in picture.size], Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _jpeg(picture: Image.Image, strength: float) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(strength))
    return Image.open(buffer).convert("RGB")


ARRAYS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "noise": _noise, "impulse": _impulse, "contrast": _contrast, "brightness": _brightness,
}  # fmt: skip
PICTURES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "blur": _blur, "pixelate": _pixelate, "jpeg": _jpeg,
}  # fmt: skip


def corrupt(picture: Image.Image, name: str, severity: int, seed: int = 0) -> Image.Image:
    """The picture, RGB, with a corruption of STRENGTHS. `severity` is 1 (mild) to 5.

    Raises:
        UnknownNameError: no such corruption. ParameterError: severity is out of range.
    """
    if name not in STRENGTHS:
        raise UnknownNameError(f"no corruption {name!r}: {nearest(str(name), list(STRENGTHS))}")
    if severity not in SEVERITIES:
        raise ParameterError(f"severity={severity!r} is out of range: choose a whole number in [1, 5]")
    picture, strength = picture.convert("RGB"), STRENGTHS[name][severity - 1]
    if name in PICTURES:
        return PICTURES[name](picture, strength)
    rng = np.random.Generator(np.random.PCG64([seed, list(STRENGTHS).index(name)]))
    changed = ARRAYS[name](np.asarray(picture) / 255, strength, rng)
    return Image.fromarray((255 * np.clip(changed, 0, 1)).round().astype(np.uint8))

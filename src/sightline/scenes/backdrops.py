"""What is behind the objects: sky and ground, wall and counter, textures, light. Muted, so that objects stand out."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from sightline.scenes.pen import RGB, mix

# context -> (above the horizon, below it), each a few colours to choose from
PALETTES: dict[str, tuple[tuple[RGB, ...], tuple[RGB, ...]]] = {
    "kitchen": (
        ((222, 226, 220), (204, 218, 222), (230, 220, 200)),
        ((184, 160, 134), (170, 172, 174), (196, 180, 160)),
    ),
    "street": (
        ((186, 204, 218), (204, 208, 210), (176, 190, 206)),
        ((140, 141, 144), (128, 130, 136), (152, 148, 144)),
    ),
    "desk": (((214, 214, 206), (198, 208, 214), (216, 206, 196)), ((190, 158, 122), (172, 146, 120), (206, 186, 160))),
    "garden": (
        ((190, 214, 228), (206, 218, 224), (180, 202, 222)),
        ((158, 184, 122), (146, 172, 116), (170, 188, 132)),
    ),
    "beach": (((178, 212, 230), (196, 220, 232), (222, 210, 204)), ((228, 208, 164), (218, 200, 160), (234, 218, 182))),
    "bedroom": (
        ((218, 206, 212), (206, 208, 222), (222, 216, 200)),
        ((176, 156, 146), (160, 152, 158), (188, 170, 150)),
    ),
    "farm": (((196, 214, 226), (212, 216, 214), (184, 206, 220)), ((186, 180, 112), (174, 178, 116), (194, 172, 120))),
    "harbour": (
        ((188, 206, 216), (200, 208, 212), (172, 196, 212)),
        ((116, 158, 178), (126, 164, 176), (108, 150, 172)),
    ),
}


def _shade(colour: RGB, amount: float) -> RGB:
    return mix(colour, (255, 255, 255) if amount > 0 else (0, 0, 0), abs(amount))


def _indoor(ink: ImageDraw.ImageDraw, name: str, side: int, y: int, wall: RGB, rng: np.random.Generator) -> None:
    if name == "kitchen":
        step = side / (6 + int(rng.integers(4)))
        for k in range(1, 12):
            ink.line([(0, y - k * step), (side, y - k * step)], fill=_shade(wall, -0.07), width=max(1, side // 170))
            ink.line([(k * step, 0), (k * step, y)], fill=_shade(wall, -0.07), width=max(1, side // 170))
    elif name == "bedroom":
        step = side / (5 + int(rng.integers(5)))
        for k in range(12):
            ink.rectangle([k * step, 0, (k + 0.5) * step, y], fill=_shade(wall, -0.045))
    else:
        x, w = rng.random() * 0.7, 0.25 + 0.15 * rng.random()
        ink.rectangle([x * side, 0, (x + w) * side, y * 0.7], fill=_shade(wall, 0.35))
        ink.rectangle([(x + w / 2 - 0.01) * side, 0, (x + w / 2 + 0.01) * side, y * 0.7], fill=_shade(wall, -0.12))
    ink.rectangle([0, y - side * 0.02, side, y], fill=_shade(wall, -0.22))


def _outdoor(ink: ImageDraw.ImageDraw, name: str, side: int, y: int, sky: RGB, rng: np.random.Generator) -> None:
    if name == "street":
        x = -0.1
        while x < 1:
            w, h = 0.12 + 0.16 * rng.random(), 0.4 + 0.5 * rng.random()
            ink.rectangle([x * side, y * (1 - h), (x + w) * side, y], fill=_shade(sky, -0.10 - 0.14 * rng.random()))
            x += w
        return
    far = {"beach": (140, 186, 204), "harbour": (160, 172, 178)}.get(name, (164, 184, 148))
    if name == "beach":
        ink.rectangle([0, y * 0.72, side, y], fill=far)
        return
    phase, height = 6.3 * rng.random(), 0.10 + 0.12 * rng.random()
    xs = np.linspace(0, 1, 25)
    ys = y - side * height * (0.5 + 0.5 * np.sin(phase + xs * (4 + 5 * rng.random())))
    ink.polygon(
        [(0, y + 1), *[(float(a * side), float(b)) for a, b in zip(xs, ys, strict=True)], (side, y + 1)], fill=far
    )


def _ground(ink: ImageDraw.ImageDraw, name: str, side: int, y: int, ground: RGB, rng: np.random.Generator) -> None:
    """Texture of the ground: planks, lanes, tufts, ripples; patches that resemble no kind."""
    depth = side - y
    if name in ("kitchen", "desk", "bedroom"):
        ink.rectangle([0, y, side, y + depth * 0.04], fill=_shade(ground, 0.25))
        for k in range(1, 4):
            ink.line([(0, y + depth * k * k / 12), (side, y + depth * k * k / 12)], fill=_shade(ground, -0.08), width=2)
        return
    if name == "street":
        ink.rectangle([0, y, side, y + depth * 0.16], fill=_shade(ground, 0.22))
        ink.line(
            [(0, y + depth * 0.17), (side, y + depth * 0.17)], fill=_shade(ground, -0.2), width=max(1, side // 110)
        )
        return
    tone = _shade(ground, -0.10 if name != "harbour" else 0.18)
    for _ in range(26):
        px, depth_at = rng.random() * side, rng.random()
        py, w = y + depth * depth_at, side * (0.02 + 0.06 * depth_at)
        ink.line([(px, py), (px + w, py)], fill=tone, width=max(1, side // 150))


def backdrop(name: str, side: int, horizon: float, rng: np.random.Generator) -> Image.Image:
    """The empty place, `side` x `side` pixels, ground from `horizon` (fraction of the height) down."""
    above, below = PALETTES[name]
    wall, ground = above[int(rng.integers(len(above)))], below[int(rng.integers(len(below)))]
    y = round(horizon * side)
    picture = Image.new("RGB", (side, side), wall)
    ink = ImageDraw.Draw(picture)
    scenery = _indoor if name in ("kitchen", "desk", "bedroom") else _outdoor
    scenery(ink, name, side, y, wall, rng)
    ink.rectangle([0, y, side, side], fill=ground)
    _ground(ink, name, side, y, ground, rng)
    return ImageChops.multiply(picture, _blotches(side, rng))


def _blotches(side: int, rng: np.random.Generator) -> Image.Image:
    """Slow unevenness of the light on walls and ground."""
    cells = rng.integers(212, 256, (7, 7), dtype=np.uint8)
    smooth = Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR)
    return Image.merge("RGB", (smooth, smooth, smooth))


def light(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, direction and tint of the light plus sensor grain. (S, S, 3) uint8 -> (S, S, 3) uint8."""
    side = pixels.shape[0]
    level = 0.58 + 0.14 * rng.random() if rng.random() < 0.18 else 0.88 + 0.16 * rng.random()
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    slope_x, slope_y = (float(v) for v in rng.uniform(-0.10, 0.10, 2))
    gain = level * (1 + slope_x * ramp[None, :, None] + slope_y * ramp[:, None, None])  # (S, S, 1)
    tint = 1 + 0.05 * float(rng.uniform(-1, 1)) * np.array([1, 0, -1], dtype=np.float32)
    grain = rng.integers(-5, 6, (side, side, 1)).astype(np.float32)
    return np.clip(pixels * (gain * tint) + grain + 0.5, 0, 255).astype(np.uint8)

"""What is behind the objects: sky and ground, wall and counter, textures, light. Muted, so that objects stand out."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from sightline.scenes.pen import RGB, mix

INDOORS = ("kitchen", "desk", "bedroom")
# Each context: colours above the horizon | colours below it, one of each is chosen.
_TABLE = """
kitchen  dee4dc ccdcde ead0b4 d4e0d0 | c09a74 aaacae c8b094 b4a89c
street   bad0e0 ccd2d6 b0c2d4 d8d0c8 | 8c8d90 80828a 989490 8a8684
desk     dadad0 c6d4dc dccebe d0dccc | c49c70 ac9278 d2ba96 b48c6c
garden   bedaea ced8e4 b4d0e4 dce0e2 | 9ebc78 92b072 aabe82 86aa6e
beach    b2d8ec c4e0ec dcd6d2 a8d0ea | e6d2a4 dac8a0 ecdcb8 e0c896
bedroom  dcd0d6 ced2e2 e0d8c8 d2dcd6 | b09a8e a098a0 bea890 a8a090
farm     c4dae6 d6dcd8 b8d2e2 cce0ea | bab470 aeb074 c4ae78 a8b87c
harbour  bcd2de c8d2d6 acc8da d4d4d2 | 749eb4 7ea6b2 6c98ae 82a2b8
"""


def _colour(code: str) -> RGB:
    return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)


def _palettes() -> dict[str, tuple[list[RGB], list[RGB]]]:
    table = {}
    for row in _TABLE.strip().splitlines():
        above, below = row.split("|")
        name, *codes = above.split()
        table[name] = ([_colour(code) for code in codes], [_colour(code) for code in below.split()])
    return table


PALETTES = _palettes()


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


def _windows(ink: ImageDraw.ImageDraw, x: float, y: float, w: float, foot: float, fill: RGB) -> None:
    """Two columns of windows on a house front."""
    floor = 0.30 * w
    while y + floor * 1.4 < foot:
        for column in (0.2, 0.58):
            ink.rectangle([x + column * w, y + floor * 0.5, x + (column + 0.22) * w, y + floor * 1.1], fill=fill)
        y += floor


def _clouds(ink: ImageDraw.ImageDraw, side: int, y: int, sky: RGB, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(0, 4))):
        x, top, w = rng.random() * side, rng.random() * y * 0.5, side * (0.10 + 0.14 * rng.random())
        for dx, dy, scale in ((0, 0, 1.0), (0.45, -0.12, 0.8), (0.8, 0.04, 0.9)):
            cx, cy, r = x + dx * w, top + dy * w, w * scale / 2
            ink.ellipse([cx - r, cy - r * 0.42, cx + r, cy + r * 0.42], fill=_shade(sky, 0.30))


def _outdoor(ink: ImageDraw.ImageDraw, name: str, side: int, y: int, sky: RGB, rng: np.random.Generator) -> None:
    _clouds(ink, side, y, sky, rng)
    if name == "street":
        x = -0.1
        while x < 1:
            w, h = 0.12 + 0.16 * rng.random(), 0.4 + 0.5 * rng.random()
            tone = _shade(sky, -0.12 - 0.14 * rng.random())
            ink.rectangle([x * side, y * (1 - h), (x + w) * side, y], fill=tone)
            _windows(ink, x * side, y * (1 - h), w * side, y, _shade(tone, 0.16))
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


def _patches(ink: ImageDraw.ImageDraw, side: int, y: int, ground: RGB, rng: np.random.Generator) -> None:
    """Faint flat stains of uneven outline: clutter that resembles no kind."""
    for _ in range(int(rng.integers(1, 5))):
        cx, cy, r = rng.random() * side, y + (side - y) * rng.random(), side * (0.05 + 0.09 * rng.random())
        radii = r * rng.uniform(0.6, 1.15, 9)
        angles = np.arange(9) * (2 * np.pi / 9)
        xs, ys = cx + radii * np.cos(angles), np.maximum(cy + 0.36 * radii * np.sin(angles), y)
        outline = [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]
        ink.polygon(outline, fill=_shade(ground, float(rng.choice([-0.10, -0.06, 0.10]))))


def _ground(ink: ImageDraw.ImageDraw, name: str, side: int, y: int, ground: RGB, rng: np.random.Generator) -> None:
    """Texture of the ground: planks, road, tufts, ripples."""
    depth, thin = side - y, max(1, side // 150)
    _patches(ink, side, y, ground, rng)
    if name in INDOORS:
        ink.rectangle([0, y, side, y + depth * 0.04], fill=_shade(ground, 0.25))
        for k in range(1, 4):
            at = y + depth * k * k / 12
            ink.line([(0, at), (side, at)], fill=_shade(ground, -0.09), width=thin)
        return
    if name == "street":
        ink.rectangle([0, y, side, y + depth * 0.16], fill=_shade(ground, 0.25))
        ink.rectangle([0, y + depth * 0.16, side, y + depth * 0.19], fill=_shade(ground, -0.2))
        start = rng.random() * 0.2
        for k in range(-1, 6):
            x = side * (start + k * 0.2)
            ink.rectangle([x, y + depth * 0.58, x + side * 0.10, y + depth * 0.605], fill=_shade(ground, 0.35))
        return
    tone = _shade(ground, -0.13 if name != "harbour" else 0.22)
    for _ in range(30):
        px, depth_at = rng.random() * side, rng.random()
        py, w = y + depth * depth_at, side * (0.02 + 0.06 * depth_at)
        if name == "garden":
            for lean in (-0.3, 0, 0.3):
                ink.line([(px, py), (px + lean * w, py - w * 0.5)], fill=tone, width=thin)
        else:
            ink.line([(px, py), (px + w, py)], fill=tone, width=thin)


def backdrop(name: str, side: int, horizon: float, rng: np.random.Generator) -> Image.Image:
    """The empty place, `side` x `side` pixels, ground from `horizon` (fraction of the height) down."""
    above, below = PALETTES[name]
    wall, ground = above[int(rng.integers(len(above)))], below[int(rng.integers(len(below)))]
    y = round(horizon * side)
    picture = Image.new("RGB", (side, side), wall)
    ink = ImageDraw.Draw(picture)
    scenery = _indoor if name in INDOORS else _outdoor
    scenery(ink, name, side, y, wall, rng)
    ink.rectangle([0, y, side, side], fill=ground)
    _ground(ink, name, side, y, ground, rng)
    return picture


def light(pixels: np.ndarray, lean: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, direction, unevenness and tint of the light plus grain. (S, S, 3) uint8 -> (S, S, 3) uint8.

    `lean` in [-1, 1] says from where it comes: the left is brighter where it is negative.
    """
    side = pixels.shape[0]
    level = 0.66 + 0.14 * rng.random() if rng.random() < 0.18 else 0.94 + 0.14 * rng.random()
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    gain = level * (1 + 0.09 * lean * ramp[None, :] - 0.06 * float(rng.random()) * ramp[:, None])  # (S, S)
    cells = Image.fromarray(rng.integers(220, 256, (6, 6), dtype=np.uint8))
    gain = gain * (np.asarray(cells.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32) / 248)
    warm = 0.05 * float(rng.uniform(-1, 1))
    grain = rng.integers(-4, 5, (side, side), dtype=np.int8).astype(np.float32) + 0.5
    lit = np.empty_like(pixels)
    for channel, tint in enumerate((1 + warm, 1.0, 1 - warm)):
        lit[..., channel] = np.clip(pixels[..., channel] * (gain * np.float32(tint)) + grain, 0, 255)
    return lit

"""Draws a scene from a seed: choose, place, drop what is too hidden, paint back to front, light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sightline.errors import ParameterError, UnknownNameError, nearest
from sightline.images import SOFTWARE
from sightline.scenes import shapes_home, shapes_outdoors
from sightline.scenes.backdrops import backdrop, light
from sightline.scenes.contexts import CONTEXTS, Context, sample_colour, sample_kinds
from sightline.scenes.kinds import COLOURS, KINDS
from sightline.scenes.pen import Pen
from sightline.scenes.scene import Object, Scene

DRAWINGS = {**shapes_home.DRAWINGS, **shapes_outdoors.DRAWINGS}
SMALL, LARGE = (0.135, 0.17), (0.27, 0.40)  # longest side, fraction of the picture
LEAST_VISIBLE = {"small": 0.6, "large": 0.35}  # a half-hidden small thing could not be named at a glance
LEAST_PIXELS = 14  # at 112 x 112, in proportion elsewhere
RIM = 150  # opacity of the thin dark rim around objects, of 255
MARK = 0.024  # radius of a mark, fraction of the picture


@dataclass
class Plan:
    """Where an object will be: top-left corner, width and height as fractions of the picture."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    w: float
    h: float
    stands: bool
    flip: bool
    mark: str | None


def sample_plan(rng: np.random.Generator, kind: str, horizon: float) -> Plan:
    size = "small" if rng.random() < 0.36 else "large"
    low, high = SMALL if size == "small" else LARGE
    side = (low + (high - low) * rng.random()) * (KINDS[kind].scale if size == "large" else 1.0)
    aspect = KINDS[kind].aspect
    w, h = (side, side / aspect) if aspect >= 1 else (side * aspect, side)
    stands = rng.random() >= KINDS[kind].air
    colour = sample_colour(rng)
    mark = sample_colour(rng, other_than=colour) if size == "large" and rng.random() < 0.4 else None
    return Plan(kind, colour, size, 0, 0, w, h, stands, rng.random() < 0.5, mark)


def place_plan(rng: np.random.Generator, plan: Plan, placed: list[Plan], horizon: float) -> bool:
    """Find a free spot for `plan`; False if there is none after some tries."""
    for _ in range(14):
        plan.x = 0.01 + rng.random() * (0.98 - plan.w)
        if plan.stands:
            foot = max(horizon + 0.03, plan.h + 0.02)
            plan.y = foot + rng.random() * (0.985 - foot) - plan.h
        else:
            plan.y = 0.02 + rng.random() * max(horizon - plan.h - 0.04, 0.01)
        if all(_overlap(plan, other) < 0.28 for other in placed):
            return True
    return False


def _overlap(a: Plan, b: Plan) -> float:
    """Shared area of two boxes as a fraction of the smaller box."""
    w = min(a.x + a.w, b.x + b.w) - max(a.x, b.x)
    h = min(a.y + a.h, b.y + b.h) - max(a.y, b.y)
    return w * h / min(a.w * a.h, b.w * b.h) if w > 0 and h > 0 else 0.0


def ink_plan(plan: Plan, side: int, factor: int) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """Colour patch, silhouette and corner of one object on the supersampled canvas."""
    w, h = max(2, round(plan.w * side)), max(2, round(plan.h * side))
    pen = Pen(w, h, COLOURS[plan.colour], factor, plan.flip)
    DRAWINGS[plan.kind](pen)
    return pen.patch, pen.mask, (min(round(plan.x * side), side - w), min(round(plan.y * side), side - h))


def owner_map(inked: list, side: int) -> np.ndarray:
    """Which object owns each supersampled pixel: (side, side), 0 is background, k+1 the k-th plan."""
    owner = Image.new("L", (side, side), 0)
    for k, (_, mask, corner) in enumerate(inked):
        owner.paste(k + 1, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return np.asarray(owner)


def visible_mask(owners: np.ndarray, k: int, box: tuple[int, int, int, int], factor: int) -> np.ndarray:
    """Mask of the picture's pixels that object `k` covers by at least half; `box` bounds it, supersampled."""
    size = owners.shape[0] // factor
    mask = np.zeros((size, size), dtype=bool)
    x0, y0 = box[0] // factor, box[1] // factor
    x1, y1 = min(-(-box[2] // factor), size), min(-(-box[3] // factor), size)
    own = owners[y0 * factor : y1 * factor, x0 * factor : x1 * factor] == k + 1
    covered = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
    for dy in range(factor):
        for dx in range(factor):
            covered += own[dy::factor, dx::factor]
    mask[y0:y1, x0:x1] = covered * 2 >= factor * factor
    return mask


def settle(masks: list[np.ndarray]) -> list[np.ndarray]:
    """Give pixels that two objects cover by exactly half (possible where `factor` is even) to the front one."""
    for k, mask in enumerate(masks):
        for front in masks[k + 1 :]:
            mask &= ~front
    return masks


def _drop_hidden(plans: list[Plan], side: int, factor: int):
    """Remove, one at a time, what is hidden or tiny, until everything left can be seen."""
    inked = [ink_plan(plan, side, factor) for plan in plans]
    least = LEAST_PIXELS * (side / factor / 112) ** 2
    while True:
        owners = owner_map(inked, side)
        shares = Image.fromarray(owners).histogram()[1:]
        masks = []
        for k, (_, mask, (x, y)) in enumerate(inked):
            masks.append(visible_mask(owners, k, (x, y, x + mask.width, y + mask.height), factor))
            if shares[k] < LEAST_VISIBLE[plans[k].size] * mask.histogram()[255] or masks[k].sum() < least:
                del plans[k], inked[k]
                break
        else:
            return inked, owners, settle(masks) if factor % 2 == 0 else masks


def _shadows(plans: list[Plan], side: int, lean: float) -> Image.Image:
    """Soft shadow layer under everything that stands, as opacity."""
    small = side // 3
    layer = Image.new("L", (small, small), 0)
    ink = ImageDraw.Draw(layer)
    for plan in plans:
        if plan.stands:
            w = plan.w * small
            x, y, r = plan.x * small - 0.14 * lean * w, (plan.y + plan.h) * small, max(w * 0.12, 1.5)
            ink.ellipse([x - 0.04 * w, y - r, x + 1.04 * w, y + r * 0.8], fill=120)
    return layer.filter(ImageFilter.BoxBlur(2)).resize((side, side), Image.Resampling.BILINEAR)


def _mark(canvas: Image.Image, plan: Plan, k: int, owners: np.ndarray, side: int):
    """Paint the mark of a plan if nearly all of it shows on the object; its box in supersampled pixels, or None."""
    u, v = KINDS[plan.kind].spot
    x, y = (plan.x + (1 - u if plan.flip else u) * plan.w) * side, (plan.y + v * plan.h) * side
    r = MARK * side
    box = (round(x - r), round(y - r), round(x + r), round(y + r))
    inside = owners[max(box[1], 0) : box[3] + 1, max(box[0], 0) : box[2] + 1] == k + 1
    if inside.size == 0 or inside.mean() < 0.72:
        return None
    ink = ImageDraw.Draw(canvas)
    rim = (30, 30, 34) if plan.mark != "black" else (235, 235, 235)
    ink.ellipse(box, fill=rim)
    edge = max(1, round(side / 330))
    ink.ellipse((box[0] + edge, box[1] + edge, box[2] - edge, box[3] - edge), fill=COLOURS[plan.mark])
    return box


def _rim(mask: Image.Image) -> Image.Image:
    """The silhouette grown by one supersampled pixel on every side, as opacity."""
    grown = np.pad(np.asarray(mask) // 255, 2)
    grown = np.maximum(np.maximum(grown[:, :-2], grown[:, 1:-1]), grown[:, 2:])
    grown = np.maximum(np.maximum(grown[:-2], grown[1:-1]), grown[2:])
    return Image.fromarray(grown * np.uint8(RIM))


def paint(canvas: Image.Image, plans: list[Plan], inked: list, owners: np.ndarray, side: int, lean: float) -> list:
    """Paste the objects back to front, each with a thin dark rim; the boxes of their marks."""
    canvas.paste((46, 42, 44), (0, 0), _shadows(plans, side, lean))
    boxes = []
    for k, (plan, (patch, mask, (x, y))) in enumerate(zip(plans, inked, strict=True)):
        canvas.paste((28, 26, 30), (x - 1, y - 1), _rim(mask))
        canvas.paste(patch, (x, y), mask)
        boxes.append(_mark(canvas, plan, k, owners, side) if plan.mark else None)
    return boxes


def check_arguments(seed: int, context: str | None, size: int, objects: tuple[int, int] | None) -> tuple[int, int]:
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise ParameterError(f"seed={seed!r} is out of range: choose a whole number in [0, 2**63)")
    if context is not None and context not in CONTEXTS:
        raise UnknownNameError(f"no context {context!r}: {nearest(str(context), list(CONTEXTS))}")
    if not isinstance(size, (int, np.integer)) or not 56 <= size <= 1024:
        raise ParameterError(f"size={size!r} is out of range: choose a whole number of pixels in [56, 1024]")
    low, high = objects if objects is not None else (3, 7)
    if not 0 <= low <= high <= 12:
        raise ParameterError(f"objects={objects!r} is out of range: choose (least, most) with 0 <= least <= most <= 12")
    return low, high


def draw(seed: int, *, context: str | None = None, size: int = 112, objects: tuple[int, int] | None = (3, 7)) -> Scene:
    """The scene of a seed: the same arguments give the same truth everywhere, and the same pixels with the same Pillow.

    Other versions of Pillow (10.3 to 13 compared) change fewer than one value in 10 000, at edges of lines and ovals.

    `context` is drawn from CONTEXTS unless given; `size` is the side in pixels; `objects` is the range of how many
    objects are tried (None is (3, 7)), of which a few are dropped when they find no place or would be hidden.
    Raises ParameterError or UnknownNameError.
    """
    low, high = check_arguments(seed, context, size, objects)
    rng = np.random.Generator(np.random.PCG64(int(seed)))
    drawn = list(CONTEXTS)[int(rng.integers(len(CONTEXTS)))]
    place: Context = CONTEXTS[context or drawn]
    factor = 3 if size <= 160 else 2
    side = size * factor
    horizon = place.horizon[0] + (place.horizon[1] - place.horizon[0]) * rng.random()
    plans: list[Plan] = []
    for kind in sample_kinds(rng, place, int(rng.integers(low, high + 1))):
        plan = sample_plan(rng, kind, horizon)
        if place_plan(rng, plan, plans, horizon):
            plans.append(plan)
    plans.sort(key=lambda plan: (plan.stands, plan.y + plan.h))
    inked, owners, masks = _drop_hidden(plans, side, factor)
    canvas = backdrop(place.name, side, horizon, rng)
    lean = float(rng.uniform(-1, 1))
    marks = paint(canvas, plans, inked, owners, side, lean)
    pixels = light(np.asarray(canvas.reduce(factor)), lean, rng)
    things = [_object(*parts, factor) for parts in zip(plans, masks, marks, strict=True)]
    image = Image.fromarray(pixels)
    image.info["Software"] = SOFTWARE
    return Scene(int(seed), place.name, int(size), image, tuple(reversed(things)))


def _object(plan: Plan, mask: np.ndarray, mark_box: tuple | None, factor: int) -> Object:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    spot = tuple(v / factor for v in mark_box) if mark_box else None
    return Object(plan.kind, plan.colour, plan.size, mask, box, plan.mark if mark_box else None, spot)

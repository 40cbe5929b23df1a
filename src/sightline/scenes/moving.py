"""Draws a film from a seed: a place that stands still, and things that stay, move, come, go and pass behind each other.

Everything that moves does so along the time u in [0, 1]; frame i of T is the picture at u = i / (T - 1). So the number of
frames only says how finely the same film is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sightline.errors import ParameterError
from sightline.images import SOFTWARE
from sightline.scenes.backdrops import backdrop, light
from sightline.scenes.contexts import CONTEXTS, pick, sample_kinds
from sightline.scenes.drawing import (
    LEAST_PIXELS,
    Plan,
    check_arguments,
    ink_plan,
    owner_map,
    paint,
    place_plan,
    sample_plan,
    settle,
    visible_mask,
)
from sightline.scenes.film import CLEAR, Event, Film, Track

PATHS = {"still": 3.0, "moves": 4.0, "enters": 2.0, "leaves": 2.0, "appears": 2.0, "vanishes": 2.0}
PASSED = 0.3  # share of a thing that another must cover at once to pass it
BESIDE = 0.02  # most that may be covered before and after
LEAST_SEEN = 0.2  # share of the frames in which a thing must be in view
FRAMES = (2, 512)


@dataclass(frozen=True)
class _Mover:
    """A planned thing and its way: corner (x, y) at the times `u`, straight in between; there during [since, until)."""

    plan: Plan
    path: str
    direction: str | None
    u: tuple[float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    since: float = -1.0
    until: float = 2.0

    def at(self, u: float) -> Plan | None:
        """The plan with its corner at time u; None when the thing is not there."""
        if not self.since <= u < self.until:
            return None
        return replace(self.plan, x=float(np.interp(u, self.u, self.x)), y=float(np.interp(u, self.u, self.y)))


def _mover(rng: np.random.Generator, plan: Plan, horizon: float) -> _Mover:
    """A way for a thing that has its place, which is where it rests or about the middle of its way."""
    path, begin, sign = pick(rng, PATHS), 0.05 + 0.55 * rng.random(), 1 if rng.random() < 0.5 else -1
    upright, reach, lag = rng.random() < 0.5, 0.4 + 0.5 * rng.random(), 0.15 * rng.random()
    x, y, w = plan.x, plan.y, plan.w
    rest = ((0.0, 1.0), (x, x), (y, y))
    side, before, behind = ("right", -w - 0.02, 1.02) if sign > 0 else ("left", 1.02, -w - 0.02)
    if path == "appears":
        return _Mover(plan, path, None, *rest, since=0.1 + begin)
    if path == "vanishes":
        return _Mover(plan, path, None, *rest, until=0.25 + begin)
    if path == "enters":
        return _Mover(plan, path, side, (begin, begin + 0.35), (before, x), (y, y))
    if path == "leaves":
        return _Mover(plan, path, side, (begin, begin + 0.35), (x, behind), (y, y))
    if path == "moves":
        times = (lag, 1 - lag)
        if upright and not plan.stands and horizon - plan.h > 0.25:
            return _Mover(
                plan, path, "down" if sign > 0 else "up", times, (x, x), _stretch(y, plan.h, 1, sign, horizon)
            )
        return _Mover(plan, path, side, times, _stretch(x, w, reach, sign, 1.0), (y, y))
    return _Mover(plan, "still", None, *rest)


def _stretch(at: float, length: float, reach: float, sign: int, end: float) -> tuple[float, float]:
    """From where to where a thing of `length` moves, by `reach` at most, around `at` and inside [0, end]."""
    low, high = 0.01, end - 0.01 - length
    reach = min(reach, high - low)
    start = float(np.clip(at - reach / 2, low, high - reach))
    return (start, start + reach) if sign > 0 else (start + reach, start)


@dataclass
class _Frame:
    """One moment, supersampled: what is drawn, and who owns each pixel."""

    which: list[int]  # movers present, back to front
    plans: list[Plan]
    inked: list  # (patch, silhouette, corner) of each
    owners: np.ndarray  # (side, side), 0 background, k + 1 the k-th present


def _moment(movers: list[_Mover], inked: list, u: float, side: int) -> _Frame:
    now = [(k, plan) for k, plan in enumerate(m.at(u) for m in movers) if plan is not None]
    placed = [(*inked[k][:2], (round(plan.x * side), round(plan.y * side))) for k, plan in now]
    return _Frame([k for k, _ in now], [plan for _, plan in now], placed, owner_map(placed, side))


@dataclass
class _Seen:
    """What can be seen of N movers in T frames."""

    masks: np.ndarray  # (N, T, size, size) bool
    shares: np.ndarray  # (N, T) visible share of each thing
    covers: np.ndarray  # (N, N, T) share of the first that the second covers


def _watch(frames: list[_Frame], inked: list, side: int, factor: int) -> _Seen:
    count, size = len(inked), side // factor
    whole = [mask.histogram()[255] for _, mask, _ in inked]
    seen = _Seen(
        np.zeros((count, len(frames), size, size), bool),
        np.zeros((count, len(frames)), np.float32),
        np.zeros((count, count, len(frames)), np.float32),
    )
    for t, frame in enumerate(frames):
        masks = []
        for k, (i, (_, shape, corner)) in enumerate(zip(frame.which, frame.inked, strict=True)):
            box, inside = _window(shape, corner, side)
            own = frame.owners[box[1] : box[3], box[0] : box[2]]
            found = np.bincount(own[inside], minlength=len(frame.which) + 1)  # who covers its silhouette
            masks.append(visible_mask(frame.owners, k, box, factor))
            seen.shares[i, t] = found[k + 1] / whole[i]
            for other, j in enumerate(frame.which):
                seen.covers[i, j, t] = 0 if i == j else found[other + 1] / whole[i]
        for i, mask in zip(frame.which, settle(masks) if factor % 2 == 0 else masks, strict=True):
            seen.masks[i, t] = mask
    seen.shares[~seen.masks.any((2, 3))] = 0
    return seen


def _window(shape: Image.Image, corner: tuple[int, int], side: int) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """The part of the canvas (x0, y0, x1, y1) that a silhouette can touch, and the silhouette there, bool."""
    x, y = corner
    x0, y0 = min(max(x, 0), side), min(max(y, 0), side)
    x1, y1 = max(min(x + shape.width, side), x0), max(min(y + shape.height, side), y0)
    return (x0, y0, x1, y1), np.asarray(shape)[y0 - y : y1 - y, x0 - x : x1 - x] > 0


def _unfit(seen: _Seen, least: float) -> int | None:
    """The first thing that is seen too little, or neither here nor gone in the first or last frame; None: all are fit."""
    for i, share in enumerate(seen.shares):
        clear = share >= CLEAR
        area = seen.masks[i].sum((1, 2))
        ends = all(share[t] == 0 or clear[t] for t in (0, -1))
        if clear.mean() < LEAST_SEEN or share.max() < 0.9 or not ends or area[clear].min() < least:
            return i
    return None


def _events(movers: list[_Mover], tracks: list[Track], covers: np.ndarray) -> list[Event]:
    """What happens, in order of time. Numbers are those of `tracks`, which has the order of `movers`."""
    found = []
    for i, (mover, track) in enumerate(zip(movers, tracks, strict=True)):
        if mover.path in ("enters", "appears"):
            found.append(Event(track.first, mover.path, i))
        elif mover.path in ("leaves", "vanishes"):
            found.append(Event(track.last + 1, mover.path, i))
        for j in range(len(movers)):
            cover = covers[i, j]
            peak = int(cover.argmax())
            beside = (cover <= BESIDE) & (track.shares >= CLEAR)
            if cover[peak] >= PASSED and beside[:peak].any() and beside[peak:].any():
                if mover.direction:
                    found.append(Event(peak, "passes behind", i, j))
                elif movers[j].direction:
                    found.append(Event(peak, "passes in front of", j, i))
    return sorted(found, key=lambda e: (e.frame, e.track, e.what))


def film(
    seed: int,
    *,
    context: str | None = None,
    size: int = 112,
    frames: int = 32,
    objects: tuple[int, int] | None = (3, 6),
) -> Film:
    """The film of a seed: the same arguments give the same truth everywhere, and the same pixels with the same Pillow.

    Args:
        seed, context, size: as in `draw`.
        frames: how many pictures, evenly spaced in time, first and last moment included.
        objects: range of how many things are tried; a few are dropped when they find no place or are seen too little.

    Raises:
        ParameterError, UnknownNameError: an argument is out of range.
    """
    low, high = check_arguments(seed, context, size, objects if objects is not None else (3, 6))
    if not isinstance(frames, (int, np.integer)) or not FRAMES[0] <= frames <= FRAMES[1]:
        raise ParameterError(f"frames={frames!r} is out of range: choose a whole number in [{FRAMES[0]}, {FRAMES[1]}]")
    rng = np.random.Generator(np.random.PCG64([int(seed), 0xF11]))
    drawn = list(CONTEXTS)[int(rng.integers(len(CONTEXTS)))]
    setting = CONTEXTS[context or drawn]
    horizon = setting.horizon[0] + (setting.horizon[1] - setting.horizon[0]) * rng.random()
    movers = _cast(rng, sample_kinds(rng, setting, int(rng.integers(low, high + 1))), horizon)
    factor = 3 if size <= 160 else 2
    side = size * factor
    times = [t / (frames - 1) for t in range(frames)]
    while True:
        inked = [ink_plan(mover.plan, side, factor) for mover in movers]
        moments = [_moment(movers, inked, u, side) for u in times]
        seen = _watch(moments, inked, side, factor)
        worst = _unfit(seen, LEAST_PIXELS * (size / 112) ** 2)
        if worst is None:
            break
        del movers[worst]
    empty, lean, lit = backdrop(setting.name, side, horizon, rng), float(rng.uniform(-1, 1)), int(rng.integers(2**31))
    pictures = []
    for moment in moments:
        canvas = empty.copy()
        paint(canvas, moment.plans, moment.inked, moment.owners, side, lean)
        steady = np.random.Generator(np.random.PCG64(lit))  # the light and its grain stand still
        image = Image.fromarray(light(np.asarray(canvas.reduce(factor)), lean, steady))
        image.info["Software"] = SOFTWARE
        pictures.append(image)
    movers, order = movers[::-1], slice(None, None, -1)  # from front to back
    tracks = [_track(*parts) for parts in zip(movers, seen.masks[order], seen.shares[order], strict=True)]
    covers = seen.covers[order, order]
    events = _events(movers, tracks, covers)
    return Film(int(seed), setting.name, int(size), tuple(pictures), tuple(tracks), tuple(events), covers.max(2))


def _cast(rng: np.random.Generator, kinds: list[str], horizon: float) -> list[_Mover]:
    """The movers, back to front."""
    plans: list[Plan] = []
    for kind in kinds:
        plan = replace(sample_plan(rng, kind, horizon), mark=None)
        if place_plan(rng, plan, plans, horizon):
            plans.append(plan)
    plans.sort(key=lambda plan: (plan.stands, plan.y + plan.h))
    return [_mover(rng, plan, horizon) for plan in plans]


def _track(mover: _Mover, masks: np.ndarray, shares: np.ndarray) -> Track:
    plan = mover.plan
    boxes = tuple(_box(mask) if mask.any() else None for mask in masks)
    return Track(plan.kind, plan.colour, plan.size, mover.path, mover.direction, masks, boxes, shares)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))

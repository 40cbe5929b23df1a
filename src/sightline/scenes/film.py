"""A moving scene together with everything that is true of it, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sightline.scenes.scene import Object, Scene

Box = tuple[float, float, float, float]
CLEAR = 0.5  # a thing is in view when at least this share of it shows, and gone when nothing does


@dataclass(frozen=True, eq=False)
class Track:
    """One thing through a film of T frames. `path` says how it was made to move: "still", "moves", "enters", ...

    `boxes` are (x0, y0, x1, y1) in pixels around the visible part, None where nothing shows; `shares` is the visible
    share of the whole thing, what is outside the picture or covered not being visible. `direction` is "left", "right",
    "up" or "down" for what moves, else None.
    """

    kind: str
    colour: str
    size: str
    path: str
    direction: str | None
    masks: np.ndarray = field(repr=False)  # (T, size, size) bool
    boxes: tuple[Box | None, ...] = field(repr=False)
    shares: np.ndarray = field(repr=False)  # (T,) float32

    def in_view(self, frame: int) -> bool:
        """Whether at least half of it shows in a frame."""
        return bool(self.shares[frame] >= CLEAR)

    @property
    def first(self) -> int:
        """The first frame in which it is in view."""
        return int(np.argmax(self.shares >= CLEAR))

    @property
    def last(self) -> int:
        """The last frame in which it is in view."""
        return len(self.shares) - 1 - int(np.argmax(self.shares[::-1] >= CLEAR))

    @property
    def settled(self) -> bool:
        """Whether it is wholly there or wholly gone in both the first and the last frame: no doubt at the ends."""
        return all(self.shares[k] == 0 or self.shares[k] >= CLEAR for k in (0, -1))


@dataclass(frozen=True)
class Event:
    """Something that happens at a frame: "enters", "appears", "leaves", "vanishes", "passes behind" or
    "passes in front of" (`other`).
    """

    frame: int
    what: str
    track: int
    other: int | None = None


@dataclass(frozen=True, eq=False)
class Film:
    """T drawn frames and their truth; `tracks` from front to back, `events` in order of time."""

    seed: int
    context: str
    size: int
    frames: tuple[Image.Image, ...] = field(repr=False)
    tracks: tuple[Track, ...]
    events: tuple[Event, ...]
    covers: np.ndarray = field(repr=False)  # (N, N) largest share of the first track that the second ever covers

    def __len__(self) -> int:
        """T"""
        return len(self.frames)

    @property
    def name(self) -> str:
        """The name exporters give the film."""
        return f"film_{self.seed:012d}"

    @property
    def objects(self) -> tuple[Track, ...]:
        """The tracks, under the name that a `Scene` has for its things."""
        return self.tracks

    def counts(self, frame: int | None = None) -> dict[str, int]:
        """How many there are of every kind: in the whole film, or in view in one frame."""
        result: dict[str, int] = {}
        for track in self.tracks:
            if frame is None or track.in_view(frame):
                result[track.kind] = result.get(track.kind, 0) + 1
        return result

    def scene(self, frame: int) -> Scene:
        """One frame as a still scene: what shows of every thing that shows at all."""
        things = [
            Object(t.kind, t.colour, t.size, t.masks[frame], t.boxes[frame]) for t in self.tracks if t.boxes[frame]
        ]
        return Scene(self.seed, self.context, self.size, self.frames[frame], tuple(things))

    def telling(self) -> list[str]:
        """What happens, one line an event: "frame 9: the red cup enters"."""
        names = [f"the {track.colour} {track.kind}" for track in self.tracks]
        return [
            f"frame {e.frame}: {names[e.track]} {e.what}" + ("" if e.other is None else f" {names[e.other]}")
            for e in self.events
        ]

    def truth(self) -> dict:
        """Everything but pixels and masks as plain JSON values."""
        tracks = [
            {"kind": t.kind, "colour": t.colour, "size": t.size, "path": t.path, "direction": t.direction}
            | {"boxes": [b and list(b) for b in t.boxes], "shares": [round(float(s), 4) for s in t.shares]}
            for t in self.tracks
        ]
        events = [{"frame": e.frame, "what": e.what, "track": e.track, "other": e.other} for e in self.events]
        facts = {"seed": self.seed, "context": self.context, "size": self.size, "frames": len(self)}
        return facts | {"tracks": tracks, "events": events}

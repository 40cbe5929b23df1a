"""A picture together with everything that is true of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

GAP = 0.12  # least distance of two centres along an axis, fraction of the picture, for a relation to be stated


@dataclass(frozen=True, eq=False)
class Object:
    """One thing in a scene. `box` is (x0, y0, x1, y1) in pixels around `mask`, (size, size) bool, its visible pixels.

    `mark` is the colour of a small dot on it, or None; `mark_box` is the dot's box.
    """

    kind: str
    colour: str
    size: str
    mask: np.ndarray = field(repr=False)
    box: tuple[float, float, float, float]
    mark: str | None = None
    mark_box: tuple[float, float, float, float] | None = None

    @cached_property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the visible box, pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn picture and its truth; `objects` from front to back."""

    seed: int
    context: str
    size: int
    image: Image.Image = field(repr=False)
    objects: tuple[Object, ...]

    @property
    def file_name(self) -> str:
        """The name exporters give the picture."""
        return f"scene_{self.seed:012d}.png"

    def counts(self) -> dict[str, int]:
        """How many there are of every kind present."""
        result: dict[str, int] = {}
        for thing in self.objects:
            result[thing.kind] = result.get(thing.kind, 0) + 1
        return result

    def truth(self) -> dict:
        """Everything but the pixels as plain JSON values."""
        things = [
            {"kind": o.kind, "colour": o.colour, "size": o.size, "box": list(o.box), "area": o.area}
            | ({"mark": o.mark, "mark_box": list(o.mark_box)} if o.mark else {})
            for o in self.objects
        ]
        return {"seed": self.seed, "context": self.context, "size": self.size, "objects": things}

    def relations(self) -> list[tuple[int, str, int]]:
        """(i, "left of" | "right of" | "above" | "below", j) wherever the two boxes make it unambiguous."""
        return [
            (i, relation, j)
            for i, first in enumerate(self.objects)
            for j, second in enumerate(self.objects)
            if i != j
            for relation in relate(first, second, self.size)
        ]


def relate(first: Object, second: Object, size: int) -> list[str]:
    """Where `first` is as seen from `second`: centres at least GAP apart, boxes overlapping by a quarter at most."""
    found = []
    for axis, (less, more) in enumerate((("left of", "right of"), ("above", "below"))):
        gap = second.centre[axis] - first.centre[axis]
        low, high = (first, second) if gap > 0 else (second, first)
        overlap = low.box[axis + 2] - high.box[axis]
        narrow = min(t.box[axis + 2] - t.box[axis] for t in (first, second))
        if abs(gap) >= GAP * size and overlap <= 0.25 * narrow:
            found.append(less if gap > 0 else more)
    return found

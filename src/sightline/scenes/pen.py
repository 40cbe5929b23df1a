"""A pen that draws in fractions of an object's box, into a colour patch and its silhouette at once."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """`first` with `share` of `second` mixed in."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


class Pen:
    """Draws one object. x and y run from 0 to 1 over its box; `flip` mirrors it left to right.

    `main` is the object's colour; `dark`, `deep` and `light` are shades of it. Every stroke also enters the silhouette,
    so that masks and pixels come from the same shapes.
    """

    def __init__(self, width: int, height: int, colour: RGB, pixel: int, flip: bool = False) -> None:
        self.w, self.h, self.pixel, self.flip = width, height, pixel, flip
        self.main = colour
        bright = sum(colour) / 3
        self.dark = mix(colour, (0, 0, 0), 0.26) if bright > 60 else mix(colour, (255, 255, 255), 0.13)
        self.deep = mix(colour, (0, 0, 0), 0.5) if bright > 60 else mix(colour, (255, 255, 255), 0.32)
        self.light = mix(colour, (255, 255, 255), 0.35 if bright > 60 else 0.22)
        if bright > 220:  # white
            self.light = (255, 255, 255)
        self.patch = Image.new("RGB", (width, height), colour)
        self.mask = Image.new("L", (width, height), 0)
        self._ink, self._shape = ImageDraw.Draw(self.patch), ImageDraw.Draw(self.mask)

    def _xy(self, points: Sequence[Point]) -> list[Point]:
        w, h = self.w - 1, self.h - 1
        if self.flip:
            return [((1 - x) * w, y * h) for x, y in points]
        return [(x * w, y * h) for x, y in points]

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[Point]:
        (a, b), (c, d) = self._xy([(x0, y0), (x1, y1)])
        return [(min(a, c), min(b, d)), (max(a, c), max(b, d))]

    def _width(self, width: float, least: float = 1.0) -> int:
        return max(round(width * max(self.w, self.h)), round(least * self.pixel))

    def poly(self, points: Sequence[Point], fill: RGB | None = None) -> None:
        xy = self._xy(points)
        self._ink.polygon(xy, fill=fill or self.main)
        self._shape.polygon(xy, fill=255)

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None) -> None:
        box = self._box(x0, y0, x1, y1)
        self._ink.ellipse(box, fill=fill or self.main)
        self._shape.ellipse(box, fill=255)

    def dot(self, x: float, y: float, radius: float, fill: RGB | None = None) -> None:
        """A true circle; `radius` in fractions of the longest side."""
        r = radius * max(self.w, self.h)
        self.oval(x - r / self.w, y - r / self.h, x + r / self.w, y + r / self.h, fill)

    def pie(
        self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, fill: RGB | None = None
    ) -> None:
        """The part of an oval between two angles in degrees (0 is right, 90 down), closed by a chord."""
        if self.flip:
            start, end = 180 - end, 180 - start
        box = self._box(x0, y0, x1, y1)
        self._ink.chord(box, start, end, fill=fill or self.main)
        self._shape.chord(box, start, end, fill=255)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None, round_by: float = 0) -> None:
        box = self._box(x0, y0, x1, y1)
        radius = round(round_by * max(self.w, self.h))
        self._ink.rounded_rectangle(box, radius, fill=fill or self.main)
        self._shape.rounded_rectangle(box, radius, fill=255)

    def line(self, points: Sequence[Point], width: float, fill: RGB | None = None, least: float = 1.0) -> None:
        """A stroke with round ends; `width` in fractions of the longest side, never thinner than `least` pixels."""
        xy, thick = self._xy(points), self._width(width, least)
        for draw, ink in ((self._ink, fill or self.main), (self._shape, 255)):
            draw.line(xy, fill=ink, width=thick, joint="curve")
            r = (thick - 1) / 2
            for x, y in (xy[0], xy[-1]):
                draw.ellipse([(x - r, y - r), (x + r, y + r)], fill=ink)

    def ring(self, x0: float, y0: float, x1: float, y1: float, width: float, fill: RGB | None = None) -> None:
        """An oval's outline, drawn inwards."""
        box, thick = self._box(x0, y0, x1, y1), self._width(width)
        self._ink.ellipse(box, outline=fill or self.main, width=thick)
        self._shape.ellipse(box, outline=255, width=thick)

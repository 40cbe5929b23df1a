"""Many scenes on one page."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from sightline.errors import ParameterError
from sightline.images import tiled
from sightline.scenes.film import Film
from sightline.scenes.scene import Scene


def contact_sheet(scenes: Sequence[Scene], columns: int = 8) -> Image.Image:
    """The pictures row by row, `columns` to a row, with thin white gaps."""
    if not scenes or columns < 1:
        raise ParameterError(f"columns={columns!r}, {len(scenes)} scenes: give at least one scene and one column")
    return tiled([scene.image for scene in scenes], columns)


def film_sheet(films: Sequence[Film], columns: int = 8) -> Image.Image:
    """A row for every film: `columns` of its frames, evenly spaced, first and last included."""
    if not films or columns < 2:
        raise ParameterError(f"columns={columns!r}, {len(films)} films: give at least one film and two columns")
    chosen = [film.frames[round(k * (len(film) - 1) / (columns - 1))] for film in films for k in range(columns)]
    return tiled(chosen, columns)

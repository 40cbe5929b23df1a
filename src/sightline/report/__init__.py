"""What a look found, for people: one HTML page, PNG figures, a summary in the terminal, JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from sightline.looking import Look


def save(look: Look, out_dir: str | Path) -> dict[str, Path]:
    """Write `report.html`, `look.json` and the PNG figures into `out_dir`; returns name -> path. See `report.files`."""
    from sightline.report.files import save as write

    return write(look, out_dir)


def to_json(look: Look) -> dict[str, Any]:
    """The numbers of a look as plain JSON types, without big arrays. See `report.summary`."""
    from sightline.report.summary import to_json as build

    return build(look)


def show(look: Look, console: Console | None = None) -> None:
    """Print the answers, the image regions per word, the sinks and the heads to a rich console."""
    from sightline.report.terminal import show as write

    write(look, console)

"""Writes everything a look leaves behind into a folder."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sightline.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sightline.looking import Look

FIGURES = ("overlay", "words", "sinks", "heads")  # functions of `report.figures`


def save(look: Look, out_dir: str | Path) -> dict[str, Path]:
    """Write the page, the figures and the numbers; returns name -> path.

    Files: `report.html`, `look.json`; per run `overlay-N.png`, `words-N.png`, `sinks-N.png`, `heads-N.png`, and `kept-N.png`
    where visual tokens were dropped (N counts the runs from 0). Nothing is written before everything is made, and each file is written beside its place and then moved,
    so that none is ever half there. Raises InputError when the folder cannot be written.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = _contents(look)
        return {name: _write(folder / file, data) for name, (file, data) in contents.items()}
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --out folder") from error


def _contents(look: Look) -> dict[str, tuple[str, bytes]]:
    """name -> (file name, bytes) of everything that is written."""
    from sightline.report import figures, page, summary

    numbers = json.dumps(summary.to_json(look), ensure_ascii=False, indent=1, allow_nan=False)
    made = {
        "report": ("report.html", page.render(look).encode("utf-8")),
        "json": ("look.json", numbers.encode("utf-8", "replace")),
    }
    for index, run in enumerate(look.runs):
        for name in FIGURES:
            made[f"{name}-{index}"] = (f"{name}-{index}.png", png(getattr(figures, name)(look, run)))
        if run.stages:
            made[f"kept-{index}"] = (f"kept-{index}.png", png(figures.kept(look, run)))
    return made


def png(figure: Figure) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box; the page shows every script
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> Path:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
    return path

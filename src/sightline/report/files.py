"""Writes everything a look leaves behind into a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sightline.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sightline.looking import Look


def save(look: Look, out_dir: str | Path) -> dict[str, Path]:
    """Write the page, the figures and the numbers; returns name -> path.

    Files: `report.html`, `look.json`; per run `overlay-N.png` and `words-N.png`, `sinks-N.png`, `heads-N.png`,
    `masses-N.png` (N counts the runs from 0). A file is complete or absent: each is written beside its place, then
    moved. Raises InputError when the folder cannot be written.
    """
    from sightline.report import figures, page, summary

    folder = Path(out_dir)
    made: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made["report"] = _write(folder / "report.html", page.render(look).encode("utf-8"))
        numbers = json.dumps(summary.to_json(look), ensure_ascii=False, indent=1, allow_nan=False)
        made["json"] = _write(folder / "look.json", numbers.encode("utf-8", "replace"))
        for index, run in enumerate(look.runs):
            for name in ("overlay", "words", "sinks", "heads", "masses"):
                figure = getattr(figures, name)(look, run)
                made[f"{name}-{index}"] = _write(folder / f"{name}-{index}.png", _png(figure))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --out folder") from error
    return made


def _png(figure: Figure) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> Path:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
    return path

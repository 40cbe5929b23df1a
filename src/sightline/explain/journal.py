"""An append-only file of JSON rows: a killed run finds everything it had finished."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sightline.errors import InputError


class Journal:
    """Rows of one file, in order. A last line that a kill cut short is removed; any other damage is an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self._read()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows and wait until they are on the disk. Numbers that are not finite become null."""
        rows = [_plain(row) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(
                    f"{self.path}, line {number} is damaged: remove that line, or choose another --out"
                ) from error
        if len(whole) < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))


def open_folder(folder: Path, config: dict[str, Any], fixed: Sequence[str]) -> Path:
    """The folder, with `config.json` written or, when it is there, agreeing on the `fixed` keys; InputError otherwise."""
    path = folder / "config.json"
    try:
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in fixed if old.get(key) != config[key]]
            if other:
                key = other[0]
                raise InputError(
                    f"{folder} holds a study with {key}={old.get(key)!r}, not {config[key]!r}: choose another --out"
                )
            return folder
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no study: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(config, indent=1).encode())
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot use the folder {folder}: {error}; choose another --out") from error
    return folder


def write(path: Path, data: bytes) -> Path:
    """Write a file beside its place and move it there, so that it is never half written."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
    return path


def _plain(value: Any) -> Any:
    """JSON-able: arrays as lists, floats at five significant digits, NaN and infinity as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value

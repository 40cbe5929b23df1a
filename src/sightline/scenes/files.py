"""Writing that loses nothing: temp file and rename, same bytes again, never over a file of somebody else."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sightline.errors import InputError

MANIFEST = "sightline-scenes.json"
MAKER = "sightline.scenes"


def writable(folder: Path) -> Path:
    """Make `folder` if needed. Raises InputError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror}): choose a folder you may write to") from error


def _atomic(path: Path, chunks: Iterable[bytes], sealed: Callable[[str], None] | None = None) -> None:
    """Write through a temporary neighbour and rename; nothing is left behind on failure.

    `sealed` is called with the content's SHA-256 just before the rename.
    """
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        os.chmod(name, 0o644)
        if sealed is not None:
            sealed(digest.hexdigest())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Folder:
    """An export folder. Its manifest lists the text files written by us, so that only those are ever replaced."""

    def __init__(self, root: str | Path) -> None:
        self.root = writable(Path(root))
        self._written = self._read_manifest()

    def _read_manifest(self) -> dict[str, list[str]]:
        path = self.root / MANIFEST
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["made_by"] == MAKER:
                return dict(content["files"])
        except (ValueError, KeyError, TypeError, OSError):
            pass
        raise InputError(f"{path} was not written by {MAKER}: choose another folder or move it away")

    def check(self, name: str) -> Path:
        """The path of `name`. Raises InputError if a file is there that we did not write or that was changed since."""
        path = self.root / name
        if path.exists() and (not path.is_file() or _hash(path) not in self._written.get(name, [])):
            raise InputError(f"{path} exists and was not written by {MAKER}: choose another folder or move it away")
        return path

    def _enter(self, name: str, digest: str) -> None:
        """Note a file as ours before it is in place; the former content stays ours too, should we be stopped here."""
        self._written[name] = [*(old for old in self._written.get(name, [])[-1:] if old != digest), digest]
        manifest = {"made_by": MAKER, "files": dict(sorted(self._written.items()))}
        _atomic(self.root / MANIFEST, [json.dumps(manifest, indent=1).encode(), b"\n"])

    def text(self, name: str, chunks: Iterable[str]) -> Path:
        """Write a text file from its parts, as they come, and enter it into the manifest."""
        return self.binary(name, (chunk.encode("utf-8") for chunk in chunks))

    def binary(self, name: str, chunks: Iterable[bytes]) -> Path:
        """The same for bytes."""
        path = self.check(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _atomic(path, chunks, lambda digest: self._enter(name, digest))
        return path

    def picture(self, name: str, image: Image.Image) -> Path:
        """Write a PNG. One with the same pixels is left as it is (so an interrupted export resumes)."""
        path = self.root / name
        if path.exists():
            if not _same_pixels(path, image):
                raise InputError(f"{path} exists and is a different picture: choose another folder or move it away")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        image.save(buffer, format="PNG", pnginfo=_marks(image))
        _atomic(path, [buffer.getvalue()])
        return path


def _marks(image: Image.Image) -> PngInfo:
    """The note, kept in the file, that a picture comes from the generated world."""
    marks = PngInfo()
    if "Software" in image.info:
        marks.add_text("Software", image.info["Software"])
    return marks


def _same_pixels(path: Path, image: Image.Image) -> bool:
    try:
        with Image.open(path) as old:
            return old.size == image.size and np.array_equal(np.asarray(old.convert("RGB")), np.asarray(image))
    except OSError:
        return False

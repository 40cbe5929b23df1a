"""Folders that a command writes: complete or not there at all, and never over somebody else's files.

Everything is written into a hidden folder beside the wanted one, which then takes its name in one step.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sightline.errors import InputError

MARK = ".sightline.json"  # lists the files that sightline wrote, so that a later run may replace them


@contextmanager
def fresh_folder(out: str | Path, force: bool = False) -> Iterator[Path]:
    """A new empty folder to write into; it becomes `out` when the block ends well and vanishes otherwise.

    A folder that sightline wrote, with nothing else in it, is replaced. Of a folder that holds other files, with
    `force`, only the files of the same names are replaced.

    Raises:
        InputError: before the block, when `out` is a file, holds other files (without `force`) or cannot be made.
    """
    out = Path(out).expanduser()
    foreign = _foreign(out)
    if foreign and not force:
        raise InputError(
            f"folder {str(out)!r} holds other files ({', '.join(foreign[:3])}): choose another --out, or --force to write"
            " into it"
        )
    made = _make_parents(out)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=out.parent))
    except OSError as error:
        _remove_empty(made)
        raise _cannot_write(out, error) from error
    try:
        yield temporary
        try:
            _finish(temporary, out, keep=bool(foreign))
        except OSError as error:
            raise _cannot_write(out, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise


def _foreign(out: Path) -> list[str]:
    """Names in `out` that sightline did not write."""
    if not out.is_dir():
        if os.path.lexists(out):
            raise InputError(f"cannot write to {str(out)!r}: it is a file; choose another --out folder")
        return []
    try:
        return sorted({path.name for path in out.iterdir()} - _ours(out / MARK) - {MARK})
    except OSError as error:
        raise _cannot_write(out, error) from error


def _ours(mark: Path) -> set[str]:
    try:
        return set(json.loads(mark.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # none, or damaged: then nothing counts as ours
        return set()


def _make_parents(out: Path) -> list[Path]:
    """Make the folders above `out`; returns those that were new, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _cannot_write(out, error) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _finish(temporary: Path, out: Path, keep: bool) -> None:
    names = sorted(path.name for path in temporary.iterdir())
    (temporary / MARK).write_text(json.dumps(names), encoding="utf-8")
    temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
    if keep:
        for name in [*names, MARK]:
            os.replace(temporary / name, out / name)
        temporary.rmdir()
        return
    if out.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-old-", dir=out.parent))
        os.replace(out, old / "out")
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(out: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {str(out)!r}: {error.strerror or error}; choose another --out folder")

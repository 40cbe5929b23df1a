"""The folder of a run: what was asked for, every answer as it came, and a lock against a second run.

`config.json` is written once; a run that goes on must ask for the same. `answers.jsonl` only grows: one line per answer,
written and flushed to the disk batch by batch, so that a killed run loses at most the batch it was at.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sightline.errors import InputError

CONFIG, ANSWERS, LOCK, HOLDER = "config.json", "answers.jsonl", ".lock", ".lock.pid"
FORMAT = "sightline compare 1"
Key = tuple[str, str, str]  # task, systems, id of the question


class RunFolder:
    """Answers by (task, systems, question). A context manager: it holds the lock while open.

    Attributes:
        answers: what is there, in the order it was written.
        recovered: bytes of a half-written last line that were cut off on opening.
    """

    def __init__(self, out: str | Path, config: Mapping[str, Any]) -> None:
        """Nothing is touched before `__enter__`. `config` must be JSON-able; it decides what may be continued."""
        self.path = Path(out).expanduser()
        self.config = json.loads(json.dumps({"format": FORMAT, **config}))
        self.answers: dict[Key, dict[str, Any]] = {}
        self.recovered = 0
        self._file: int | None = None
        self._lock: FileLock | None = None

    def __enter__(self) -> RunFolder:
        """Raises InputError: not a folder of ours, in use, started with another configuration, or damaged answers."""
        self._check_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._take_lock()
        try:
            self._check_config()
            self._load()
            self._file = os.open(self.path / ANSWERS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            self.close()
            raise _cannot_write(self.path, error) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of file and lock. Safe to call twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            (self.path / HOLDER).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write answers and wait until the disk has them.

        Raises:
            InputError: the disk is full or gone; what was there before is untouched, nothing is half-written.
        """
        if not rows:
            return
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")
        size = os.fstat(self._file).st_size
        try:
            _write_all(self._file, data)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            kept = f"{len(self.answers)} answers are safe in {str(self.path)!r}"
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
            raise InputError(f"cannot write more answers ({why}): {kept}; make room and run the same again") from error
        for row in rows:
            self.answers[key_of(row)] = dict(row)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the folder in one step: complete, or as it was before. InputError when that fails."""
        return write_file(self.path / name, content)

    # -- opening ------------------------------------------------------------------------------------------------------

    def _check_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {str(self.path)!r} is a file: choose a folder")
        if not self.path.is_dir() or (self.path / CONFIG).exists():
            return
        others = sorted(p.name for p in self.path.iterdir() if p.name not in (LOCK, HOLDER))
        if others:
            shown = ", ".join(others[:3])
            raise InputError(f"folder {str(self.path)!r} holds other files ({shown}) and no run: choose another --out")

    def _take_lock(self) -> None:
        lock, holder = FileLock(self.path / LOCK, timeout=0), self.path / HOLDER
        try:
            lock.acquire()
        except Timeout as error:
            pid = holder.read_text().strip() if holder.exists() else "unknown"
            raise InputError(
                f"another run (process {pid}) is writing into {str(self.path)!r}: wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._lock = lock
        try:
            holder.write_text(str(os.getpid()))
        except OSError as error:
            self.close()
            raise _cannot_write(self.path, error) from error

    def _check_config(self) -> None:
        path = self.path / CONFIG
        if not path.exists():
            self.write(CONFIG, json.dumps(self.config, indent=1, ensure_ascii=False) + "\n")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{str(path)!r} is damaged ({error}): choose another --out") from error
        if not isinstance(before, dict) or before.get("format") != FORMAT:
            raise InputError(f"{str(path)!r} is not of a run of this program: choose another --out")
        changed = differences(before, self.config)
        if changed:
            name, old, new = changed[0]
            raise InputError(
                f"{str(self.path)!r} holds a run with {name}={_short(old)}, now it is {_short(new)}: choose another --out, "
                "or ask for the same to go on"
            )

    def _load(self) -> None:
        path = self.path / ANSWERS
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            row = _read_row(path, number, line)
            known = self.answers.setdefault(key_of(row), row)
            if known != row:
                raise InputError(
                    f"{str(path)!r}, line {number}: question {row['id']!r} of {row['task']} under {row['with']!r} was "
                    "answered differently before: the file was edited; choose another --out"
                )
        if whole < len(data):
            self.recovered = len(data) - whole
            os.truncate(path, whole)


def key_of(row: Mapping[str, Any]) -> Key:
    """(task, systems, question) of an answer."""
    return row["task"], row["with"], row["id"]


def write_file(path: Path, content: str | bytes) -> Path:
    """Write a file in one step, through a temporary neighbour. InputError when that fails."""
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        raise _cannot_write(path, error) from error
    return path


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) wherever two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys: Iterable[str] = dict.fromkeys([*old, *new])
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for k, pair in enumerate(zip(old, new, strict=True)) for d in differences(*pair, f"{name}[{k}]")]
    return [] if old == new else [(name, old, new)]


def _read_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if all(isinstance(row[key], str) for key in ("task", "with", "id", "answer")):
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{str(path)!r}, line {number} was not written by this program: choose another --out")


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {str(path)!r}: {error.strerror or error}; choose another --out folder")

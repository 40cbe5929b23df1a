"""Output folders are complete or absent, and other people's files stay."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from sightline.errors import InputError
from sightline.outfolder import MARK, fresh_folder


def write(out: Path, force: bool = False, **files: str) -> None:
    with fresh_folder(out, force) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def fail(out: Path, error: type[BaseException]) -> None:
    with fresh_folder(out) as folder:
        (folder / "page").write_text("2")
        raise error


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MARK}


@pytest.mark.parametrize("name", ["out", "a/b/out", "with blank", "ö"])
def test_it_appears_when_complete(tmp_path, name):
    out = tmp_path / name
    with fresh_folder(out) as folder:
        (folder / "page").write_text("1")
        assert not out.exists()
    assert contents(out) == {"page": "1"}
    assert json.loads((out / MARK).read_text()) == ["page"]
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error):
        fail(tmp_path / "a" / "b" / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_folder_of_before(tmp_path):
    write(tmp_path / "out", page="1")
    with pytest.raises(RuntimeError):
        fail(tmp_path / "out", RuntimeError)
    assert contents(tmp_path / "out") == {"page": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_our_own_folder_is_replaced_whole(tmp_path):
    write(tmp_path / "out", page="1", figure="1")
    write(tmp_path / "out", page="2")
    assert contents(tmp_path / "out") == {"page": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", page="1")
    assert contents(tmp_path / "out") == {"page": "1"}


@pytest.mark.parametrize("ours", [True, False])
def test_other_files_are_safe(tmp_path, ours):
    out = tmp_path / "out"
    if ours:
        write(out, page="1", old="1")
    out.mkdir(exist_ok=True)
    (out / "thesis").write_text("mine")
    with pytest.raises(InputError, match=r"'.*out' holds other files \(thesis\): choose another --out, or --force"):
        write(out, page="2")
    write(out, force=True, page="3")
    assert contents(out) == {"thesis": "mine", "page": "3"} | ({"old": "1"} if ours else {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mark", ["{", "7", '{"page": 1}'])
def test_a_damaged_mark_makes_a_folder_foreign(tmp_path, mark):
    write(tmp_path / "out", page="1")
    (tmp_path / "out" / MARK).write_text(mark)
    (tmp_path / "out" / "thesis").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        write(tmp_path / "out", page="2")
    assert contents(tmp_path / "out") == {"page": "1", "thesis": "mine"}


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="it is a file; choose another --out"):
        write(tmp_path / "file", page="1")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(InputError, match=r"cannot write to .*; choose another --out"):
            write(out, page="1")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it is a file"):
        write(tmp_path / "link", page="1")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        write(tmp_path / "new" / "out", page="1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the super-user may write anywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        write(tmp_path / "shut" / "out", page="1")


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", page="1")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750

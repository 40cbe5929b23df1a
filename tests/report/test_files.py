from __future__ import annotations

import json

import pytest
from PIL import Image

from sightline import report
from sightline.errors import InputError

from .synthetic import make_look


def test_save_writes_everything_it_names(look, tmp_path):
    made = report.save(look, tmp_path / "new" / "out")
    assert set(made) == {"report", "json"} | {
        f"{n}-{i}" for n in ("overlay", "words", "sinks", "heads") for i in (0, 1)
    }
    assert {p.name for p in (tmp_path / "new" / "out").iterdir()} == {p.name for p in made.values()}
    assert made["report"].read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(made["json"].read_text("utf-8"))["question"] == look.question
    with Image.open(made["overlay-1"]) as image:
        assert min(image.size) > 300


def test_no_warning_about_scripts_without_a_font(tmp_path, recwarn):
    report.save(make_look(("是", "\x15"), None), tmp_path)
    assert [str(w.message) for w in recwarn if "Glyph" in str(w.message)] == []


def test_a_folder_that_cannot_be_made_is_named(look, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/out.*--out"):
        report.save(look, tmp_path / "file" / "out")


def test_nothing_is_left_when_making_fails(look, tmp_path, monkeypatch):
    from sightline.report import figures

    def fail(*_):
        raise RuntimeError("no figure")

    monkeypatch.setattr(figures, "heads", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        report.save(look, tmp_path)
    assert list(tmp_path.iterdir()) == []

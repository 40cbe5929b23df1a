"""The whole study on a tiny random model: results, page, resuming, refusals."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sightline import explain, loading
from sightline.errors import InputError, ParameterError
from sightline.explain import figures, results, study
from sightline.explain.commands import app
from sightline.explain.page import sentences
from sightline.explain.questions import held_out
from tests.explain.tiny import DIMS, SINKS, TAU, lvlm

OPTIONS = {"n": 2, "draws": 1, "batch": 4, "progress": False, **SINKS}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "SWEEP", (0.0,))
    found = study.study_var(lvlm(), out, **OPTIONS)
    yield found, out
    patch.undo()


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing is slow, and tested once with sinks and once without."""
    monkeypatch.setattr(figures, "draw_all", lambda *_: {})


def lines(out):
    return sorted((out / "answers.jsonl").read_text().splitlines())


def test_results_are_complete_and_agree_with_the_rows(done):
    found, out = done
    rows = [json.loads(line) for line in lines(out)]
    n = found["counts"]["questions"]
    names = {
        "none",
        "var",
        "no head selection",
        "budget to text",
        "budget to all",
        "p=0",
        "mask sinks",
        "mask random 1",
    }
    assert set(found["conditions"]) == names | {"mask random"}
    for name in names:
        mine = [r for r in rows if r["with"] == name and r["task"] == "ask"]
        assert sorted(int(r["id"]) for r in mine) == list(range(n))
        score = found["conditions"][name]["all"]
        assert score["accuracy"]["n"] == n
        assert score["accuracy"]["value"] == pytest.approx(sum(r["right"] for r in mine) / n)
        assert score["logprob"]["value"] == pytest.approx(sum(r["logprob"] for r in mine) / n, rel=1e-6)
        yes = [r["yes"] for r in mine if r["yes"] is not None]
        assert found["conditions"][name]["pope"]["yes"]["value"] == pytest.approx(sum(yes) / len(yes))
    random = [found["conditions"][name]["all"]["logprob"]["value"] for name in ("mask random", "mask random 1")]
    assert random[0] == pytest.approx(random[1])  # the mean over one draw
    plain, var = found["conditions"]["none"]["all"], found["conditions"]["var"]["all"]
    assert plain["logprob change"]["value"] == 0
    assert var["logprob change"]["value"] == pytest.approx(var["logprob"]["value"] - plain["logprob"]["value"])
    see = [r for r in rows if r["task"] == "see"]
    assert len(see) == found["counts"]["pictures"] == 2
    total = sum(sum(r["sinks on background"]) for r in see) / sum(sum(r["sinks shown"]) for r in see)
    assert found["maps"]["sinks on background"]["value"] == pytest.approx(total)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))


def test_rows_are_what_the_functions_give(done):
    _, out = done
    rows = {(r["task"], r["with"], int(r["id"])): r for r in map(json.loads, lines(out))}
    asked = held_out(2, size=56)
    block = asked[:4]
    expected = explain.ablations(lvlm(), block, sweep=(0.0,), **SINKS) | explain.mask_sinks(
        lvlm(), block, draws=1, **SINKS
    )
    assert len(expected) == 8
    for name, replies in expected.items():
        for item, reply in zip(block, replies, strict=True):
            row = rows["ask", name, item.number]
            assert row["logprob"] == pytest.approx(reply.logprob, rel=1e-4)
            assert row["answer"] == reply.text
    first = [asked[0], next(i for i in asked if i.scene is not asked[0].scene)]
    pictures, questions = [i.scene.image for i in first], [i.text for i in first]
    masks = [np.any([o.mask for o in i.scene.objects], 0) for i in first]
    whole = explain.text_to_image(lvlm(), pictures, questions, masks, **SINKS)
    weights = explain.contribution(lvlm(), pictures, questions, **SINKS)
    for item, one, weight in zip(first, whole, weights, strict=True):
        row = rows["see", "", item.number]
        assert row["sinks on background"] == one.counts()["sinks on background"].tolist()
        np.testing.assert_allclose(row["on objects"], one.on_objects()[0], rtol=1e-3)
        np.testing.assert_allclose(row["map"]["received"], one.attention, rtol=1e-3)
        norms = [np.nan if v is None else v for v in rows["weigh", "", item.number]["sink norm"]]
        np.testing.assert_allclose(norms, weight.means()["sink norm"], rtol=1e-3)


def test_the_page_is_one_file_in_plain_words(done):
    found, out = done
    html = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert html.count("data:image/png;base64,") == 6
    for text in sentences(found).values():
        assert text in unescape(html)
    for name in ("sinks", "maps", "heads", "contribution", "masking", "ablations"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(done, tmp_path, monkeypatch, no_figures):
    _, out = done
    calls, real = [], study.ask

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(study, "ask", dying)
    with pytest.raises(KeyboardInterrupt):
        study.study_var(lvlm(), tmp_path / "out", **OPTIONS)
    path = tmp_path / "out" / "answers.jsonl"
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:-2])  # the last block is there in part
    assert kept
    path.write_bytes(kept)
    with open(tmp_path / "out" / "answers.jsonl", "ab") as file:
        file.write(b'{"task": "ask", "wi')
    study.study_var(lvlm(), tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes().startswith(kept)
    assert lines(tmp_path / "out") == lines(out)
    assert (tmp_path / "out" / "results.json").read_text() == (out / "results.json").read_text()
    count = len(calls)
    study.study_var(lvlm(), tmp_path / "out", **OPTIONS)
    assert len(calls) == count  # nothing is asked again


def test_a_folder_of_another_study_is_refused(done, tmp_path):
    _, out = done
    before = lines(out)
    with pytest.raises(InputError, match="with n=2, now it is 3"):
        study.study_var(lvlm(), out, **{**OPTIONS, "n": 3})
    with torch.no_grad():
        weight = lvlm().model.get_input_embeddings().weight
        weight[5] += 1
        try:
            with pytest.raises(InputError, match="with weights="):
                study.study_var(lvlm(), out, **OPTIONS)
        finally:
            weight[5] -= 1
    assert lines(out) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        study.study_var(lvlm(), tmp_path, **OPTIONS)


def test_rows_are_json_without_nan_at_five_digits():
    row = results.plain({"x": np.array([1.23456789, np.nan]), "y": (math.inf, True, 3, "a", None)})
    assert row == {"x": [1.2346, None], "y": [None, True, 3, "a", None]}


def test_bad_parameters_are_refused_before_any_work(tmp_path):
    for bad, message in (
        ({"draws": 0}, "draws=0"),
        ({"tau": 9.0}, "tau=9 can never be exceeded"),
        ({"sink_dims": (3, 99)}, "sink dimension 99"),
        ({"n": 0}, "n=0"),
    ):
        with pytest.raises(ParameterError, match=message):
            study.study_var(lvlm(), tmp_path / "none", **{**OPTIONS, **bad})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "said"), [({"tau": 5.5, "sink_dims": None}, "no sinks"), ({"tau": 5.5}, "no visual sinks")]
)
def test_a_model_without_sinks_is_said_to_have_none(tmp_path, monkeypatch, options, said):
    if "sink_dims" not in options:
        monkeypatch.setattr(figures, "draw_all", lambda *_: {})
    found = study.study_var(lvlm(), tmp_path / "out", **{**OPTIONS, **options})
    if "sink_dims" in options:
        assert found["config"]["found_dims"] == []
        assert {p.stem for p in (tmp_path / "out").glob("*.png")} == {"sinks", "maps", "heads"}
    assert set(found["conditions"]) == {"none"}
    assert found["contrast"] is None
    words = sentences(found)
    assert f"The model shows {said}" in words["sinks"]
    assert "Not run" in words["masking"]
    assert "None" not in " ".join(words.values())
    assert "nan" not in (tmp_path / "out" / "index.html").read_text().split("base64")[0]


def test_command(tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(study, "SWEEP", ())
    monkeypatch.setattr(loading, "load", lambda name, **placement: lvlm())
    out = tmp_path / "out"
    arguments = [
        "var",
        "--n",
        "2",
        "--draws",
        "1",
        "--tau",
        str(TAU),
        "--sink-dims",
        "/".join(map(str, DIMS)),
        "-o",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "Sink dimensions: 3, 7" in result.output
    assert (out / "index.html").exists()
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.output) == json.loads((out / "results.json").read_text())
    result = CliRunner().invoke(app, ["var", "--sink-dims", "3;7"])
    assert isinstance(result.exception, ParameterError)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "study_var", stop)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert "goes on from there" in result.output

"""The commands: light at import, one whole run, and refusals before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import sightline.loading
from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.evaluate.commands import app

BASE = ["--size", "56", "--n", "6", "--max-new-tokens", "2", "--batch-size", "6", "--no-cost"]


@pytest.fixture
def invoke(lvlm, monkeypatch):
    monkeypatch.setattr(sightline.loading, "load", lambda name, **options: lvlm())

    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_compare(invoke, tmp_path):
    result = invoke("compare", "--on", "scenes:count", "--with", "var:p=0.2..0.4/2,tau=1.5", "--out", tmp_path, *BASE,
                    "--suffix", " Please.", "--seed", 3)  # fmt: skip
    assert result.exit_code == 0
    assert "scenes_count, 6 questions (higher accuracy is better)" in result.output
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["with"] for row in content["results"].values()] == ["none", "var:p=0.2,tau=1.5", "var:p=0.4,tau=1.5"]
    assert content["config"]["tasks"][0]["suffix"] == " Please."
    assert content["config"]["seed"] == 3
    assert content["cost"] == {}


def test_tune(invoke, tmp_path):
    result = invoke(
        "tune", "var", "--on", "scenes:relation", "--grid", "p=0.2..0.4/2,tau=1.5", "--out", tmp_path, *BASE[:4]
    )
    assert result.exit_code == 0
    assert "best on the training split: " in result.output
    assert (tmp_path / "held-out" / "table.md").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (["--on", "scenes:popp"], UnknownNameError, "did you mean"),
        (["--with", "vra"], UnknownNameError, "var"),
        (["--with", "var:p=7"], ParameterError, "p=7"),
        (["--batch-size", "0"], ParameterError, "batch_size=0"),
        (["--on", "pope:/nowhere.json"], InputError, "cannot read"),
        (["--max-new-tokens", "0"], ParameterError, "max_new_tokens=0"),
        (["--answers", "offical"], UnknownNameError, "no answer rule 'offical': did you mean official"),
        (["--rounds", "0"], ParameterError, "rounds=0"),
        (["--ray-workers", "2"], ParameterError, "add --ray auto"),
    ],
)
def test_refused_before_a_model_is_loaded(invoke, tmp_path, monkeypatch, arguments, error, named):
    monkeypatch.setattr(sightline.loading, "load", None)
    with pytest.raises(error, match=named):
        invoke("compare", "--out", tmp_path / "x", "--n", "6", "--size", "56", *arguments)
    assert not (tmp_path / "x").exists()


def test_one_way_to_several_workers(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParameterError, match="exclude each other"):
        invoke("compare", "--out", tmp_path / "x", "--n", "6", "--size", "56", "--ray", "auto")


def test_tune_refuses_files(invoke, tmp_path):
    with pytest.raises(ParameterError, match="two disjoint splits"):
        invoke("tune", "var", "--on", "pope:x.json", "--out", tmp_path)


def test_light_at_import():
    code = "import sys, sightline.evaluate.commands; print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

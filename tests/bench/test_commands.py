"""`sightline bench` from the command line."""

from __future__ import annotations

import json

from sightline.cli import main


def test_mixers(tmp_path, capsys) -> None:
    out = tmp_path / "bench"
    options = ["--only", "davit", "--lengths", "64,256", "--dim", "8", "--heads", "2", "--repeats", "1", "--no-train"]
    assert main(["bench", "mixers", "--no-keep-memory", "-o", str(out), *options]) == 0
    assert "davit 256: forward" in capsys.readouterr().out
    assert main(["bench", "mixers", "--no-keep-memory", "-o", str(out), *options, "--json"]) == 0  # all there already
    assert json.loads(capsys.readouterr().out)["config"]["names"] == ["sdpa", "davit"]


def test_gna_sim(capsys) -> None:
    shape = ["--grid", "24", "--window", "8", "--q-tile", "4", "--kv-tile", "4", "--stride", "4", "--json"]
    assert main(["bench", "gna-sim", *shape]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["own"]["bound"] == 36 / 16
    assert result["own"]["dynamic"] == 36 / 12


def test_backbones(capsys) -> None:
    assert main(["bench", "backbones", "--only", "biformer_t,shvit_s1"]) == 0
    out = capsys.readouterr().out
    assert "13,142,760" in out
    assert "6,330,808" in out


def test_mistakes_are_one_line(tmp_path, capsys) -> None:
    for command in (
        ["mixers", "-o", str(tmp_path / "a"), "--lengths", "many"],
        ["mixers", "-o", str(tmp_path / "a"), "--only", "nothing"],
        ["gna-sim", "--grid", "24", "--window", "eight"],
        ["backbones", "--only", "resnet9000"],
    ):
        assert main(["bench", *command]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a").exists()

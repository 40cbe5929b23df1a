"""Trainings on films from the command line: a dry run, a run, its resumption, and what is refused before any work."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sightline as sl
from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.learn.commands import app
from sightline.learn.film_tuning import Settings, _same_settings, run
from sightline.loading import load

SMALL = {"steps": 4, "batch": 2, "frames": 3, "size": 56}
CPU = torch.device("cpu")


def settings(training: str, folder, **more) -> Settings:
    return Settings(training, str(folder), **SMALL | more)


def command(*words: str) -> dict:
    result = CliRunner().invoke(app, [*words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output[result.output.index("{") :])


def flags(out) -> list[str]:
    return ["--out", str(out), "--device", "cpu", "--precision", "fp32", "--steps", "3", "--batch", "2", "--size", "56"]


def test_thinking_and_preference_one_after_the_other(toy_folder, tmp_path) -> None:
    """The commands as a user types them: fine-tuning, then preference from where that ended."""
    seen = command("srft", "--model", str(toy_folder), *flags(tmp_path / "none"), "--frames", "3", "--dry-run")
    assert seen["samples in all"] == 6
    assert seen["answer"].startswith("Thinking: ")
    assert not (tmp_path / "none").exists()
    done = command("srft", "--model", str(toy_folder), *flags(tmp_path / "srft"), "--frames", "3")
    assert done["steps"] == 3
    assert (tmp_path / "srft" / "curves.png").stat().st_size > 1000
    start = done["model"]
    seen = command("tdpo", "--model", start, *flags(tmp_path / "none"), "--frames", "3", "--dry-run")
    assert seen["false answer"] != seen["answer"]
    assert 0 < seen["share of tokens changed"] < 0.3
    done = command("tdpo", "--model", start, *flags(tmp_path / "tdpo"), "--frames", "3", "--gamma", "3", "--lr", "1e-3")
    before, after = (load(folder).model.state_dict() for folder in (start, done["model"]))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


def test_both_stages_of_slow_fast(toy_folder, tmp_path) -> None:
    fast = "slow-fast:pooling_stride=1,min_fast_frames=1,temporal_stride=2,every_n_layers=1"
    first = command(
        "slow-fast",
        "--model",
        str(toy_folder),
        "--with",
        fast,
        *flags(tmp_path / "one"),
        "--frames",
        "4",
        "--lr",
        "0.01",
    )
    branch = load_file(first["branch"])
    assert any(value.abs().max() > 0 for name, value in branch.items() if "gate" in name or "alpha" in name)
    second = command(
        "slow-fast", "--model", first["model"], "--with", first["with"], "--stage", "2", *flags(tmp_path / "two"),
        "--frames", "4", "--lr", "0.01",
    )  # fmt: skip
    assert any(not torch.equal(load_file(second["branch"])[name], value) for name, value in branch.items())
    (trained,) = sl.catalog.parse(second["with"])
    lvlm = load(second["model"])
    assert trained.weights == second["branch"]
    with sl.attach(lvlm.model, trained):
        pass
    old, new = (load(folder["model"]).model.state_dict() for folder in (first, second))
    assert any("language_model" in name for name in new if not torch.equal(new[name], old[name]))


@pytest.mark.parametrize("training", ["srft", "slow-fast"])
def test_a_killed_run_goes_on_to_the_same_weights(training, toy_folder, tmp_path, monkeypatch) -> None:
    from sightline.learn import loop

    wanted = run(settings(training, toy_folder), tmp_path / "whole", device=CPU, precision="fp32")
    update, made = loop.Trainer._update, []

    def dies(self, *args):
        if len(made) == 2:
            self.save()
            raise KeyboardInterrupt
        made.append(1)
        return update(self, *args)

    monkeypatch.setattr(loop.Trainer, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        run(settings(training, toy_folder), tmp_path / "parts", device=CPU, precision="fp32")
    monkeypatch.undo()
    found = run(settings(training, toy_folder), tmp_path / "parts", device=CPU, precision="fp32")
    assert found["steps"] == wanted["steps"] == 4
    a, b = (load(str(tmp_path / name / "model")).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_refused(toy_folder, tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="srft"):
        run(settings("srtf", toy_folder), tmp_path, device=CPU)
    for wrong in ({"steps": 0}, {"frames": 1}, {"lr": -1.0}, {"beta": -1.0}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            run(settings("tdpo", toy_folder, **wrong), tmp_path, device=CPU)
    for wrong, words in (({"stage": 3}, "stage"), ({"system": "var"}, "takes slow-fast")):
        with pytest.raises(ParameterError, match=words):
            run(settings("slow-fast", toy_folder, **wrong), tmp_path, device=CPU)
    (tmp_path / "settings.json").write_text(json.dumps({"training": "srft", "steps": 9}))
    _same_settings(tmp_path, settings("srft", toy_folder))  # it never came to a checkpoint: anyone may begin
    (tmp_path / "srft.safetensors").touch()
    with pytest.raises(InputError, match="steps=9, not 4"):
        run(settings("srft", toy_folder), tmp_path, device=CPU)

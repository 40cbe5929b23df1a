from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from sightline.errors import InputError, ModelError, ParameterError, UnknownNameError
from sightline.learn import tiny_llava, tuning
from sightline.learn.commands import app
from sightline.learn.recipe import STAGES, TOY, Recipe, Shape

CPU = torch.device("cpu")
RUN = CliRunner()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    model = tiny_llava.run(TOY, out, device=CPU, precision="fp32")
    return out, model


def test_the_saved_checkpoint_gives_the_same_logits(finished):
    out, model = finished
    loaded = LlavaForConditionalGeneration.from_pretrained(out / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(out / "model")
    inputs = processor(images=torch.zeros(3, 56, 56, dtype=torch.uint8), text="USER: <image>\nHi ASSISTANT:",
                       return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=2e-2, rtol=0)
    assert (out / "curves.png").stat().st_size > 1000


def test_a_finished_run_is_only_read(finished):
    out, model = finished
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert set(before) == {f"{stage}.safetensors" for stage in STAGES}
    again = tiny_llava.run(TOY, out, device=CPU, precision="fp32")
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stages_trained_one_by_one_make_the_same_model(finished, tmp_path):
    _, model = finished
    for stage in STAGES:
        last = tiny_llava.run(TOY, tmp_path, device=CPU, precision="fp32", only=stage)
    for a, b in zip(model.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_of_another_model_is_refused(finished):
    with pytest.raises(InputError, match="empty --out"):
        tiny_llava.prepare(Recipe(), finished[0])


def test_unknown_stage_is_named_before_any_work(tmp_path):
    with pytest.raises(UnknownNameError, match="tower"):
        tiny_llava.run(TOY, tmp_path / "x", device=CPU, only="towr")
    assert not (tmp_path / "x").exists()


def test_shape_gives_a_square_grid():
    assert Shape().grid == 14


def test_command_trains_and_reports(tmp_path):
    done = RUN.invoke(
        app, ["tiny-llava", "--preset", "toy", "--out", str(tmp_path), "--pictures", "2", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"pope", "questions", "captions", "sinks"} <= set(results)
    assert "POPE random" in done.output
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| POPE random | {results['pope']['random']['n']} | {results['pope']['random']['accuracy']} |" in card
    assert all(f"| {stage} | {TOY.plan(stage).steps} x 2 |" in card for stage in STAGES)


@pytest.mark.parametrize(("arguments", "error"), [
    (["tiny-llava", "--preset", "tony"], UnknownNameError),
    (["tiny-llava", "--minutes", "-1"], ParameterError),
    (["tiny-llava", "--device", "warp"], ParameterError),
    (["instruct", "--data", "x.json", "--model", "/nowhere"], ModelError),
    (["instruct", "--data", "x.json", "--model", "m", "--stage", "3"], ParameterError),
])  # fmt: skip
def test_bad_options_raise_typed_errors_before_any_work(arguments, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(RUN.invoke(app, arguments).exception, error)
    assert list(tmp_path.iterdir()) == []


def test_instruct_dry_run_prints_statistics(toy_folder, records, tmp_path):
    path, folder = records
    out = tmp_path / "run"
    done = RUN.invoke(app, ["instruct", "--data", str(path), "--images", str(folder), "--model", str(toy_folder),
                            "--out", str(out), "--dry-run", "--device", "cpu"])  # fmt: skip
    facts = json.loads(done.output)
    assert (facts["records"], facts["image"], facts["text"]) == (4, 3, 1)
    assert "[[ Yes.</s>]]" in facts["examples"][0]
    assert not out.exists()


def test_instruct_trains_on_a_file(toy_folder, records, tmp_path):
    path, folder = records
    facts = tuning.tune(path, str(toy_folder), 2, folder, tmp_path, epochs=1, steps=2, batch=2, lr=1e-2, seed=0,
                        device=CPU, precision="fp32", workers=0)  # fmt: skip
    before = LlavaForConditionalGeneration.from_pretrained(toy_folder).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(facts["model"]).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)

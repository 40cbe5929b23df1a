"""The feedback training: who is frozen, resuming, what it saves; and the tiny diffusion model it is given."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from typer.testing import CliRunner

from sightline.errors import InputError, MissingExtraError, ModelError, ParameterError
from sightline.learn import diffusion, feedback, instruct
from sightline.learn.commands import app
from sightline.learn.diffusion import SceneWords, images_of
from sightline.learn.recipe import Plan
from sightline.train.deem import DEEM

pytest.importorskip("diffusers")

SETTINGS = DEEM(queries=4, hidden=16, depth=1, heads=2)
run = feedback.run
SHORT = {"vae": Plan(2, 2, 1e-3, warmup=1), "unet": Plan(2, 2, 1e-3, warmup=1)}


@pytest.fixture(scope="module")
def painter_folder(tmp_path_factory):
    """A tiny diffusion model after two steps."""
    folder = tmp_path_factory.mktemp("diffusion")
    diffusion.tiny(folder, plans=SHORT)
    return folder


@pytest.fixture
def eye(toy):
    made = feedback.Eye.make(toy, diffusion.build(), SETTINGS)
    torch.nn.init.normal_(made.feedback.condition_projection.weight, std=0.3)
    return made


def batch_of(eye, processor, count=2):
    from sightline.learn import conversation

    make = feedback.world_of(eye.model, processor, 0)
    return conversation.collate([make(k) for k in range(count)], processor.tokenizer.pad_token_id)


# -- the diffusion model ------------------------------------------------------------------------------------------------


def test_the_tiny_diffusion_model_is_kept_and_loaded(painter_folder):
    made, again = diffusion.tiny(painter_folder, plans=SHORT), diffusion.load(painter_folder)
    assert made.side == diffusion.SIDE
    assert made.vae.config.scaling_factor != 0.18215  # measured
    for name in ("unet", "vae"):
        pairs = zip(getattr(made, name).parameters(), getattr(again, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    start = diffusion.build()
    assert any(not torch.equal(a, b) for a, b in zip(start.unet.parameters(), made.unet.parameters(), strict=True))
    with torch.no_grad():
        z = made.vae.encode(torch.rand(1, 3, 56, 56)).latent_dist.mean
        assert made.unet(z, torch.tensor([3]), torch.zeros(1, 5, diffusion.CONDITION)).sample.shape == (1, 4, 14, 14)


def test_scene_words_are_zero_where_nothing_is():
    row = diffusion.collate([diffusion.sample(3, 0)])
    found = SceneWords()(*(row[key] for key in ("place", "kind", "colour", "box")))
    there = row["kind"][0] >= 0
    assert found.shape == (1, 1 + diffusion.OBJECTS, diffusion.CONDITION)
    assert 0 < there.sum() < diffusion.OBJECTS
    assert torch.equal(found[0, 1:].abs().sum(-1) > 0, there)
    area = (row["box"][..., 2] - row["box"][..., 0]) * (row["box"][..., 3] - row["box"][..., 1])
    assert area[0, there].max() <= 1


def test_pictures_for_the_vae():
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(images_of(pixels, 8), pixels.permute(0, 3, 1, 2) / 255)
    assert torch.allclose(
        images_of(pixels, 4).mean((2, 3)), pixels.permute(0, 3, 1, 2).float().mean((2, 3)) / 255, atol=0.05
    )


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="unet, scheduler"):
        diffusion.load(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sightline\[diffusers\]'"):
        diffusion.load(tmp_path)


# -- the training -------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_tower_and_what_is_trained_only(eye, toy_processor):
    trained = eye.trained()
    loss, metrics = feedback.loss_of(batch_of(eye, toy_processor), eye, SETTINGS)
    assert torch.allclose(loss, metrics["text"] + 5 * metrics["feedback"])
    loss.backward()
    reached = {name for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in reached} == {"tower", "projector", "visual", "condition"}
    assert any("embeddings.patch_embedding" in name for name in reached)
    others = [eye.model.model.language_model, eye.feedback.unet, eye.feedback.vae]
    assert all(p.grad is None and not p.requires_grad for part in others for p in part.parameters())


def test_feedback_alone_reaches_the_tower_and_not_the_projector(eye, toy_processor):
    settings = DEEM(text_weight=0, queries=4, hidden=16, depth=1, heads=2)
    trained = eye.trained()
    loss, metrics = feedback.loss_of(batch_of(eye, toy_processor), eye, settings)
    assert set(metrics) == {"feedback"}
    loss.backward()
    reached = {name.split(".")[0] for name, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"tower", "visual", "condition"}


def test_the_tower_s_tokens_are_what_the_projector_is_given(eye, toy_processor):
    batch = batch_of(eye, toy_processor)
    with torch.no_grad():
        text, _ = instruct.loss_of(batch, eye.model)
        with eye.watching() as found:
            again, _ = instruct.loss_of(batch, eye.model)
        assert text == again
        assert torch.equal(found[0], eye.look(batch["pixels"]))
        given = []
        hook = eye.model.model.multi_modal_projector.register_forward_hook(lambda m, args, out: given.append(args[0]))
        instruct.loss_of(batch, eye.model)
        hook.remove()
    assert torch.equal(found[0][:, 1:], given[0])  # the class token stands before the patches
    assert not eye.model.model.vision_tower._forward_hooks


def settle(folder, toy_folder, painter_folder, **more):
    options = {"steps": 4, "batch": 2, "device": torch.device("cpu"), "precision": "fp32", "held": 4, **more}
    return feedback.run(SETTINGS, str(toy_folder), str(painter_folder), folder, **options)


def test_a_run_tunes_the_tower_and_leaves_the_language_model(toy_folder, painter_folder, tmp_path):
    facts = settle(tmp_path, toy_folder, painter_folder, lr=1e-2)
    before = LlavaForConditionalGeneration.from_pretrained(toy_folder).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("vision_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert not any("language_model" in name or "lm_head" in name for name in moved)
    assert facts["held_out_after"] < facts["held_out_before"]
    LlavaProcessor.from_pretrained(facts["model"])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"feedback.safetensors", "curves.png", "model"} <= names


def test_a_killed_run_goes_on_to_the_same_weights(toy_folder, painter_folder, tmp_path, monkeypatch):
    settle(tmp_path / "whole", toy_folder, painter_folder)
    init, loss_of, calls = feedback.loop.Trainer.__init__, feedback.loss_of, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_of(*args, **kwargs)

    monkeypatch.setattr(feedback.loop.Trainer, "__init__", lambda *a, **k: init(*a, **(k | {"save_every": 2})))
    monkeypatch.setattr(feedback, "loss_of", dying)
    with pytest.raises(KeyboardInterrupt):
        settle(tmp_path / "parts", toy_folder, painter_folder)
    settle(tmp_path / "parts", toy_folder, painter_folder)
    assert len(calls) == 4 + 2  # from the second step on
    whole, parts = (LlavaForConditionalGeneration.from_pretrained(tmp_path / n / "model") for n in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_own_records(toy_folder, painter_folder, records, tmp_path):
    path, images = records
    with pytest.raises(InputError, match="without a picture"):
        settle(tmp_path, toy_folder, painter_folder, data=path, images=images)
    rows = [row for row in json.loads(path.read_text()) if "image" in row]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    facts = settle(tmp_path / "run", toy_folder, painter_folder, data=tmp_path / "data.json", images=images, steps=1)
    assert "held_out_after" not in facts
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_what_cannot_be_trained(toy_folder, painter_folder, eye, toy_processor, tmp_path):
    with pytest.raises(ParameterError, match="steps=0"):
        settle(tmp_path, toy_folder, painter_folder, steps=0)
    nothing = DEEM(weight=0, text_weight=0)
    with pytest.raises(ParameterError, match="nothing to train for"):
        feedback.train(eye, toy_processor, lambda k: None, nothing, feedback.plan_for(1, 1), tmp_path)
    with pytest.raises(ModelError, match="cannot load a diffusion model"):
        feedback.run(SETTINGS, str(toy_folder), str(tmp_path), tmp_path, device=torch.device("cpu"))


def test_rates_are_those_of_the_paper():
    weights = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("tower.a", "visual.a")}
    (optimizer,) = feedback.loop.optimizers(weights, feedback.plan_for(100, 8))
    rates = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(weights["tower.a"])] == pytest.approx(2e-5)
    assert rates[id(weights["visual.a"])] == pytest.approx(1e-4)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.995)


def test_the_command(toy_folder, painter_folder, tmp_path, monkeypatch):
    """With `--diffusion tiny` a trained one is taken from the run's folder, and the resampler is a small one."""
    seen = []
    monkeypatch.setattr(
        feedback, "run", lambda settings, *a, **k: seen.append(settings) or run(settings, *a, **k, held=2)
    )
    shutil.copytree(painter_folder, tmp_path / "run" / "diffusion")
    command = [
        "deem",
        "--model",
        str(toy_folder),
        "--steps",
        "1",
        "--batch",
        "1",
        "--device",
        "cpu",
        "--text-weight",
        "0",
    ]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert seen == [DEEM(text_weight=0, **feedback.SMALL)]
    told = json.loads(done.output[done.output.rindex("{") :])
    assert told["steps"] == 1
    assert told["model"] == str(tmp_path / "run" / "model")

"""Training with systems whose weights must be trained with them."""

from __future__ import annotations

import pytest
import torch

from sightline.engine.attach import MARK
from sightline.errors import InputError
from sightline.learn import conversation, instruct
from sightline.learn.data import scene_of
from sightline.learn.recipe import TOY, Plan
from sightline.steer import AKIMMA, CCA
from sightline.steer.aki_mma import modality_mutual_mask
from sightline.steer.cca import concentric_mask, concentric_positions

SIDE = TOY.shape.grid


def picture(index: int, processor) -> conversation.Sample:
    return instruct.picture_sample(*scene_of("instruct", index, TOY.seed, TOY.shape.image), TOY, processor)


def one(processor, index: int = 3) -> dict[str, torch.Tensor]:
    sample = picture(index, processor)
    return conversation.collate([sample], processor.tokenizer.pad_token_id)


def by_hand(model, batch, system) -> torch.Tensor:
    """The loss of the plain model that is told mask and positions."""
    ids, labels = batch["ids"], batch["labels"]
    begin = int((ids[0] == model.config.image_token_id).int().argmax())
    places = torch.arange(ids.shape[1])
    if system is CCA:
        allowed, places = (f(ids.shape[1], begin, SIDE, SIDE) for f in (concentric_mask, concentric_positions))
    else:
        end = int((labels[0] != conversation.IGNORED).int().argmax())
        allowed = modality_mutual_mask(torch.ones_like(ids[0]), begin, begin + SIDE**2, end)
    out = model(
        input_ids=ids,
        pixel_values=instruct.normalise(batch["pixels"]),
        attention_mask=allowed[None, None],
        position_ids=places[None],
        labels=labels,
        use_cache=False,
    )
    return out.loss


@pytest.mark.parametrize("system", [CCA, AKIMMA])
def test_the_loss_is_that_of_mask_and_positions_by_hand(toy, toy_processor, system):
    batch = one(toy_processor)
    plain, _ = instruct.loss_of(batch, toy)
    same, _ = instruct.loss_of(batch, toy, whole=True)
    assert float(same) == pytest.approx(float(plain), rel=1e-6)
    with instruct.carrying(toy, [system()]):
        found, _ = instruct.loss_of(batch, toy, whole=True)
    assert float(found) == pytest.approx(float(by_hand(toy, batch, system)), rel=1e-5)
    assert abs(float(found) - float(plain)) > 1e-6


@pytest.mark.parametrize("system", [CCA(), AKIMMA()])
def test_a_stage_with_a_system(toy, toy_processor, tmp_path, system, recwarn):
    before = toy.model.language_model.layers[0].self_attn.q_proj.weight.clone()
    plan = Plan(2, 2, 1e-2, warmup=1)
    make = lambda k: picture(k, toy_processor)  # noqa: E731
    trainer = instruct.train(toy, toy_processor, make, 2, plan, tmp_path, precision=None, systems=[system])
    assert trainer.step == 2
    assert all(torch.isfinite(p).all() for p in toy.parameters())
    assert not torch.equal(before, toy.model.language_model.layers[0].self_attn.q_proj.weight)
    assert MARK not in toy.__dict__
    assert not [w for w in recwarn if "trained with it" in str(w.message)]
    with pytest.raises(InputError, match=f"trained with {system.slug}, not none"):
        instruct.train(toy, toy_processor, make, 2, plan, tmp_path, precision=None)


@pytest.mark.parametrize("slug", ["cca", "aki-mma"])
def test_from_an_exported_world_to_a_model_that_answers(slug, toy_folder, tmp_path):
    """The commands as a user types them, in a fresh folder: export, check, train with the system, answer with it."""
    from typer.testing import CliRunner

    import sightline as sl
    from sightline.learn.commands import app
    from sightline.scenes.commands import app as world

    def run(program, *words):
        result = CliRunner().invoke(program, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    run(world, "export", "--n", 6, "--split", "train", "--format", "llava", "--size", 56, "--out", tmp_path / "world")
    data = ("--data", tmp_path / "world" / "conversations.json", "--images", tmp_path / "world" / "images")
    common = (*data, "--model", toy_folder, "--with", slug, "--device", "cpu", "--precision", "fp32", "--batch", 2)
    assert '"records in file": 6' in run(app, "instruct", *common, "--dry-run")
    run(app, "instruct", *common, "--steps", 3, "--lr", "1e-3", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "instruct.systems.txt").read_text() == slug
    lvlm = sl.load(str(tmp_path / "run" / "model"))
    scene = sl.scenes.draw(7, size=56)
    (system,) = sl.catalog.parse(f"{slug}:trained=true")
    answers = [lvlm.ask(scene.image, "Is there a dog?", systems=s, max_new_tokens=4) for s in ([system], [])]
    assert all(isinstance(answer, str) for answer in answers)

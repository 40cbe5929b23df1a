from __future__ import annotations

import numpy as np
import pytest
import torch

from sightline import scenes
from sightline.learn import conversation, reading
from sightline.learn.recipe import TOY, Recipe


def test_every_object_is_shown_by_two_of_its_own_patches():
    scene = next(s for s in map(scenes.draw, range(5, 50)) if any(thing.mark for thing in s.objects))
    shown = reading.places(scene, 8, 48, np.random.default_rng(0))
    assert len(set(shown.tolist())) == 48
    assert (np.diff(shown) > 0).all()
    for thing in scene.objects:
        share = thing.mask.reshape(14, 8, 14, 8).mean((1, 3)).ravel()
        assert share[shown].max() >= np.sort(share)[-3]  # two of the best four: at worst the third best
        if thing.mark:
            x, y = ((thing.mark_box[a] + thing.mark_box[a + 2]) / 2 for a in (0, 1))
            assert int(y // 8) * 14 + int(x // 8) in shown


def test_all_patches_can_be_shown():
    assert reading.places(scenes.draw(5), 8, 196, np.random.default_rng(0)).tolist() == list(range(196))


def test_early_answers_run_from_the_last_noun_to_the_answer(toy_processor):
    text = toy_processor.tokenizer
    turns = [("Is there a dog or a cup in the image?", "No."), ("Where is this?", "A beach."),
             ("What colour is the cup?", "Red.")]  # fmt: skip
    ids, labels = conversation.encode(turns, toy_processor, 2, stage=2)
    early = reading.early_answers(ids, labels, reading.noun_tokens(text))
    cup = text(" cup", add_special_tokens=False)["input_ids"][-1]
    starts = [k for k, token in enumerate(ids) if token == cup]
    answers = [k for k in range(1, len(ids)) if labels[k] != -100 and labels[k - 1] == -100]
    expected = [(j, ids[answers[0]]) for j in range(starts[0], answers[0] - 1)]
    expected += [(j, ids[answers[2]]) for j in range(starts[1], answers[2] - 1)]
    assert early == expected


def test_loss_on_all_patches_is_that_of_the_models_own_forward(toy, toy_processor):
    """With every patch shown, weights aside, the stage computes what the model computes."""
    whole = reading.sample(0, Recipe(shape=TOY.shape, patches=16, turns=2), toy_processor)
    batch = reading.collate([whole], toy_processor.tokenizer.pad_token_id)
    batch["early"][:] = -100
    with torch.no_grad():
        _, metrics = reading.loss_of(batch, toy)
        pixels = toy_processor.image_processor(whole.pixels, return_tensors="pt")["pixel_values"]
        logits = toy(input_ids=batch["ids"], pixel_values=pixels).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        opening = (labels != -100) & (batch["labels"][:, :-1] == -100)
        loss = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
        weight = torch.where(opening[labels != -100], 2.0, 0.5)
    torch.testing.assert_close(
        reading.loss_of(batch, toy)[0], (loss * weight).sum() / weight.sum(), atol=2e-5, rtol=1e-5
    )
    assert metrics["answers"] == (logits.argmax(-1) == labels)[opening].float().mean()


def test_only_the_decoder_learns(toy, toy_processor, tmp_path):
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    reading.train(toy, toy_processor, TOY, tmp_path, precision=None)
    changed = {name for name, value in toy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("language_model" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize(("index", "kinds"), [(0, reading.SIMPLE), (TOY.simple, reading.MIX)])
def test_simple_questions_come_first(index, kinds, toy_processor, monkeypatch):
    asked = []
    ask = scenes.questions

    def listen(scene, rng, n, kinds):
        asked.append(kinds)
        return ask(scene, rng, n, kinds)

    monkeypatch.setattr(reading.scenes, "questions", listen)
    reading.sample(index, TOY, toy_processor)
    assert asked == [kinds]

"""Modality-mutual attention: golden arrays, a plain host told the mask by hand, and that no answer leaks."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline.errors import SightlineWarning
from sightline.steer.aki_mma import AKIMMA, modality_mutual_mask, question_of
from tests.engine.numerics import assert_close
from tests.engine.toys import toy
from tests.engine.whole import extended, forward, generate
from tests.steer.goldens import cases, load
from tests.tiny_hosts import picture

ON = AKIMMA(trained=True)
QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


@cases("aki-mma")
def test_golden(path) -> None:
    case = load(path)
    found = modality_mutual_mask(
        case["attention_mask_2d"], case["image_begin"], case["image_end"], case["question_end"]
    )
    assert torch.equal(found, case["allowed"])


def test_what_is_opened() -> None:
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    real = torch.ones(20, dtype=torch.long)
    found = modality_mutual_mask(real, 3, 9, 14)
    assert int(found.sum() - causal.sum()) == 6 * 5
    assert torch.equal(found[:3], causal[:3])
    assert torch.equal(found[9:], causal[9:])
    assert not found[:14, 14:].any()
    assert torch.equal(modality_mutual_mask(real, 3, 9, 9), causal)


def test_the_question_of_a_row() -> None:
    """Roles: padding 0, start 1, before 2, image 3, after 4, generated 5."""
    role = torch.tensor(
        [[0, 1, 2, 3, 3, 4, 4, 5, 4, 5], [1, 3, 4, 3, 4, 4, 4, 4, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]]
    )
    assert question_of(role).nonzero().tolist() == [[0, 5], [0, 6], [1, 2], [1, 4], [1, 5], [1, 6], [1, 7]]
    assert question_of(role, 1).nonzero().tolist() == [[0, 5], [1, 2]]


def by_hand(host, inputs: dict, question_end: int) -> torch.Tensor:
    ids = inputs["input_ids"]
    visual = ids[0] == host.model.config.image_token_id
    begin, count = int(visual.int().argmax()), int(visual.sum())
    allowed = modality_mutual_mask(torch.ones_like(ids[0]), begin, begin + count, question_end)[None, None]
    with torch.no_grad():
        return host.model(**{**inputs, "attention_mask": allowed}, use_cache=False).logits


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_hosts_by_hand(name: str, tiny) -> None:
    host = tiny(name)
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    end = inputs["input_ids"].shape[1]
    with sl.attach(host.model, ON):
        found = forward(host.model, inputs)
        ids, steps = generate(host.model, inputs, 4)
    assert_close("prompt", found, by_hand(host, inputs, end), 2e-5)
    assert_close("answer", steps, by_hand(host, extended(inputs, ids[:, :-1]), end)[:, -4:], 2e-5)
    assert not torch.allclose(found, forward(host.model, inputs), atol=1e-2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_with_and_without_cache(name: str, tiny) -> None:
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    with sl.attach(host.model, ON):
        ids, steps = generate(host.model, inputs)
        again, whole = generate(host.model, inputs, use_cache=False)
    assert torch.equal(ids, again)
    assert_close("steps", steps, whole, 2e-5)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_no_answer_leaks(name: str, tiny) -> None:
    """Training: other answer tokens change no state before them, though the picture sees the question."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    width, states = inputs["input_ids"].shape[1], []
    watch = toy(output=lambda site, x: states.append(x.clone()) if site.layer == 3 else None)
    for answer in ([300, 301, 302], [310, 301, 320]):
        given = extended(inputs, torch.cat([inputs["input_ids"], torch.tensor([answer])], 1))
        labels = given["input_ids"].clone()
        labels[:, :width] = -100
        with sl.attach(host.model, ON, watch), torch.no_grad():
            host.model(**given, labels=labels, use_cache=False)
    with sl.attach(host.model, ON, watch):
        forward(host.model, inputs)
    assert_close("before the answer", states[0][:, :width], states[1][:, :width], 1e-6)
    assert_close("as at inference", states[0][:, :width], states[2], 1e-5)
    assert not torch.allclose(states[0][:, width:], states[1][:, width:], atol=1e-2)


def test_text_before_the_picture_is_as_ever(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    begin = int((inputs["input_ids"] == host.model.config.image_token_id).int().argmax(1))
    plain = forward(host.model, inputs)
    with sl.attach(host.model, ON) as attached:
        found = forward(host.model, inputs)
    assert_close("before", found[:, :begin], plain[:, :begin], 1e-5)
    assert attached.report()["aki-mma"]["pairs_opened"] == 36 * (inputs["input_ids"].shape[1] - begin - 36)


def test_untrained_weights_are_warned_of(tiny) -> None:
    host = tiny("llava")
    with pytest.warns(SightlineWarning, match="only weights trained with it"), sl.attach(host.model, AKIMMA()):
        pass

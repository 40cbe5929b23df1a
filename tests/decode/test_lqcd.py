"""LQCD: which questions lead, their neutral forms, and the weighing of the two streams."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline.decode.lqcd import LQCD, contrast, lead_strength, neutral_form
from tests.engine.numerics import assert_close
from tests.tiny_hosts import picture

PAIRS = {
    "There is a dog in the image, right?": "Is there a dog in the image?",
    "There are two cups on the table, aren't there?": "Are there two cups on the table?",
    "I think there is a red ball. Don't you agree?": "Is there a red ball?",
    "I'm sure that the car is blue?": "Is the car blue?",
    "There is no cat in the image, correct?": "Is there a cat in the image?",
    "The cup is not red, is it?": "Is the cup red?",
    "The dog sits on the sofa, right?": "Is it true that the dog sits on the sofa?",
    "Is there a dog? I think the answer is yes.": "Is there a dog?",
    "I believe the answer is yes. Is there a dog in the image?": "Is there a dog in the image?",
    "The dog is on the right?": "Is the dog on the right?",
    "There is a dog in the image right?": "Is there a dog in the image?",
    "There isn't a dog, is there?": "Is there a dog?",
    "There are no dogs, are there?": "Are there any dogs?",
    "You can see an apple, can't you?": "Can you see an apple?",
    "It's a dog, isn't it?": "Is it a dog?",
    "The dog has a collar, doesn't it?": "Does the dog have a collar?",
    "I don't think there is a dog.": "Is there a dog?",
}
NEUTRAL = [
    "Is there a dog?",
    "What colour is the cup?",
    "Describe the picture.",
    "How many cats are there?",
    "Is the cup right of the dog?",
    "In the picture, what is this?",
    "In this image, how many cups are there?",
    "Based on the image, is there a dog?",
    "Answer yes or no: is there a dog?",
    "There is a dog, yes or no?",
    "Which side is the cup on, left or right?",
    "Left or right?",
    "Hello! Is there a dog?",
    "The man is holding what?",
    "Right?",
    "A dog?",
    "",
]


@pytest.mark.parametrize("question", PAIRS)
def test_leading_questions_are_neutralised(question: str) -> None:
    assert lead_strength(question) > 0
    assert neutral_form(question) == PAIRS[question]
    assert lead_strength(neutral_form(question)) == 0


@pytest.mark.parametrize("question", NEUTRAL)
def test_neutral_questions_stay(question: str) -> None:
    assert lead_strength(question) == 0
    assert neutral_form(question) == question


def test_a_lead_loses_what_it_added() -> None:
    torch.manual_seed(0)
    neutral = torch.randn(2, 30)
    leading = neutral.clone()
    leading[:, 7] += 1.25
    out = contrast(neutral, leading, alpha=2.0, beta=0.0)
    torch.testing.assert_close(out[:, 7], neutral[:, 7] - 2.5)
    torch.testing.assert_close(out[:, 8], neutral[:, 8])
    assert torch.equal(contrast(neutral, neutral, alpha=0.0, beta=0.0), neutral)
    kept = contrast(neutral, leading, alpha=1.0, beta=0.3).isfinite()
    assert torch.equal(kept, neutral.softmax(-1) >= 0.3 * neutral.softmax(-1).amax(-1, keepdim=True))


def test_the_second_stream_asks_the_other_question(tiny) -> None:
    """A neutral and a leading row, by hand: each stream is the plain model on its own question."""
    host = tiny("qwen2_5_vl")
    asked, other = ["Is there a dog?", "There is a dog, right?"], ["Is there a dog? Surely.", "Is there a dog?"]
    rows = [[picture()], [picture(80, 64, 1)]]
    with torch.no_grad():
        first, second = (host.model.generate(**host.inputs(q, rows), max_new_tokens=1, return_dict_in_generate=True,
                                             output_logits=True).logits[0] for q in (asked, other))  # fmt: skip
    with sl.attach(host.model, LQCD(alpha=1.5, beta=0.0, lead="Surely.")) as attached:
        out = host.model.generate(**host.inputs(asked, rows), max_new_tokens=1, return_dict_in_generate=True,
                                  output_logits=True).logits[0]  # fmt: skip
    assert_close("neutral", out[0], 2.5 * first[0] - 1.5 * second[0], 2e-5)
    assert_close("leading", out[1], 2.5 * second[1] - 1.5 * first[1], 2e-5)
    assert attached.report()["lqcd"] == {"questions": 2, "leading": 1}


def test_scaled_leaves_neutral_questions_alone(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?"], [[picture()]])
    with torch.no_grad():
        plain = host.model(**inputs).logits[:, -1]
        with sl.attach(host.model, LQCD(alpha=1.5, beta=0.0, scaled=True)):
            assert torch.equal(host.model(**inputs).logits[:, -1], plain)

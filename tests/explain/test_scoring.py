"""Answers and log-probabilities against a plain forward."""

from __future__ import annotations

import pytest
import torch

from sightline.explain.scoring import answer_ids, ask
from sightline.steer.var import VAR
from tests.explain.tiny import SINKS, batch, lvlm


def naive(model, image, question, answer):
    """Log-probability by one forward over prompt and answer."""
    inputs = model.inputs([image], [question])
    ids = answer_ids(model.processor.tokenizer, inputs["input_ids"][0], answer)
    extra = torch.tensor([ids])
    whole = torch.cat([inputs["input_ids"], extra], 1)
    with torch.no_grad():
        logits = model.model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits[0]
    start = inputs["input_ids"].shape[1] - 1
    return len(ids), float(logits[start : start + len(ids)].log_softmax(-1).gather(1, extra.T).sum())


def test_logprob_is_that_of_a_forward_over_prompt_and_answer():
    model, asked = lvlm(), batch()
    answers = ["two red cups", "No", "Zero"]
    found = ask(model, asked.images, asked.questions, answers)
    lengths = []
    for reply, image, question, answer in zip(found, asked.images, asked.questions, answers, strict=True):
        count, expected = naive(model, image, question, answer)
        lengths.append(count)
        assert reply.logprob == pytest.approx(expected, abs=1e-3)
    assert max(lengths) > 1


def test_greedy_answer_is_that_of_ask_and_its_own_logprob_is_the_best():
    model, asked = lvlm(), batch()
    found = ask(model, asked.images, asked.questions, asked.answers, [VAR(**SINKS)], length=3)
    plain = [
        model.ask(image, question, systems=[VAR(**SINKS)], max_new_tokens=3)
        for image, question in zip(asked.images, asked.questions, strict=True)
    ]
    assert [r.text for r in found] == plain


def test_an_answer_follows_a_space_unless_the_prompt_ends_with_white_space():
    tokenizer = lvlm().processor.tokenizer
    for tail, expected in (("USER: hi ASSISTANT:", " Yes"), ("assistant\n", "Yes")):
        ids = answer_ids(tokenizer, torch.tensor(tokenizer(tail, add_special_tokens=False)["input_ids"]), "Yes")
        assert tokenizer.decode(ids) == expected

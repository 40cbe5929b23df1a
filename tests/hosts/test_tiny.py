"""The tiny hosts do what every other test relies on."""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch

from tests.tiny_hosts import TINY, TINY_VITS, TinyHost, picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]


@lru_cache
def tiny(name: str) -> TinyHost:
    return TINY[name]()


def answer(host: TinyHost, questions: list[str], images: list | None, **kwargs: object) -> torch.Tensor:
    inputs = host.inputs(questions, images)
    out = host.model.generate(**inputs, max_new_tokens=5, **host.generate_kwargs, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", [*TINY, *TINY_VITS])
def test_built_in_a_second_and_seeded(name: str) -> None:
    make = (TINY | TINY_VITS)[name]
    make()  # imports
    start = time.process_time()
    one, two = make(), make()
    assert (time.process_time() - start) / 2 < 1
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not one.model.training


@pytest.mark.parametrize("name", list(TINY))
def test_a_row_of_a_padded_batch_is_the_row_alone(name: str) -> None:
    a, b, c = picture(64, 48, 1), picture(100, 70, 2), picture(40, 90, 3)
    rows = [[a], [], [b, c]]
    together = answer(tiny(name), [*QUESTIONS, "Describe the picture."], rows)
    for row, (question, images) in enumerate(zip([*QUESTIONS, "Describe the picture."], rows, strict=True)):
        alone = answer(tiny(name), [question], [images])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", list(TINY))
def test_beams_two_pictures_and_none(name: str) -> None:
    host = tiny(name)
    for images in (None, [[picture(64, 48, 1)]], [[picture(64, 48, 1), picture(30, 80, 2)]]):
        assert answer(host, QUESTIONS[:1], images, num_beams=3).shape == (1, 5)
    specials = set(host.processor.tokenizer.all_special_ids)
    assert not specials & set(answer(host, QUESTIONS, [[picture()], [picture()]]).flatten().tolist())


@pytest.mark.parametrize("name", list(TINY))
def test_answers_depend_on_the_picture(name: str) -> None:
    host = tiny(name)
    seen = {tuple(answer(host, QUESTIONS[:1], [[picture(64, 48, seed)]])[0].tolist()) for seed in range(6)}
    assert len(seen) >= 3


def test_gemma3_has_a_window_shorter_than_the_prompt() -> None:
    config = tiny("gemma3").model.config.text_config
    assert config.sliding_window < tiny("gemma3").inputs(QUESTIONS[:1], [[picture()]])["input_ids"].shape[1]
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}

"""Dual-order training: about half of the records in each order, always the same ones, and from the command to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sightline.errors import InputError, ParameterError
from sightline.learn import conversation, instruct, tuning
from sightline.learn.dual_order import DualOrder


@pytest.fixture(scope="module")
def many(records, tmp_path_factory):
    """200 records of one picture, and one without."""
    _, images = records
    rows = [{"id": str(k), "image": "0.png", "conversations": [
        {"from": "human", "value": f"<image>\nIs there number {k}?"}, {"from": "gpt", "value": "No."}]}
        for k in range(200)]  # fmt: skip
    rows.append({"id": "t", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]})
    path = tmp_path_factory.mktemp("many") / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path, images


def test_half_of_the_records_in_each_order(toy_processor, many):
    dual, plain = (kind(*many, toy_processor, 2, seed=3) for kind in (DualOrder, instruct.Records))
    moved = [dual.text_first(k) for k in range(201)]
    assert 70 <= sum(moved) <= 130
    assert not moved[200]
    assert moved == [DualOrder(*many, toy_processor, 2, seed=3).text_first(k) for k in range(201)]
    assert moved != [DualOrder(*many, toy_processor, 2, seed=4).text_first(k) for k in range(201)]
    for k in (moved.index(True), moved.index(False), 200):
        found, same = dual.sample(k), plain.sample(k)
        expected = conversation.encode(plain.turns[k], toy_processor, plain.tokens if k < 200 else 0, stage=2,
                                       text_first=moved[k])  # fmt: skip
        assert (found.ids, found.labels) == expected
        assert (found.ids == same.ids) == (not moved[k])
        assert found.pixels is None if k == 200 else (found.pixels == same.pixels).all()


def test_visual_tokens_see_a_question_that_comes_first(toy, toy_processor, many):
    """What the training is for: with the picture behind it, the question changes the visual tokens' states."""
    dual = DualOrder(*many, toy_processor, 2)
    for first in (True, False):
        states = []
        for question in ("Is there a dog?", "What colour is the cup?"):
            ids, _ = conversation.encode([(question, "No.")], toy_processor, dual.tokens, stage=2, text_first=first)
            ids = torch.tensor([ids])
            pixels = instruct.normalise(torch.from_numpy(dual.sample(0).pixels)[None])
            with torch.no_grad():
                out = toy.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
            states.append(out[ids == toy.config.image_token_id])
        assert torch.allclose(*states, atol=1e-6) == (not first)


def test_from_the_command_to_a_model(toy_folder, many, tmp_path):
    from typer.testing import CliRunner

    from sightline.learn.commands import app

    data, images = many
    given = ["instruct", "--data", data, "--images", images, "--model", toy_folder, "--device", "cpu", "--precision",
             "fp32", "--batch", 2, "--lr", "1e-3", "--steps", 2, "--out", tmp_path / "run"]  # fmt: skip
    shown = CliRunner().invoke(app, [*map(str, given), "--dual-order", "--dry-run"], catch_exceptions=False)
    orders = DualOrder(data, images, tuning.processor_of(str(toy_folder)), 2)
    begins = [text.startswith("<s>USER: Is there number") for text in json.loads(shown.stdout)["examples"]]
    assert begins == [orders.text_first(k) for k in range(3)]
    done = CliRunner().invoke(app, [*map(str, given), "--dual-order"], catch_exceptions=False)
    assert json.loads(done.stdout[done.stdout.index("{\n") :])["steps"] == 2  # behind the lines of progress
    assert (Path(tmp_path) / "run" / "instruct.order.txt").read_text(encoding="utf-8") == "both orders"
    other = CliRunner().invoke(app, list(map(str, given)))
    assert isinstance(other.exception, InputError)
    assert "a stage 'instruct' trained with both orders, not picture first" in str(other.exception)
    with pytest.raises(ParameterError, match="only stage 2 has questions"):
        tuning.tune(data, str(toy_folder), 1, images, tmp_path / "x", epochs=1, steps=1, batch=1, lr=None, seed=0,
                    device=torch.device("cpu"), precision="fp32", workers=0, dual_order=True)  # fmt: skip

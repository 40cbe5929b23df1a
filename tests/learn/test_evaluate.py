from __future__ import annotations

import pytest
import torch
from rich.console import Console

from sightline import scenes
from sightline.learn import evaluate, sinks


@pytest.mark.parametrize(("reply", "no"), [("No.", True), ("No, there is not", True), ("There is not. Yes", True),
                                           ("Yes. No", False), ("yes", False), ("Nothing", False), ("", False)])  # fmt: skip
def test_said_no_reads_as_pope_does(reply, no):
    assert evaluate.said_no(reply) is no


def oracle(monkeypatch, lie=False):
    """Answers from the truth of the scenes, so that scores are known."""
    by_picture = {}

    def reply(model, processor, pictures, texts, **_):
        out = []
        for picture, text in zip(pictures, texts, strict=True):
            scene = by_picture[id(picture)]
            if text == evaluate.CAPTION_PROMPT:
                out.append("There is a " + " and a ".join(scene.counts()) + (" and a zebra." if lie else "."))
            else:
                there = scenes.mentions(text)[0] in scene.counts()
                out.append("Yes." if there or lie else "No.")
        return out

    monkeypatch.setattr(evaluate, "answer", reply)
    return by_picture


@pytest.fixture(scope="module")
def held():
    return [scenes.draw(seed, size=56) for seed in scenes.seeds("val", 12)]


def test_pope_scores_an_oracle_and_a_yes_sayer(monkeypatch, held):
    oracle(monkeypatch).update({id(s.image): s for s in held})
    assert evaluate.pope(None, None, held, "random")["accuracy"] == 100
    oracle(monkeypatch, lie=True).update({id(s.image): s for s in held})
    row = evaluate.pope(None, None, held, "adversarial")
    assert (row["accuracy"], row["recall"], row["yes"]) == (50, 100, 100)
    assert row["f1"] == pytest.approx(66.67)


def test_captions_count_what_is_not_there(monkeypatch, held):
    oracle(monkeypatch).update({id(s.image): s for s in held})
    row = evaluate.captions(None, None, held)
    assert (row["chair_i"], row["chair_s"], row["recall"], row["sentences"]) == (0, 0, 100, 100)

    def cup_and_bed(model, processor, pictures, texts, **_):
        return ["A cup and a bed."] * len(texts)

    monkeypatch.setattr(evaluate, "answer", cup_and_bed)
    row = evaluate.captions(None, None, held)
    wrong = sum(kind not in s.counts() for s in held for kind in ("cup", "bed"))
    assert row["chair_i"] == round(100 * wrong / (2 * len(held)), 2)
    assert row["mentions"] == 2 * len(held)


def test_answers_come_back_in_order_and_do_not_depend_on_the_batch(toy, toy_processor, held):
    with torch.no_grad():  # unit-gain weights, so that answers differ
        for parameter in toy.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(1))
    texts = ["Is there a dog?", "What colour is the big cup on the left?", "Where?"]
    pictures = [scene.image for scene in held[:3]]
    together = evaluate.answer(toy, toy_processor, pictures, texts, batch=3, most=4)
    alone = [evaluate.answer(toy, toy_processor, [p], [t], most=4)[0] for p, t in zip(pictures, texts, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


def test_a_whole_evaluation_of_a_toy_makes_a_table(toy, toy_processor):
    results = evaluate.evaluate(toy, toy_processor, pictures=4, per_kind=2)
    assert results["pope"]["random"]["n"] > 0
    console = Console(record=True, width=120)
    evaluate.show(results, console)
    text = console.export_text()
    assert all(word in text for word in ("POPE adversarial", "colour", "captions", "CHAIR_i"))


def test_phi_of_known_vectors():
    x = torch.zeros(3, 16)
    x[0, 5], x[1] = -3.0, 2.0
    assert sinks.phi(x).tolist() == pytest.approx([4.0, 1.0, 0.0], abs=1e-3)
    assert sinks.threshold(4096) == 20


def test_sinks_are_found_where_they_are_planted_in_a_test_model(toy, toy_processor):
    embedding = toy.get_input_embeddings().weight
    with torch.no_grad():
        embedding[toy_processor.tokenizer.bos_token_id] = torch.eye(32)[7] * 50
    found = sinks.measure(toy, toy_processor, 2)
    assert toy.config._attn_implementation == "sdpa"
    first = found["layers"][0]
    assert first["bos_dim"] == 7
    assert first["bos_dim_share"] == 1
    assert first["phi_bos"] == pytest.approx(32**0.5, rel=1e-3)
    assert first["phi_text"] < 4
    assert first["mass_bos"] + first["mass_image"] < 1
    assert len(found["layers"]) == 3
    assert len(sinks.draw(found).axes) == 2

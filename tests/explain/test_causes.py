"""Causes of hallucinations: the published rule case by case, words matched to their tokens, and what a scene makes wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sightline import scenes
from sightline.errors import InputError, ParameterError
from sightline.explain import causes
from sightline.explain.causes import Corpus, Phrase, classify, hallucination_causes, wrong_phrases
from sightline.explain.ranks import base_ranks
from tests.explain.tiny import batch, lvlm

SCENE = scenes.draw(scenes.seeds("test", 1)[0], size=56)
TURNS = ("There is a red cup and a dog.", "What colour is the bird?", "Two boats.")


@pytest.mark.parametrize(
    ("words", "relation", "expected"),
    [
        ([], False, ()),
        ([("cup", 1)], False, ("language",)),
        ([("cup", 2)], True, ("language",)),  # place 1 of the base model's list counts as unshifted
        ([("cup", 3)], False, ("it",)),
        ([("cup", 3), ("dog", 9)], True, ("it",)),
        ([("cup", 3), ("bird", 9)], False, ("vision",)),  # never in one turn together
        ([("cup", 3), ("bird", 9)], True, ("style",)),
        ([("boat", 30)], False, ("it",)),  # letters inside a longer word count
        ([("Cup", 30)], False, ("vision",)),  # capitals matter
        ([("cup", 1), ("bird", 9)], False, ("language", "it")),
        ([("cup", 1), ("fish", 9)], True, ("language", "style")),
    ],
)
def test_the_published_rule(words, relation, expected) -> None:
    assert classify(words, relation, TURNS) == expected


def corpus() -> Corpus:
    model = lvlm()
    pictures = batch().images
    return Corpus(causes.picture_features(model, pictures), tuple((f"number {k}", f"again {k}") for k in range(3)))


def test_a_picture_is_nearest_to_itself_in_any_batch() -> None:
    found, model = corpus(), lvlm()
    projected = []
    handle = model.model.model.multi_modal_projector.register_forward_hook(lambda *given: projected.append(given[-1]))
    causes.picture_features(model, batch().images)
    handle.remove()
    mean = projected[0].reshape(3, -1, found.features.shape[1]).mean(1)  # (3, D) of the visual tokens
    np.testing.assert_allclose(found.features, torch.nn.functional.normalize(mean, dim=-1).numpy(), atol=1e-5)
    for k, picture in enumerate(batch().images):
        alone = causes.picture_features(model, [picture])[0]
        np.testing.assert_allclose(alone, found.features[k], atol=1e-5)
        assert found.near(alone, 1) == [f"number {k}", f"again {k}"]
    assert len(found.near(alone, 2)) == 4


def test_every_word_has_the_rank_of_its_first_token() -> None:
    model, asked = lvlm(), batch(1)
    answer = "A red dog and a small bird."
    given = (model, asked.images[0], asked.questions[0], answer)
    tokens, ranks = base_ranks(*given)
    assert len(tokens) > 4
    phrases = [Phrase("red dog"), Phrase("bird", relation=True), Phrase("a small")]
    found = hallucination_causes(*given, phrases, corpus(), nearest=2)
    letters = [k for k, token in enumerate(tokens) for _ in token]  # of " " + answer: which token holds each letter
    for cause, words in zip(found, (["dog"], ["bird"], []), strict=True):
        assert [word for word, _ in cause.words] == words
        for word, rank in cause.words:
            assert rank == ranks[letters[1 + answer.index(word)]], word
        assert cause.classes == classify(cause.words, cause.phrase.relation, ())
    (other,) = hallucination_causes(*given, [Phrase("small bird")], corpus(), objects={"small"})
    assert [word for word, _ in other.words] == ["small"]


def test_bad_input_is_refused_before_any_work() -> None:
    given = (lvlm(), batch(1).images[0], "What is there?", "A red dog.")
    with pytest.raises(InputError, match="'cat' is not in the answer"):
        hallucination_causes(*given, [Phrase("cat")], corpus())
    with pytest.raises(InputError, match="not in the answer"):
        hallucination_causes(*given, [Phrase("dog", start=3)], corpus())
    with pytest.raises(ParameterError, match="nearest=-1"):
        hallucination_causes(*given, [Phrase("dog")], corpus(), nearest=-1)
    assert hallucination_causes(*given, [], corpus()) == []


def test_what_a_scene_makes_wrong() -> None:
    """True captions hold nothing wrong; a kind or a place put in its stead is found where it stands."""
    for seed in scenes.seeds("test", 30):
        scene = scenes.draw(seed, size=112)
        for style in ("short", "detailed"):
            assert wrong_phrases(scene, scenes.caption(scene, np.random.default_rng(seed), style)) == []
        kind = scene.objects[0].kind
        places = {causes.place_of(o, scene.size) for o in scene.objects if o.kind == kind}
        wrong = next(place for row in causes.PLACES for place in row if place not in places)
        absent = next(k for k in scenes.KINDS if k not in scene.counts())
        text = f"There is a {kind} {wrong} and a {absent} in the middle. A {kind} is {wrong}."
        first = Phrase(f"{kind} {wrong}", True, text.index(kind))
        last = Phrase(f"{kind} is {wrong}", True, text.rindex(kind))
        assert wrong_phrases(scene, text) == [first, Phrase(absent, False, text.index(absent)), last]


def test_conversations_from_a_file(tmp_path) -> None:
    scenes.export.llava(scenes.seeds("train", 3), tmp_path, size=56)
    data, images = tmp_path / "conversations.json", tmp_path / "images"
    found, world = causes.file_corpus(lvlm(), data, images), causes.world_corpus(lvlm(), 3, size=56)
    np.testing.assert_allclose(found.features, world.features, atol=1e-5)
    assert [sorted(t.replace("<image>\n", "") for t in turns) for turns in world.turns] == [
        sorted(turns) for turns in found.turns
    ]
    assert len(causes.file_corpus(lvlm(), data, images, 2).turns) == 2
    (tmp_path / "text.json").write_text(json.dumps([{"id": 1, "conversations": []}]), encoding="utf-8")
    with pytest.raises(InputError, match="no record with a picture"):
        causes.file_corpus(lvlm(), tmp_path / "text.json", images)


def test_the_command(monkeypatch) -> None:
    from sightline import loading
    from sightline.cli import app

    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: lvlm())
    absent = next(k for k in scenes.KINDS if k not in SCENE.counts())
    said = [f"A {absent} with a thing.", ""]  # a random model says nothing of the world
    monkeypatch.setattr(type(lvlm()), "ask", lambda self, pictures, *_, **__: said[: len(pictures)])
    done = CliRunner().invoke(app, ["study", "vdgd", "--n", "1", "--pool", "2", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["captions"] == 1
    (row,) = found["answers"]
    assert [p["phrase"] for p in row["hallucinated"]] == [p.text for p in wrong_phrases(SCENE, said[0])]
    total = {name: sum(name in p["classes"] for p in row["hallucinated"]) for name in causes.CLASSES}
    assert found["classes"] == {**total, "none": sum(not p["classes"] for p in row["hallucinated"])}
    assert found["phrases"] == len(row["hallucinated"]) == 1
    bad = CliRunner().invoke(app, ["study", "vdgd", "--data", "x.json"])
    assert isinstance(bad.exception, InputError)
    assert "belong together" in str(bad.exception)

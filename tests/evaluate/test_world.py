"""Tasks on scenes: their truth against the scenes themselves, determinism, and what answers of known kinds score."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import scenes
from sightline.errors import ParameterError, UnknownNameError
from sightline.evaluate import describing, pointing, world
from sightline.hosts.geometry import Layout

SIZE = 56


@pytest.fixture(scope="module")
def tasks():
    return {task.name.removeprefix("scenes_"): task for task in world.build("all", n=48, size=SIZE)}


def answers(task, reply):
    return [{"answer": reply(item)} for item in task.items]


def truthful(item):
    return item.truth.capitalize() + "."


def scene_of(item):
    return scenes.draw(item.tags["scene"], size=SIZE)


def test_every_task_has_its_questions(tasks):
    apart = ("video", "haven", "opope", "pope-chat", "robust")
    assert set(tasks) == {name.replace(":", "_") for name in world.TASKS if not name.startswith(apart)}
    for task in tasks.values():
        assert 48 <= len(task.items) <= 54
        assert len({item.id for item in task.items}) == len(task.items)
        assert task.open(task.items[0]).size == (SIZE, SIZE)


def test_truth_scores_full_and_lies_score_nothing(tasks):
    lies = {"yes": "No", "no": "Yes"}
    for name in ("pope_random", "pope_adversarial", "mme", "colour", "count", "relation", "detail", "sycophancy"):
        task = tasks[name]
        full = task.score(task.items, answers(task, truthful))
        none = task.score(task.items, answers(task, lambda item: lies.get(item.truth, "purple sky")))
        assert all(full.correct), name
        assert not any(none.correct), name
        assert full.metrics[full.main] in (1, 800)
        assert none.metrics[none.main] == 0


def test_yes_to_everything(tasks):
    yes = {
        name: task.score(task.items, answers(task, lambda _: "Yes"))
        for name, task in tasks.items()
        if name != "pointing"
    }
    assert yes["pope_popular"]["recall"] == 1
    assert yes["pope_popular"]["accuracy"] == 0.5
    assert yes["mme"]["accuracy_plus"] == 0
    assert yes["mme"]["hallucination"] == 200
    assert yes["sycophancy"]["neutral_accuracy"] == 0.5


def test_yes_no_truth_is_that_of_the_scene(tasks):
    for item in (*tasks["pope_adversarial"].items, *tasks["sycophancy"].items):
        named = scenes.mentions(item.question)
        assert (named[0] in scene_of(item).counts()) is (item.truth == "yes")
    for item in tasks["mme"].items:
        scene, named = scene_of(item), scenes.mentions(item.question)
        if item.tags["task"] == "color":
            there = any((o.kind, o.colour) == (named[0], item.question.split()[3]) for o in scene.objects)
            assert there is (item.truth == "yes")
        if item.tags["task"] == "count":
            number = {"only": 1}.get(item.question.split()[2]) or world.NUMBERS.index(item.question.split()[2])
            assert (scene.counts()[named[0]] == number) is (item.truth == "yes")


def test_sycophancy_by_hand():
    """Two absent things: denied both times; denied, then agreed to. One present thing: missed when asked neutrally."""
    told = [("a", "no", "No", "No"), ("b", "no", "No", "Yes"), ("c", "yes", "No", "Yes")]
    rows = [
        {"pair": pair, "form": form, "answer": answer, "label": label, "picture": pair}
        for pair, label, *said in told
        for form, answer in zip(("neutral", "leading"), said, strict=True)
    ]
    found = describing.score_sycophancy(rows)
    assert found["neutral_accuracy"] == found["leading_accuracy"] == pytest.approx(2 / 3)
    assert found["swayed"] == 0.5
    assert found["yes_gain"] == pytest.approx(2 / 3)


def test_captions_of_the_world_are_perfect(tasks):
    for name, style in (("caption", "short"), ("chair", "detailed")):
        task = tasks[name]
        true = answers(task, lambda item: scenes.caption(scene_of(item), np.random.default_rng(0), style))  # noqa: B023
        assert all(task.score(task.items, true).correct)
        assert not any(task.score(task.items, answers(task, lambda _: "A pen and a sheep and a fork.")).correct)
    short = answers(tasks["caption"], lambda i: scenes.caption(scene_of(i), np.random.default_rng(0), "short"))
    found = tasks["caption"].score(tasks["caption"].items, short)
    assert [found[k] for k in ("precision", "recall", "f1", "colours", "numbers")] == [1] * 5


def test_caption_quality_by_hand():
    truth = [("cup", "red"), ("cup", "red"), ("cup", "blue"), ("dog", "black")]
    found = describing.score_captions(["Three red cups, a small black dog and a white cat."], [truth], ["p"])
    assert describing.phrases("two small red cups; dog") == [("cup", "red", 2), ("dog", None, None)]
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == 1
    assert found["colours"] == pytest.approx(2 / 3)
    assert found["numbers"] == 0
    assert found.correct == (False,)


def test_detail_is_seen_at_three_sizes(tasks):
    task = world.build("detail", n=6, size=224)[0]
    by_scale = {item.tags["scale"]: item for item in task.items[3:6]}  # a yellow mark on a red dog
    assert sorted(by_scale) == [0.5, 1, 2]
    assert by_scale[2].tags["detail"] == pytest.approx(4 * by_scale[0.5].tags["detail"], rel=0.01)
    pictures = {scale: np.asarray(task.open(item)) for scale, item in by_scale.items()}
    assert (pictures[0.5][0, 0] == 128).all()
    mark = np.array(scenes.COLOURS[by_scale[1].truth])
    counts = {scale: (np.abs(p.astype(int) - mark).sum(-1) < 90).sum() for scale, p in pictures.items()}
    assert counts[0.5] < counts[1] < counts[2]
    task = tasks["detail"]
    metrics = task.score(task.items, answers(task, lambda i: i.truth if i.tags["scale"] > 1 else "")).metrics
    parts = [metrics[name] for name in sorted(metrics) if name.startswith("accuracy_")]
    assert parts == [0, 0, 1]


def layout(half=10):
    """2 x 2 tokens of 10 pixels on a picture of 20."""
    boxes = half * np.array([[0, 0, 1, 1], [1, 0, 2, 1], [0, 1, 1, 2], [1, 1, 2, 2]], np.float32)
    cells = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    return Layout((2 * half, 2 * half), boxes, np.zeros(4, int), cells, ((2, 2),), ((0,), (1,), (2,), (3,)))


def test_pointing_puts_attention_where_the_tokens_left_were():
    """Two tokens of the picture are left: the hotter one is found at its own place, not at the second."""
    made = world.build("pointing", n=1, size=SIZE)[0]
    host = SimpleNamespace(layouts=lambda *_: [layout(SIZE // 2)])
    lvlm = SimpleNamespace(host=host, processor=None, model=None)
    rows, places = torch.tensor([0.1, 0.6]).view(1, 1, 1, 1, 2), torch.tensor([[0, 3]])
    seen = SimpleNamespace(rows=rows, places=places)
    (found,) = made.observe(lvlm, made.items[:1], {}, seen)
    assert found["at"] == [42, 42]


def test_pointing_by_hand():
    mask = np.zeros((20, 20), bool)
    mask[2:7, 10:20] = True  # 50 of the 100 pixels of the second token
    found = pointing.point(layout(), np.array([0.1, 0.6, 0.1, 0.2]), mask)
    assert found == {
        "hit": True,
        "chance": 0.25,
        "share": pytest.approx(0.3),
        "area": pytest.approx(0.125),
        "at": [15, 5],
    }
    missed = pointing.point(layout(), np.array([0.7, 0.1, 0.1, 0.1]), mask)
    assert not missed["hit"]
    scored = pointing.score([found, missed], ["a", "b"])
    assert scored["hit"] == 0.5
    assert scored["lift"] == pytest.approx((0.3 + 0.05) / 2 / 0.125)


@settings(max_examples=20)
@given(st.integers(0, 2**20), st.floats(0.1, 5))
def test_even_attention_gets_the_area(seed, level):
    mask = np.random.default_rng(seed).random((20, 20)) < 0.3
    found = pointing.point(layout(), np.full(4, level), mask)
    assert found["share"] == pytest.approx(found["area"], abs=1e-6)


def test_the_same_seed_asks_the_same(tasks):
    again = world.build("relation", n=48, size=SIZE)[0]
    other = world.build("relation", n=48, size=SIZE, seed=1)[0]
    held = world.build("relation", n=48, size=SIZE, split="test")[0]
    assert again.facts() == tasks["relation"].facts()
    assert len({task.facts()["sha256"] for task in (again, other, held)}) == 3
    assert not {i.picture for i in again.items} & {i.picture for i in held.items}


def test_refusals():
    with pytest.raises(UnknownNameError, match="did you mean pope"):
        world.build("pop")
    with pytest.raises(UnknownNameError, match="no split 'vall'"):
        world.build("pope", split="vall")
    with pytest.raises(ParameterError, match="n=0"):
        world.build("pope", n=0)

"""The task `scenes:video`: balanced, repeatable, true, and answered by a model that takes several pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sightline import hosts, scenes
from sightline.clips import Clip
from sightline.errors import ParameterError
from sightline.evaluate import films, world
from sightline.evaluate.runner import Decoding, Work, answer, generate
from sightline.lvlm import LVLM
from sightline.prune import QuoTA
from tests.tiny_hosts import TINY

SIZE = 56


@pytest.fixture(scope="module")
def task():
    return world.build("video", n=50, size=SIZE)[0]


def test_its_questions_are_balanced_and_repeatable(task) -> None:
    kinds = Counter(item.tags["kind"] for item in task.items)
    assert kinds == dict.fromkeys(("order", "count", "motion", "passing", "presence"), 10)
    for kind in ("passing", "presence"):
        said = Counter(item.truth for item in task.items if item.tags["kind"] == kind)
        assert said["yes"] == said["no"] == 5
    assert world.build("video", n=50, size=SIZE)[0].facts() == task.facts()
    assert world.build("video", n=50, size=SIZE, seed=1)[0].facts() != task.facts()


def test_a_film_is_opened_as_a_clip(task) -> None:
    item = task.items[0]
    clip = task.open(item)
    film = scenes.film(item.tags["film"], size=SIZE, frames=films.FRAMES)
    assert isinstance(clip, Clip)
    assert len(clip) == films.FRAMES
    np.testing.assert_array_equal(np.asarray(clip.frames[3]), np.asarray(film.frames[3]))
    assert all(0 <= frame < films.FRAMES for item in task.items for frame in item.tags["frames"])


def test_truth_scores_full(task) -> None:
    full = task.score(task.items, [{"answer": item.truth.capitalize() + "."} for item in task.items])
    none = task.score(task.items, [{"answer": "purple sky"} for _ in task.items])
    assert full["accuracy"] == full["accuracy_order"] == full["accuracy_passing"] == 1
    assert none["accuracy"] == 0
    with pytest.raises(ParameterError):
        films.video(world.World("val", SIZE, 0), 5, frames=1)


def test_a_model_answers(task) -> None:
    tiny = TINY["llava"]()
    lvlm = LVLM(tiny.model, tiny.processor, hosts.find(tiny.model), "llava")
    inputs, answers = generate(lvlm, task, task.items[:2], Decoding())
    assert len(answers) == 2
    assert (inputs["input_ids"] == tiny.model.config.image_token_id).sum() == 2 * films.FRAMES * 36


def test_a_system_that_asks_first_is_another_for_every_question(task) -> None:
    tiny = TINY["llava"]()
    lvlm = LVLM(tiny.model, tiny.processor, hosts.find(tiny.model), "llava")
    two = replace(task, items=task.items[:2])
    quota = QuoTA(enhance_tokens=4, enhance_total=films.FRAMES)
    work = Work({two.name: two}, {"none": (), "quota": (quota,)}, Decoding(batch_size=2))
    rows = answer(lvlm, work, (two.name, "quota", 0))
    assert [row["id"] for row in rows] == [item.id for item in two.items]
    alone = [
        lvlm.ask(task.open(i), task.prompt(i), systems=[quota], max_new_tokens=task.max_new_tokens) for i in two.items
    ]
    assert [row["answer"] for row in rows] == alone

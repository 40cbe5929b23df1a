"""POPE's questions read off captions."""

from __future__ import annotations

import pytest

from sightline import scenes
from sightline.errors import InputError
from sightline.evaluate import opope, world


def test_by_hand() -> None:
    """Named: dog (right), cup (wrong); not named: tree (missed), car (rightly)."""
    asked = [["dog", "yes"], ["cup", "no"], ["tree", "yes"], ["car", "no"]]
    found = opope.score([{"named": ["dog", "cup", "chair"], "asked": asked}], ["a"])
    assert (found["accuracy"], found["precision"], found["recall"]) == (0.5, 0.5, 0.5)
    assert found["f_beta"] == pytest.approx(0.5)
    assert (found["f1"], found["yes_ratio"]) == (0.5, 0.5)
    some = opope.score([{"named": ["dog"], "asked": asked}], ["a"])
    assert (some["precision"], some["recall"]) == (1, 0.5)
    assert some["f_beta"] == pytest.approx(1.04 * 0.5 / (0.04 + 0.5))
    assert some.correct == (False,)
    assert some.graded  # a caption is more or less right: the paired test must not ask for all or nothing
    nothing = opope.score([{"named": [], "asked": asked}], ["a"])
    assert nothing["f_beta"] == 0
    with pytest.raises(InputError, match="neither yes nor no"):
        opope.score([{"named": [], "asked": [["dog", "perhaps"]]}], ["a"])
    with pytest.raises(InputError, match="nothing to score"):
        opope.score([], [])


def test_released_scorers_look_for_letters() -> None:
    """A word of the name is enough, wherever it stands; a capital is another letter."""
    kinds = ["car", "traffic light", "dog", "dining table"]
    caption = "Dogs lie on a carpet under a light."
    assert opope.named_as_released(caption, kinds) == ["car", "traffic light"]


def test_true_captions_are_perfect() -> None:
    """The world's own detailed captions name all that is there and nothing else."""
    (task,) = world.build("opope", n=6, size=56)
    answers = []
    for item in task.items:
        kinds = scenes.draw(int(item.tags["scene"]), size=56).counts()
        assert {kind for kind, label in item.tags["asked"] if label == "yes"} <= set(kinds)
        assert not {kind for kind, label in item.tags["asked"] if label == "no"} & set(kinds)
        answers.append({"answer": "There is " + " and ".join(f"a {kind}" for kind in kinds)})
    assert len(task.items[0].tags["asked"]) == 18
    found = task.score(task.items, answers)
    assert (found["accuracy"], found["f_beta"]) == (1, 1)

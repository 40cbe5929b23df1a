"""The questions of a study, how answers are read, and the intervals."""

from __future__ import annotations

import numpy as np
import pytest

from sightline import scenes
from sightline.errors import ParameterError
from sightline.explain.questions import Item, held_out, is_right, picture_size
from sightline.explain.stats import bootstrap, proportion
from tests.explain.tiny import lvlm


def test_questions_are_held_out_true_and_never_twice():
    found = held_out(6, seed=1, size=56)
    assert [i.number for i in found] == list(range(len(found)))
    assert len({(i.scene.seed, i.text) for i in found}) == len(found)
    assert {i.scene.seed for i in found} == set(scenes.seeds("test", 12)[6:])
    assert not {i.scene.seed for i in found} & {i.scene.seed for i in held_out(6, seed=0, size=56)}
    for split in ("random", "popular", "adversarial"):
        mine = [i for i in found if split in i.tasks]
        assert [i.truth for i in mine].count("yes") == [i.truth for i in mine].count("no") == 6
    assert sum("open" in i.tasks for i in found) == 6
    for item in found:
        if item.yes_no:
            kind = item.text.removesuffix(" in the image?").split(" ", 3)[-1]
            assert (kind in item.scene.counts()) == (item.truth == "yes")
            assert item.answer.lower() == item.truth
    order = [i.scene.seed for i in found]
    assert order == sorted(order)


def test_ranges_of_n_and_seed():
    for bad in ({"n": 1}, {"n": 3, "seed": -1}):
        with pytest.raises(ParameterError, match="out of range"):
            held_out(**bad)


def test_an_open_answer_is_right_when_its_first_sentence_holds_the_word():
    item = Item(0, None, "How many?", "Two", "2", ("open",))
    for reply, expected in (("Two.", True), ("There are 2.", True), ("Three. Two.", False), ("Twenty", False)):
        assert is_right(item, reply) is expected
    assert is_right(Item(0, None, "", "No", "no", ("random",)), "No, there is not")
    assert not is_right(Item(0, None, "", "Yes", "yes", ("random",)), "There is not")


def test_picture_size_suits_the_processor():
    assert picture_size(lvlm().processor) == 56  # 48, but scenes begin at 56

    class Big:
        crop_size = {"height": 336, "width": 336}  # noqa: RUF012

    class Huge:
        size = {"shortest_edge": 2000}  # noqa: RUF012

    assert picture_size(Big()) == 336
    assert picture_size(Huge()) == 336


def test_a_proportion_has_a_wilson_interval():
    found = proportion(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert proportion(0, 0).as_dict() == {"value": None, "low": None, "high": None, "n": 0}


def test_bootstrap_draws_whole_clusters():
    values = np.tile([0.0, 1.0], 50)
    loose = bootstrap(values, range(100))
    tight = bootstrap(values, np.arange(100) // 2)  # every cluster has the same mean
    assert loose.value == tight.value == 0.5
    assert loose.high - loose.low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)
    assert tight.high - tight.low < 1e-9
    assert bootstrap(values, range(100)) == loose


def test_bootstrap_weights_and_gaps():
    found = bootstrap([1.0, 4.0, np.nan, 7.0], [0, 1, 2, 3], [3.0, 1.0, 5.0, 0.0])
    assert found.value == pytest.approx(7 / 4)
    assert found.n == 2
    assert np.isnan([found.low, found.high]).all()  # two pictures have no spread to speak of
    assert bootstrap([np.nan], [0]).as_dict() == {"value": None, "low": None, "high": None, "n": 0}

"""POPE's sampling laws, recomputed by brute force."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from sightline import scenes
from sightline.errors import ParameterError, UnknownNameError

SET = [scenes.draw(s) for s in range(150)]
PRESENT = {scene.file_name: set(scene.counts()) for scene in SET}


def _rows(split, per_image=6, seed=0):
    return scenes.pope(SET, split, per_image, np.random.Generator(np.random.PCG64(seed)))


def _pairs(rows):
    """(image, positive kind, negative kind, kinds barred at that moment) in order."""
    barred = {name: set(kinds) for name, kinds in PRESENT.items()}
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        names = [re.fullmatch(r"Is there an? (\w+) in the image\?", row["text"])[1] for row in (yes, no)]
        yield yes["image"], *names, set(barred[yes["image"]])
        barred[yes["image"]].add(names[1])


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_rows_alternate_are_true_and_never_repeat(split):
    rows = _rows(split)
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
    assert all(list(row) == ["question_id", "image", "text", "label"] for row in rows)
    assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
    images = Counter(row["image"] for row in rows)
    assert set(images.values()) == {6}
    assert set(images) == {name for name, kinds in PRESENT.items() if len(kinds) >= 3}
    for image, positive, negative, barred in _pairs(rows):
        assert positive in PRESENT[image]
        assert negative not in barred


def test_popular_takes_the_most_frequent_kinds():
    frequency = Counter(kind for kinds in PRESENT.values() for kind in kinds)
    for _, _, negative, barred in _pairs(_rows("popular")):
        assert frequency[negative] == max(n for kind, n in frequency.items() if kind not in barred)


def test_adversarial_takes_what_co_occurs_most_with_the_positive():
    together = Counter((a, b) for kinds in PRESENT.values() for a in kinds for b in kinds if a != b)
    checked = 0
    for _, positive, negative, barred in _pairs(_rows("adversarial")):
        best = max(together[positive, kind] for kind in scenes.KINDS if kind not in barred)
        assert together[positive, negative] == best or best == 0
        checked += best > 0
    assert checked > 200


def test_random_is_uniform_over_all_kinds():
    negatives = Counter(negative for seed in range(6) for _, _, negative, _ in _pairs(_rows("random", seed=seed)))
    assert set(negatives) == set(scenes.KINDS)
    free = Counter(
        k for _ in range(6) for kinds in PRESENT.values() if len(kinds) >= 3 for k in set(scenes.KINDS) - kinds
    )
    rates = [negatives[kind] / free[kind] for kind in scenes.KINDS]
    assert max(rates) < 2.2 * min(rates)


def test_adversarial_falls_back_when_nothing_co_occurs():
    """In a set of one scene every companion is present, so negatives come from the whole list of kinds."""
    scene = next(s for s in SET if len(s.counts()) >= 3)
    rows = scenes.pope([scene], "adversarial")
    assert len(rows) == 6
    assert all(not set(scenes.mentions(row["text"])) & set(scene.counts()) for row in rows[1::2])


def test_same_seed_same_rows_and_articles():
    assert _rows("random") == _rows("random") != _rows("random", seed=1)
    texts = [row["text"] for row in _rows("random")]
    assert any("an umbrella" in text for text in texts)
    assert not any("a umbrella" in text for text in texts)


def test_bad_arguments():
    with pytest.raises(UnknownNameError, match="adversarial"):
        scenes.pope(SET, "adversary")
    for bad in (0, 3, 18):
        with pytest.raises(ParameterError, match="even"):
            scenes.pope(SET, "random", bad)

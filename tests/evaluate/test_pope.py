"""POPE against the published scorers' own output, a confusion table by hand, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import InputError, UnknownNameError
from sightline.evaluate import pope

# Answers, truth, and what three public scorers made of them: RUCAIBox/POPE 3df3ba1 evaluate.py ("official"),
# LzVv123456/VISTA dc62252 pope_ans.py ("vista"), Lackel/AGLA efa1263 eval_pope.py (only its totals).
CASES = (
    ("Yes", 1, 1, 1), ("No", 0, 0, 0), ("yes, there is a dog.", 1, 1, 1), ("No, there is not.", 0, 0, 0),
    ("There is no dog in the image", 0, 0, 0), ("Yes. No doubt about it", 1, 1, 0), ("It isn't visible", 0, 1, 0),
    ("not sure", 1, 0, 0), ("NO", 0, 1, 0), ("no.", 0, 0, 0), ("Nope", 1, 1, 1), ("Yes, not only one.", 0, 0, 0),
    ("I cannot see it.", 0, 1, 1), ("There are none", 0, 1, 1), ("Yes", 0, 1, 1), ("no", 1, 0, 0), ("No", 0, 0, 0),
    ("yes", 1, 1, 1), ("", 0, 1, 1), ("Absolutely", 1, 1, 1),
)  # fmt: skip
ANSWERS = [case[0] for case in CASES]
LABELS = ["yes" if case[1] else "no" for case in CASES]
ANSWER = st.sampled_from([*ANSWERS, "maybe", "No No", "yes."]) | st.text(max_size=12)
PAIRS = st.lists(st.tuples(ANSWER, st.sampled_from(["yes", "no"])), min_size=1, max_size=30)


@pytest.mark.parametrize(("rule", "column"), [("official", 2), ("vista", 3)])
def test_reading_is_that_of_the_public_scorers(rule, column):
    assert [pope.says_yes(answer, rule) for answer in ANSWERS] == [bool(case[column]) for case in CASES]


def test_official_metrics_are_those_of_the_public_scorer():
    found = pope.score(ANSWERS, LABELS)
    assert [found[k] for k in ("tp", "fp", "tn", "fn")] == [6, 6, 6, 2]
    expected = {"accuracy": 0.6, "precision": 0.5, "recall": 0.75, "f1": 0.6, "yes_ratio": 0.6}
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found.rules == {"answer_rule": "official"}
    assert found.details[8] == {"read": "yes"}
    assert found.correct[8] is False


def test_vcd_metrics_are_those_of_the_public_scorer():
    found = pope.score(ANSWERS, LABELS, rule="vcd")
    expected = [0.5714285714285714, 0.5, 0.5333333333333333, 0.65, 0.35]
    assert [found[k] for k in ("precision", "recall", "f1", "accuracy", "yes_ratio")] == pytest.approx(expected)


def test_by_hand():
    """3 hits, 1 miss, 2 false alarms, 4 rejections; one answer is neither yes nor no and counts as yes."""
    answers = ["Yes", "Yes.", "Maybe", "No", "Yes", "yes", "No", "No, sir", "not there", "There is no cup"]
    labels = ["yes"] * 4 + ["no"] * 6
    found = pope.score(answers, labels)
    assert [found[k] for k in ("tp", "fn", "fp", "tn")] == [3, 1, 2, 4]
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert found["unclear"] == 1
    low, high, method = found.tally.intervals(draws=50)["accuracy"]
    assert method == "wilson"
    assert (low, high) == pytest.approx((0.39677, 0.89221), abs=1e-5)


def test_nothing_divided_by_nothing_is_zero():
    found = pope.score(["No", "No"], ["no", "no"])
    assert found["accuracy"] == 1
    assert found["precision"] == found["recall"] == found["f1"] == found["yes_ratio"] == 0


@given(PAIRS, st.sampled_from(pope.RULES))
def test_laws(pairs, rule):
    answers, labels = zip(*pairs, strict=True)
    found = pope.score(answers, labels, rule)
    assert sum(found[k] for k in ("tp", "fp", "tn", "fn")) == len(pairs)
    assert found["accuracy"] == pytest.approx(np.mean(found.correct))
    assert 0 <= found["f1"] <= max(found["precision"], found["recall"]) <= 1
    again = pope.score(answers[::-1], labels[::-1], rule)
    assert again.metrics == pytest.approx(found.metrics)


@given(PAIRS)
def test_perfect_and_reversed(pairs):
    labels = [label for _, label in pairs]
    for rule in pope.RULES:
        assert all(pope.score(labels, labels, rule).correct)
        assert not any(pope.score(["no" if label == "yes" else "yes" for label in labels], labels, rule).correct)


def test_refusals():
    with pytest.raises(InputError, match="2 answers, 1 labels"):
        pope.score(["yes", "no"], ["yes"])
    with pytest.raises(InputError, match="empty"):
        pope.score([], [])
    with pytest.raises(InputError, match="'perhaps' of question 2"):
        pope.score(["yes", "no"], ["yes", "perhaps"])
    with pytest.raises(UnknownNameError, match="did you mean official"):
        pope.score(["yes"], ["yes"], rule="offical")

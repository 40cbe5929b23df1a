"""Exact match with number words, and AMBER's figures by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import InputError
from sightline.evaluate import amber, vqa


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [("Two.", "2", True), ("two", "Two", True), ("The left", "left", True), ("Red", "red.", True), ("a cup", "cup", True),
     ("12", "twelve", True), ("1,000", "1000", True), ("none", "0", True), ("red", "blue", False), ("21", "2", False),
     ("left", "left left", False), ("2.5", "2 5", False), ("", "0", False)],
)  # fmt: skip
def test_normalised(first, second, same):
    assert (vqa.normalise(first) == vqa.normalise(second)) is same


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    once = vqa.normalise(text)
    assert vqa.normalise(once) == once
    assert vqa.normalise(f" {text.swapcase() if text.isascii() else text} !") == once


def test_counting_by_hand():
    found = vqa.score(["Two.", "there are 5", "many", "0"], ["2", "3", "1", "0"])
    assert found["accuracy"] == 0.5
    assert found["names_a_number"] == 0.75
    assert found["mean_error"] == pytest.approx(2 / 3)
    assert "mean_error" not in vqa.score(["red", "2"], ["red", "3 cups"]).metrics
    with pytest.raises(InputError, match="1 answers, 2 truths"):
        vqa.score(["x"], ["x", "y"])


RELATION = {"dog": ["puppy"], "table": ["desk", "furniture"], "chair": ["seat", "furniture"], "cat": ["kitten"]}


def test_amber_captions_by_hand():
    """First: puppy (true), kitten (imagined, wrong), sky (not in the vocabulary). Second: a safe word and a true one."""
    nouns = [["puppy", "kitten", "sky", "seat"], ["furniture", "desk"], []]
    annotations = [{"truth": ["dog", "table"], "hallu": ["cat", "chair"]}, {"truth": ["table"], "hallu": ["dog"]},
                   {"truth": [], "hallu": []}]  # fmt: skip
    found = amber.generative(nouns, annotations, RELATION, safe_words={"furniture"})
    assert found["chair"] == pytest.approx(100 * 2 / 5)
    assert found["cover"] == pytest.approx(100 * 2 / 3)
    assert found["hal"] == pytest.approx(100 / 3)
    assert found["cog"] == pytest.approx(100 * 2 / 3)
    close = amber.generative(
        nouns, annotations, RELATION, {"furniture"}, lambda a, b: 0.9 * ({a, b} == {"kitten", "dog"})
    )
    assert close["chair"] == pytest.approx(100 / 5)
    with pytest.raises(InputError, match="annotation 1 lacks"):
        amber.generative([["dog"]], [{"truth": []}], RELATION)


def test_amber_questions_by_hand():
    """Positive is "no"; "no." is not an answer. 2 of 3 "No" are right, of 4 truths "no" 2 are found."""
    answers = ["No", "No", "no.", "Yes", "No", "Yes"]
    labels = ["no", "no", "no", "no", "yes", "yes"]
    found = amber.discriminative(answers, labels)
    assert found["accuracy"] == 50
    assert found["precision"] == pytest.approx(200 / 3)
    assert found["recall"] == 50
    assert found["f1"] == pytest.approx(100 * (2 / 3) / (7 / 6 + 0.0001))
    assert amber.discriminative(answers, labels, existence=True)["f1"] < found["f1"]
    assert amber.score(20, 60) == 70

"""MME's accuracies and totals by hand, its way of reading, and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import InputError
from sightline.evaluate import mme


def rows(task, *pictures):
    return [
        {"task": task, "image": str(k), "answer": answer, "label": label}
        for k, pair in enumerate(pictures)
        for answer, label in zip(pair, ("Yes", "No"), strict=True)
    ]


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes", "yes"), ("NO", "no"), ("Yes, it is", "yes"), ("no.", "no"), ("I say yes", "other"), ("", "other"),
     ("not", "no"), ("know", "no"), ("The yes", "other"), (" yes", "yes"), ("Nyes", "yes")],
)  # fmt: skip
def test_reading(answer, read):
    assert mme.read(answer) == read


def test_by_hand():
    """Existence: both, one, none right of 3 pictures. OCR: both of 1. Code: one of 1, by an unreadable answer."""
    found = mme.score(
        rows("existence", ("yes", "no"), ("yes", "yes"), ("no", "yes"))
        + rows("OCR", ("Yes.", "No."))
        + rows("code_reasoning", ("yes", "perhaps"))
    )
    assert found["existence_acc"] == 0.5
    assert found["existence_acc_plus"] == pytest.approx(1 / 3)
    assert found["existence_score"] == pytest.approx(50 + 100 / 3)
    assert found["OCR_score"] == 200
    assert found["code_reasoning_score"] == 50
    assert found["perception"] == pytest.approx(250 + 100 / 3)
    assert found["cognition"] == 50
    assert found["hallucination"] == found["existence_score"]
    assert found["score"] == pytest.approx(300 + 100 / 3)
    assert found["accuracy"] == 0.6
    assert found["accuracy_plus"] == pytest.approx(2 / 5)
    assert found["other"] == 1
    assert found.correct == (True, True, True, False, False, False, True, True, True, False)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.randoms())
def test_laws(right, random):
    pairs = [("yes" if a else "no", "no" if b else "yes") for a, b in right]
    found = mme.score(rows("count", *pairs))
    assert found["count_acc_plus"] <= found["count_acc"] <= (1 + found["count_acc_plus"]) / 2 + 1e-12
    assert 0 <= found["count_score"] <= 200
    mixed = rows("count", *pairs)
    random.shuffle(mixed)
    assert mme.score(mixed).metrics == pytest.approx(found.metrics)


def test_refusals():
    with pytest.raises(InputError, match="existence/0 has 1"):
        mme.score(rows("existence", ("yes", "no"))[:1])
    with pytest.raises(InputError, match="empty"):
        mme.score([])

"""Intervals and paired tests against scipy, laws, and cases by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.evaluate.stats import Tally, holm, mcnemar, ratio, sign_test, wilson

scipy_stats = pytest.importorskip("scipy.stats")
COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(counts, confidence):
    k, n = counts
    expected = scipy_stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(COUNTS)
def test_wilson_holds_the_share_and_is_symmetric(counts):
    k, n = counts
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n), abs=1e-12)


def test_wilson_refuses():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ParameterError, match="successes=3 of n=2"):
        wilson(3, 2)
    with pytest.raises(ParameterError, match="confidence=1"):
        wilson(1, 2, 1)


@given(st.integers(0, 600), st.integers(0, 600))
def test_sign_test_is_scipys(lost, won):
    expected = scipy_stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert sign_test(lost, won) == pytest.approx(expected, abs=1e-4)
    assert sign_test(lost, won) == sign_test(won, lost)


def test_mcnemar_by_hand():
    first = [True] * 6 + [False] * 4
    second = [True] * 5 + [False] + [True] * 4
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (1, 4)
    assert found.p == pytest.approx(2 * (1 + 5) / 32)
    assert mcnemar(first, first).p == 1
    with pytest.raises(ParameterError, match="10 and 9"):
        mcnemar(first, second[:9])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_never_lowers_and_keeps_order(values):
    adjusted = holm(values)
    assert all(a >= min(1, v) for a, v in zip(adjusted, values, strict=True))
    order = np.argsort(values, kind="stable")
    assert all(adjusted[i] <= adjusted[j] for i, j in pairwise(order))


def tally(rng, n=150, p=0.7, per=4):
    rows = [(f"p{k // per}", {"correct": int(rng.random() < p), "n": 1}) for k in range(n * per)]
    formulas = lambda s: {"accuracy": ratio(s["correct"], s["n"])}  # noqa: E731
    return Tally.collect(rows, formulas, ())


def test_bootstrap_agrees_with_theory():
    """Independent answers: the interval over pictures is that of the binomial, and covers like it."""
    rng = np.random.default_rng(0)
    made = tally(rng)
    low, high, method = made.intervals(draws=2000)["accuracy"]
    assert method == "bootstrap"
    width = 2 * 1.96 * (0.7 * 0.3 / 600) ** 0.5
    assert high - low == pytest.approx(width, rel=0.12)
    inside = 0
    for _ in range(60):
        low, high, _ = tally(rng).intervals(draws=200)["accuracy"]
        inside += low <= 0.7 <= high
    assert inside >= 51


def test_pictures_are_resampled_not_questions():
    """Four copies of the same answer per picture are one answer: the interval is twice as wide as of 4n answers."""
    rng = np.random.default_rng(1)
    right = rng.random(200) < 0.6
    formulas = lambda s: {"accuracy": ratio(s["correct"], s["n"])}  # noqa: E731
    same = Tally.collect([(str(k), {"correct": 4 * int(r), "n": 4}) for k, r in enumerate(right)], formulas)
    split = Tally.collect(
        [(f"{k}-{j}", {"correct": int(r), "n": 1}) for k, r in enumerate(right) for j in range(4)], formulas
    )
    widths = [np.subtract(*t.intervals(draws=1500)["accuracy"][1::-1]) for t in (same, split)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.12)


def test_paired_difference_is_narrower_and_reproducible():
    rng = np.random.default_rng(2)
    base = tally(rng)
    better = Tally(base.pictures, {**base.counts, "correct": np.minimum(4, base.counts["correct"] + (rng.random(150) < 0.2))}, base.formulas)  # fmt: skip
    value, low, high, p = better.difference(base, "accuracy", draws=500, seed=3)
    assert p == 2 / 501  # no draw fell to the other side
    assert (value, low, high, p) == better.difference(base, "accuracy", draws=500, seed=3)
    assert 0 < low <= value <= high
    own = better.intervals(draws=500)["accuracy"]
    assert high - low < 0.6 * (own[1] - own[0])
    assert base.difference(base, "accuracy", draws=50) == (0, 0, 0, 1)
    other = Tally(base.pictures[:-1], {k: v[:-1] for k, v in base.counts.items()}, base.formulas)
    with pytest.raises(ParameterError, match="different pictures"):
        better.difference(other, "accuracy")
    with pytest.raises(ParameterError, match="draws=0"):
        base.replicates(0)

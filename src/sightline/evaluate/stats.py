"""How sure is a figure: intervals of one system, and paired tests of two systems on the same questions.

Wilson, J. Am. Stat. Assoc. 22, 1927; McNemar, Psychometrika 12, 1947 (exact form: a sign test on the questions that only
one of the two got right); Holm, Scand. J. Stat. 6, 1979; Efron, Ann. Stat. 7, 1979 (resampling pictures, not questions,
because the questions of one picture go right or wrong together).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sightline.errors import ParameterError, check_range

Sums = Mapping[str, np.ndarray]  # name -> (...), sums over any set of pictures
Formulas = Callable[[Sums], dict[str, np.ndarray]]  # sums -> metrics of the same shape


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion, within [0, 1]; (0, 1) when nothing was counted.

    Raises:
        ParameterError: not 0 <= successes <= n, or confidence outside (0, 1).
    """
    check_range("confidence", confidence, 1e-6, 1 - 1e-6)
    if not 0 <= successes <= n:
        raise ParameterError(f"successes={successes!r} of n={n!r}: give 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, slack = successes / n, z * z / n
    middle = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


@dataclass(frozen=True)
class Paired:
    """Two systems on the same questions: which were right under one only, and how likely that is by chance."""

    only_first: int
    only_second: int
    p: float  # two-sided


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact paired test on two lists of right / wrong of the same questions in the same order.

    Raises:
        ParameterError: the lists differ in length.
    """
    if len(first) != len(second):
        raise ParameterError(f"{len(first)} and {len(second)} decisions: a paired test needs the same questions")
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    lost, won = int((a & ~b).sum()), int((~a & b).sum())
    return Paired(lost, won, sign_test(lost, won))


def sign_test(losses: int, wins: int) -> float:
    """Two-sided probability of a split at least this uneven when both are equally likely; exact."""
    n, least = losses + wins, min(losses, wins)
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**n)) if n < 1000 else _normal_sign(n, least)


def _normal_sign(n: int, least: int) -> float:
    """The same for many questions: normal approximation with continuity correction (error below 1e-4 for n >= 1000)."""
    z = max(0.0, abs(n / 2 - least) - 0.5) / math.sqrt(n / 4)
    return math.erfc(z / math.sqrt(2))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made all these comparisons at once."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, k in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[k]))
        adjusted[k] = highest
    return adjusted


@dataclass(frozen=True)
class Tally:
    """What a score is made of: sums per picture, and the formulas that turn sums into metrics.

    `shares` names the metrics that are plain proportions, as (sum of successes, sum of trials): they get a Wilson interval.
    """

    pictures: tuple[str, ...]  # (G)
    counts: dict[str, np.ndarray]  # name -> (G,)
    formulas: Formulas
    shares: tuple[tuple[str, str, str], ...] = ()  # (metric, successes, trials)

    @classmethod
    def collect(
        cls, rows: Sequence[tuple[str, Mapping[str, float]]], formulas: Formulas, shares: Sequence = ()
    ) -> Tally:
        """From (picture, {name: number}) per question: the numbers of one picture are added up, pictures in order."""
        pictures = list(dict.fromkeys(picture for picture, _ in rows))
        place = {picture: k for k, picture in enumerate(pictures)}
        names = list(dict.fromkeys(name for _, numbers in rows for name in numbers))
        counts = {name: np.zeros(len(pictures)) for name in names}
        for picture, numbers in rows:
            for name, number in numbers.items():
                counts[name][place[picture]] += number
        return cls(tuple(pictures), counts, formulas, tuple(shares))

    def metrics(self) -> dict[str, float]:
        """Every metric over all pictures."""
        return {
            name: float(value) for name, value in self.formulas({k: v.sum() for k, v in self.counts.items()}).items()
        }

    def replicates(self, draws: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
        """(draws,) per metric: its values when the pictures are drawn again with replacement.

        The draws depend only on the number of pictures and the seed: two systems on the same pictures get the same ones.
        """
        if draws < 1:
            raise ParameterError(f"draws={draws!r} is out of range: choose at least 1")
        rng, size = np.random.Generator(np.random.PCG64(seed)), len(self.pictures)
        names, columns = list(self.counts), np.stack(list(self.counts.values()), 1)  # (G, C)
        sums = np.empty((draws, len(names)))
        for k in range(draws):
            times = np.bincount(rng.integers(size, size=size), minlength=size)  # how often each picture was drawn
            sums[k] = times @ columns
        return self.formulas(dict(zip(names, sums.T, strict=True)))

    def intervals(
        self, confidence: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float, str]]:
        """(low, high, "wilson" | "bootstrap") per metric."""
        sums = {name: float(column.sum()) for name, column in self.counts.items()}
        found = {
            name: (*_quantiles(values, confidence), "bootstrap")
            for name, values in self.replicates(draws, seed).items()
        }
        for metric, successes, trials in self.shares:
            found[metric] = (*wilson(sums[successes], sums[trials], confidence), "wilson")
        return found

    def difference(
        self, baseline: Tally, metric: str, confidence: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float, float, float]:
        """(difference, low, high, p) of a metric against a baseline on the same pictures, by drawing both alike.

        p: two-sided, twice the share of draws on the other side of zero; at least 2 / (draws + 1).

        Raises:
            ParameterError: the pictures differ.
        """
        if self.pictures != baseline.pictures:
            raise ParameterError("the two tallies are of different pictures: a paired difference needs the same ones")
        mine, theirs = self.replicates(draws, seed)[metric], baseline.replicates(draws, seed)[metric]
        value, drawn = self.metrics()[metric] - baseline.metrics()[metric], mine - theirs
        beyond = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        return value, *_quantiles(drawn, confidence), min(1.0, 2 * beyond / (draws + 1))


def _quantiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, 0 where bottom is 0."""
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    return np.divide(top, bottom, out=np.zeros(np.broadcast(top, bottom).shape), where=bottom != 0)

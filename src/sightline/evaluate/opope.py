"""OPOPE: POPE's questions answered by a caption instead of one by one, as HALC and VASparse measure.

A kind is predicted present when the caption names it, by CHAIR's synonyms. Positive = present. Over all questions:

    accuracy, precision P, recall R, F1, and F_beta = (1 + beta^2) P R / (beta^2 P + R) with beta = 0.2

F_beta weighs precision 25 times, for no caption names everything; so recall is told but does not count for much.

The released scorers (BillChan226/HALC and VASparse, eval/opope_eval.py) know no synonyms: a kind is present when any word of
its name stands anywhere in the caption's letters, capitals apart, a car in a carpet as well (`named_as_released`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sightline.evaluate.scored import Scored, check_labels, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

BETA = 0.2


def named_as_released(caption: str, kinds: Sequence[str]) -> list[str]:
    """Which of the kinds the released scorers find in a caption."""
    return [kind for kind in kinds if any(word in caption for word in kind.split(" "))]


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """The metrics from counts of decisions."""
    precision, recall = ratio(sums["hit"], sums["named"]), ratio(sums["hit"], sums["present"])
    weighted = BETA**2 * precision + recall
    return {
        "f_beta": ratio((1 + BETA**2) * precision * recall, weighted),
        "accuracy": ratio(sums["right"], sums["n"]),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(sums["named"], sums["n"]),
    }


def score(rows: Sequence[Mapping], pictures: Sequence[str]) -> Scored:
    """Score captions.

    Args:
        rows: per picture {"named": kinds that its caption names, "asked": [[kind, "yes" | "no"], ...]}.
        pictures: their names.

    Raises:
        InputError: nothing to score, or a label is neither yes nor no.
    """
    same_length(rows=rows, pictures=pictures)
    counts, correct = [], []
    for row, picture in zip(rows, pictures, strict=True):
        truths = check_labels([label for _, label in row["asked"]])
        said = [kind in set(row["named"]) for kind, _ in row["asked"]]
        right = sum(a == b for a, b in zip(said, truths, strict=True))
        counts.append(
            (picture, {"n": len(said), "right": right, "hit": sum(a and b for a, b in zip(said, truths, strict=True)),
                       "named": sum(said), "present": sum(truths)})
        )  # fmt: skip
        correct.append(right == len(said))
    shares = [("accuracy", "right", "n"), ("precision", "hit", "named"), ("recall", "hit", "present")]
    tally = Tally.collect(counts, formulas, shares)
    return Scored(tally.metrics(), tuple(correct), tally, "f_beta", graded=True, rules={"beta": BETA})

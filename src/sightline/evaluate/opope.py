"""OPOPE: POPE's questions answered by a caption instead of one by one, as HALC and VASparse measure.

A kind is predicted present when the caption names it, by CHAIR's synonyms. Positive = present. Over all questions:

    accuracy, precision P, recall R, and F_beta = (1 + beta^2) P R / (beta^2 P + R) with beta = 0.2

F weighs precision 25 times, for no caption names everything; so recall is told but does not count for much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sightline.evaluate.scored import Scored, check_labels, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

BETA = 0.2


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """The four metrics from counts of decisions."""
    precision, recall = ratio(sums["hit"], sums["named"]), ratio(sums["hit"], sums["present"])
    weighted = BETA**2 * precision + recall
    return {
        "f_beta": ratio((1 + BETA**2) * precision * recall, weighted),
        "accuracy": ratio(sums["right"], sums["n"]),
        "precision": precision,
        "recall": recall,
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

"""POPE: is an object there, yes or no. Li et al., EMNLP 2023, arXiv 2305.10355; questions in github.com/RUCAIBox/POPE.

Three rules for reading an answer are in use, and give different figures for the same answers:

    official  (RUCAIBox)         the words before the first full stop, commas removed; "No", "no" or "not" among them: no
    vista     (VISTA, PAI)       all words, full stops and commas removed; "No", "not", "no", "NO" or a word that ends in
                                 "n't" among them: no
    vcd       (VCD, AGLA, DAMRO) by label: right when the lower-case text holds "yes" (or "no", "know", "not"); an answer
                                 to a "no" question without "no" in it counts as yes, one to a "yes" question without
                                 "yes" as no

Everything that is not read as "no" is a yes under the first two rules, an empty answer too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sightline.errors import UnknownNameError, nearest
from sightline.evaluate.scored import Scored, check_labels, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

RULES = ("official", "vista", "vcd")
SHARES = (
    ("accuracy", "correct", "n"),
    ("recall", "tp", "positive"),
    ("precision", "tp", "said_yes"),
    ("yes_ratio", "said_yes", "n"),
)
_CLEAR = re.compile(r"\b(yes|no|not)\b|n't", re.IGNORECASE)


def check_rule(rule: str) -> None:
    """UnknownNameError, with the nearest known one, unless `rule` is a way to read answers."""
    if rule not in RULES:
        raise UnknownNameError(f"no answer rule {rule!r}: {nearest(str(rule), list(RULES))}")


def says_yes(answer: str, rule: str = "official", label: bool = True) -> bool:
    """How an answer is read; `label` (truth) matters to the rule "vcd" only. UnknownNameError for another rule."""
    check_rule(rule)
    if rule == "official":
        words = answer.split(".")[0].replace(",", "").split(" ")
        return not any(word in ("No", "no", "not") for word in words)
    if rule == "vista":
        words = answer.replace(".", "").replace(",", "").split(" ")
        return not any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)
    return "yes" in answer.lower() if label else "no" not in answer.lower()


def is_unclear(answer: str) -> bool:
    """True when an answer holds neither yes nor no (nor not, n't); such answers are counted, and scored by the rule."""
    return _CLEAR.search(answer) is None


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall, F1 and yes ratio from counts; 0 / 0 is 0 (the official code stops there)."""
    precision, recall = ratio(sums["tp"], sums["said_yes"]), ratio(sums["tp"], sums["positive"])
    return {
        "accuracy": ratio(sums["correct"], sums["n"]),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(sums["said_yes"], sums["n"]),
    }


def score(
    answers: Sequence[str], labels: Sequence[str], rule: str = "official", pictures: Sequence[str] | None = None
) -> Scored:
    """Score answers; positive means yes.

    Args:
        answers, labels: one text and one "yes" or "no" per question.
        rule: how answers are read, see above.
        pictures: name of every question's picture, for intervals that resample pictures; None: each its own.

    Raises:
        InputError: lengths differ, nothing to score, or a label is neither yes nor no. UnknownNameError: another rule.
    """
    same_length(answers=answers, labels=labels)
    truth = check_labels(labels)
    said = [says_yes(answer, rule, label) for answer, label in zip(answers, truth, strict=True)]
    names = [str(k) for k in range(len(truth))] if pictures is None else list(pictures)
    rows = [(p, confusion(s, t)) for p, s, t in zip(names, said, truth, strict=True)]
    tally = Tally.collect(rows, formulas, SHARES)
    counts = {name: int(column.sum()) for name, column in tally.counts.items() if name in ("tp", "fp", "tn", "fn")}
    unclear = sum(map(is_unclear, answers))
    return Scored(
        {**tally.metrics(), **counts, "unclear": unclear},
        tuple(s == t for s, t in zip(said, truth, strict=True)),
        tally,
        "f1",
        rules={"answer_rule": rule},
        details=tuple({"read": "yes" if s else "no"} for s in said),
    )


def confusion(said: bool, truth: bool) -> dict[str, int]:
    """One question as counts."""
    return {
        "n": 1,
        "correct": said == truth,
        "said_yes": said,
        "positive": truth,
        "tp": said and truth,
        "fp": said and not truth,
        "tn": not said and not truth,
        "fn": truth and not said,
    }

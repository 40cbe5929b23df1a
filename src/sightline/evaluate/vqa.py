"""Short answers compared with the truth: normalised exact match with number words.

Normalising: lower case; articles and punctuation removed; "two" and "2" are the same. In the manner of VQA's own
evaluation (Antol et al., ICCV 2015, arXiv 1505.00468), for one reference answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sightline.evaluate.scored import Scored, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBERS = {word: str(k) for k, word in enumerate(_WORDS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
SHARES = (("accuracy", "correct", "n"),)


def normalise(text: str) -> str:
    """ "There are Two." -> "there are 2"; commas inside numbers vanish ("1,000" -> "1000")."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?", text)
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)


def number(text: str) -> int | None:
    """The first whole number that an answer names, in digits or words; None when there is none."""
    return next((int(word) for word in normalise(text).split() if word.isdecimal()), None)


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """Accuracy and, where the truth is a number, the mean error of the answers that name one, and the share that do."""
    found = {"accuracy": ratio(sums["correct"], sums["n"])}
    if "error" in sums:
        found["mean_error"] = ratio(sums["error"], sums["numbers"])
        found["names_a_number"] = ratio(sums["numbers"], sums["n"])
    return found


def score(answers: Sequence[str], truths: Sequence[str], pictures: Sequence[str] | None = None) -> Scored:
    """Score short answers. When all truths are whole numbers, also the mean error in counting.

    Raises:
        InputError: lengths differ, or nothing to score.
    """
    same_length(answers=answers, truths=truths)
    counting = all(str(truth).isdecimal() for truth in truths)
    correct = [normalise(a) == normalise(str(t)) for a, t in zip(answers, truths, strict=True)]
    names = [str(k) for k in range(len(correct))] if pictures is None else list(pictures)
    rows = []
    for name, answer, truth, right in zip(names, answers, truths, correct, strict=True):
        numbers = {"n": 1, "correct": right}
        if counting:
            said = number(answer)
            numbers |= {"numbers": said is not None, "error": 0 if said is None else abs(said - int(truth))}
        rows.append((name, numbers))
    tally = Tally.collect(rows, formulas, SHARES)
    return Scored(tally.metrics(), tuple(correct), tally, "accuracy", rules={"match": "normalised exact"})

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
    """Accuracy (also of every part of the questions) and, where the truth is a number, the mean error of the answers
    that name one, and the share that do."""
    found = {"accuracy": ratio(sums["correct"], sums["n"])}
    if "error" in sums:
        found["mean_error"] = ratio(sums["error"], sums["numbers"])
        found["names_a_number"] = ratio(sums["numbers"], sums["n"])
    for name in sums:
        if name.startswith("n:"):
            part = name.removeprefix("n:")
            found[f"accuracy_{part}"] = ratio(sums[f"correct:{part}"], sums[name])
    return found


def score(
    answers: Sequence[str],
    truths: Sequence[str],
    pictures: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
) -> Scored:
    """Score short answers. When all truths are whole numbers, also the mean error in counting.

    Args:
        answers, truths: one text per question.
        pictures: name of every question's picture, for intervals that resample pictures; None: each its own.
        parts: which part of the task every question belongs to: adds one accuracy for each.

    Raises:
        InputError: lengths differ, or nothing to score.
    """
    same_length(answers=answers, truths=truths)
    counting = all(str(truth).isdecimal() for truth in truths)
    correct = [normalise(a) == normalise(str(t)) for a, t in zip(answers, truths, strict=True)]
    names = [str(k) for k in range(len(correct))] if pictures is None else list(pictures)
    rows = []
    for k, (name, answer, truth, right) in enumerate(zip(names, answers, truths, correct, strict=True)):
        numbers: dict[str, float] = {"n": 1, "correct": right}
        if counting:
            said = number(answer)
            numbers |= {"numbers": said is not None, "error": 0 if said is None else abs(said - int(truth))}
        if parts is not None:
            numbers |= {f"n:{parts[k]}": 1, f"correct:{parts[k]}": right}
        rows.append((name, numbers))
    shares = [*SHARES, *((f"accuracy_{p}", f"correct:{p}", f"n:{p}") for p in dict.fromkeys(parts or ()))]
    tally = Tally.collect(rows, formulas, shares)
    return Scored(tally.metrics(), tuple(correct), tally, "accuracy", rules={"match": "normalised exact"})

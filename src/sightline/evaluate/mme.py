"""MME: two yes/no questions per picture, accuracy and accuracy+. Fu et al., arXiv 2306.13394.

Reading, as in the authors' `calculation.py`: lower case; exactly "yes" or "no"; else "yes" within the first four
characters, else "no" there, else "other" (wrong). Per subtask: accuracy = right questions / questions, accuracy+ =
pictures with both right / pictures, score = 100 accuracy + 100 accuracy+ (at most 200).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sightline.errors import InputError
from sightline.evaluate.scored import Scored, check_labels, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
HALLUCINATION = ("existence", "count", "position", "color")


def read(answer: str) -> str:
    """ "yes", "no" or "other"."""
    text = answer.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def formulas(sums: Sums, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Accuracies, scores and totals from counts named "right:TASK", "n:TASK", "both:TASK" and "pictures:TASK"."""
    found: dict[str, np.ndarray] = {}
    for task in tasks:
        accuracy = ratio(sums[f"right:{task}"], sums[f"n:{task}"])
        plus = ratio(sums[f"both:{task}"], sums[f"pictures:{task}"])
        found |= {f"{task}_acc": accuracy, f"{task}_acc_plus": plus, f"{task}_score": 100 * (accuracy + plus)}
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION), ("hallucination", HALLUCINATION)):
        mine = [found[f"{task}_score"] for task in tasks if task in group]
        if mine:
            found[name] = np.sum(mine, axis=0)
    total = {key: sum(sums[f"{key}:{task}"] for task in tasks) for key in ("right", "n", "both", "pictures")}
    found["accuracy"] = ratio(total["right"], total["n"])
    found["accuracy_plus"] = ratio(total["both"], total["pictures"])
    found["score"] = np.sum([found[f"{task}_score"] for task in tasks], axis=0)
    return found


def score(rows: Sequence[Mapping[str, Any]]) -> Scored:
    """Score rows {"task", "image", "answer", "label"}, two of each picture of a task, in any order.

    "perception", "cognition" and "hallucination" add up those of their subtasks that are present.

    Raises:
        InputError: nothing to score, a label is neither yes nor no, or a picture has not two questions in its task.
    """
    same_length(rows=rows)
    labels = check_labels([row["label"] for row in rows])
    correct = [read(row["answer"]) == ("yes" if truth else "no") for row, truth in zip(rows, labels, strict=True)]
    found: dict[tuple[str, str], list[bool]] = {}
    for row, right in zip(rows, correct, strict=True):
        found.setdefault((row["task"], row["image"]), []).append(right)
    _check_pairs(found)
    tasks = tuple(dict.fromkeys(row["task"] for row in rows))
    counts = []
    for (task, image), (first, second) in found.items():
        numbers = {"right": first + second, "n": 2, "both": first and second, "pictures": 1}
        counts.append((f"{task}/{image}", {f"{key}:{task}": value for key, value in numbers.items()}))
    tally = Tally.collect(counts, partial(formulas, tasks=tasks), _shares(tasks))
    other = sum(read(row["answer"]) == "other" for row in rows)
    return Scored(
        {**tally.metrics(), "other": other},
        tuple(correct),
        tally,
        "score",
        rules={"answer_rule": "mme"},
        details=tuple({"read": read(row["answer"])} for row in rows),
    )


def _shares(tasks: Sequence[str]) -> list[tuple[str, str, str]]:
    accuracy = [(f"{task}_acc", f"right:{task}", f"n:{task}") for task in tasks]
    return accuracy + [(f"{task}_acc_plus", f"both:{task}", f"pictures:{task}") for task in tasks]


def _check_pairs(found: Mapping[tuple[str, str], list[bool]]) -> None:
    wrong = [(task, image, len(answers)) for (task, image), answers in found.items() if len(answers) != 2]
    if wrong:
        task, image, n = wrong[0]
        raise InputError(
            f"MME asks two questions per picture, but {task}/{image} has {n} ({len(wrong)} such pictures): add the others"
        )

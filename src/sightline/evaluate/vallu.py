"""VaLLu: open-ended questions that need seeing and reasoning, judged from 1 to 5.

"Visual Description Grounding Reduces Hallucinations and Boosts Reasoning in LVLMs", ICLR 2025, arXiv 2405.15683; official code
Sreyan88/VDGD. 1500 questions of seven benchmarks with experts' answers, given out by its authors; its MathVista and MMMU
files have the same form: JSON lines with `id`, `image` and `conversations` (the human's question, the expert's answer).

The published judge is a language model that sees the picture and rates helpfulness, clarity, correctness, depth and engagement
from 1 to 5 and lists what was hallucinated; the reported number is the mean correctness. Here a judge is any callable
(`Judge`). The default needs none: correctness is 1 + 4 r, r the share of the words of the expert's answer that the answer
holds. It takes part of an answer for part of the truth, knows no synonyms, and its numbers compare systems, not papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sightline.errors import InputError
from sightline.evaluate.files import Album, read_rows
from sightline.evaluate.scored import Scored
from sightline.evaluate.stats import Sums, Tally, ratio
from sightline.evaluate.task import Answer, Item, Task, check_items, subset
from sightline.evaluate.vqa import normalise

ASPECTS = ("helpfulness", "clarity", "correctness", "depth", "engagement")
NEW_TOKENS = 512
NO_ANSWER = ("", "dummy output")  # what the published files hold where no expert answered
RIGHT = 3.0  # correctness above which an answer counts as right in paired tests
# (question, the expert's answer, the given answer, the picture's name) -> {aspect: 1..5}, at least "correctness"
Judge = Callable[[str, str, str, str], Mapping[str, float]]


def by_words(question: str, wanted: str, given: str, picture: str) -> dict[str, float]:
    """The default judge: correctness 1 + 4 (share of the expert's distinct words in the answer).

    Raises:
        InputError: there is no expert's answer.
    """
    words = set(normalise(wanted).split())
    if wanted.strip().lower() in NO_ANSWER or not words:
        raise InputError(f"question {question[:60]!r} has no expert's answer: give a judge that needs none")
    return {"correctness": 1 + 4 * len(words & set(normalise(given).split())) / len(words)}


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """Mean of every aspect, 1 to 5."""
    return {name: ratio(sums[name], sums["n"]) for name in sums if name != "n"}


def score(items: Sequence[Item], answers: Sequence[Answer], judge: Judge = by_words) -> Scored:
    """Mean ratings.

    Raises:
        InputError: nothing to score, a rating outside 1 to 5, or none for correctness.
    """
    if not items:
        raise InputError("nothing to score: no questions")
    rows = []
    for item, answer in zip(items, answers, strict=True):
        rated = judge(item.question, item.truth, answer["answer"], item.picture)
        found = {name: float(rated[name]) for name in ASPECTS if name in rated}
        if "correctness" not in found or any(not 1 <= value <= 5 for value in found.values()):
            raise InputError(f"the judge said {dict(rated)!r} of question {item.id}: correctness, 1 to 5, is needed")
        rows.append((item.picture, {"n": 1, **found}))
    tally = Tally.collect(rows, formulas)
    right = tuple(found["correctness"] > RIGHT for _, found in rows)
    rules = {"judge": "share of the expert's words" if judge is by_words else "given"}
    return Scored(tally.metrics(), right, tally, "correctness", rules=rules)


def task(
    path: str | Path, images: str | Path | None = None, n: int | None = None, seed: int = 0, judge: Judge = by_words
) -> Task:
    """The questions of a file of VaLLu's form. `images`: folder of the pictures; by default `images` beside the file.

    Raises:
        InputError: unreadable, damaged or foreign file, an item without a question, or no folder of pictures.
    """
    path = Path(path).expanduser()
    album = Album(images or path.parent / "images")
    items = [_item(path, number, row) for number, row in enumerate(read_rows(path), 1)]
    chosen, missing = album.split(subset(check_items(path.stem, items), n, seed))
    scorer = partial(score, judge=judge)
    return Task(path.stem, str(path), tuple(chosen), album.open, scorer, max_new_tokens=NEW_TOKENS, missing=missing)


def _item(path: Path, number: int, row: Mapping[str, Any]) -> Item:
    said: dict[str, str] = {}
    for turn in row.get("conversations") or []:
        said.setdefault(str(turn.get("from")), str(turn.get("value")))
    if "human" not in said or row.get("image") is None:
        raise InputError(
            f"{str(path)!r}, item {number} has no question or no picture: id, image, conversations are needed"
        )
    question = said["human"].replace("<image>", "").strip()
    wanted = said.get("gpt", "")
    truth = "" if wanted.strip().lower() in NO_ANSWER else wanted
    return Item(str(row.get("id", number)), str(row["image"]), question, truth)

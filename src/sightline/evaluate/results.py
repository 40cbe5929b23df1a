"""From answers to figures: metrics with intervals, and a paired verdict of every row against the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sightline.errors import InputError
from sightline.evaluate.folder import Key
from sightline.evaluate.runner import BASELINE
from sightline.evaluate.scored import Scored
from sightline.evaluate.stats import holm, mcnemar
from sightline.evaluate.task import Task

LEVEL = 0.05  # below: a difference; above: noise
DRAWS = 1000


@dataclass(frozen=True)
class Row:
    """One combination of systems on one task."""

    task: str
    label: str
    questions: int
    scored: Scored
    intervals: dict[str, tuple[float, float, str]]
    tokens: float  # generated per answer
    against: dict[str, Any] | None = None  # the paired comparison with the baseline; None for the baseline itself


def collect(
    tasks: Sequence[Task], labels: Sequence[str], answers: Mapping[Key, Mapping[str, Any]], draws: int = DRAWS
) -> list[Row]:
    """Score every task under every label, the baseline first.

    Raises:
        InputError: an answer is missing.
    """
    rows = []
    for task in tasks:
        found: dict[str, tuple[Scored, float]] = {}
        for label in labels:
            lacking = [item.id for item in task.items if (task.name, label, item.id) not in answers]
            if lacking:
                raise InputError(f"{task.name} under {label!r}: {len(lacking)} answers are missing: run the same again")
            mine = [answers[task.name, label, item.id] for item in task.items]
            found[label] = task.score(task.items, mine), sum(a.get("tokens", 0) for a in mine) / len(mine)
        rows += _rows(task, found, draws)
    return rows


def _rows(task: Task, found: Mapping[str, tuple[Scored, float]], draws: int) -> list[Row]:
    base = found[BASELINE][0]
    others = [label for label in found if label != BASELINE]
    against = dict(zip(others, compared([(base, found[label][0]) for label in others], draws), strict=True))
    return [
        Row(task.name, label, len(task.items), scored, scored.tally.intervals(draws=draws), tokens, against.get(label))
        for label, (scored, tokens) in found.items()
    ]


def compared(pairs: Sequence[tuple[Scored, Scored]], draws: int) -> list[dict[str, Any]]:
    """The paired comparison of each (baseline, row): difference with interval, test, and the word for it.

    p is adjusted for all pairs at once.
    """
    found = [_compare(base, mine, draws) for base, mine in pairs]
    for (base, _), one, p in zip(pairs, found, holm([one["p"] for one in found]), strict=True):
        one |= {"p_holm": p, "verdict": verdict(one, p, base.higher_is_better)}
    return found


def _compare(base: Scored, mine: Scored, draws: int) -> dict[str, Any]:
    test = mcnemar(base.correct, mine.correct)
    value, low, high, p = mine.tally.difference(base.tally, mine.main, draws=draws)
    return {
        "metric": mine.main,
        "difference": value,
        "low": low,
        "high": high,
        "newly_wrong": test.only_first,
        "newly_right": test.only_second,
        "paired_test": "bootstrap" if mine.graded else "mcnemar",
        "p": p if mine.graded else test.p,
    }


def verdict(found: Mapping[str, Any], p: float, higher_is_better: bool) -> str:
    """ "same" when nothing changed that the test counts, "noise" when it may be chance, else "better" or "worse"."""
    if found["paired_test"] == "bootstrap":
        same, gain = found["low"] == found["high"] == 0, found["difference"] * (1 if higher_is_better else -1)
    else:
        same, gain = found["newly_wrong"] == found["newly_right"] == 0, found["newly_right"] - found["newly_wrong"]
    if same:
        return "same"
    if p >= LEVEL:
        return "noise"
    return "better" if gain > 0 else "worse"


def to_json(rows: Sequence[Row], config: Mapping[str, Any], cost: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of results.json, in the manner of lm-eval: one entry per task and systems, "metric,none" keys.

    Everything that is measured with a clock stands under "cost" alone; the rest depends on the answers only.
    """
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry: dict[str, Any] = {"alias": f"{row.task} ({row.label})", "task": row.task, "with": row.label}
        for name, value in row.scored.metrics.items():
            entry[f"{name},none"] = value
            if name in row.intervals:
                low, high, method = row.intervals[name]
                entry |= {f"{name}_low,none": low, f"{name}_high,none": high, f"{name}_interval,none": method}
        entry |= {"main_metric": row.scored.main, "samples": row.questions, "tokens_per_answer": row.tokens}
        entry |= {"rules": row.scored.rules, "against_baseline": row.against}
        results[f"{row.task}@{row.label}"] = entry
    return {
        "results": results,
        "higher_is_better": {row.task: {row.scored.main: row.scored.higher_is_better} for row in rows},
        "n-samples": {row.task: {"original": row.questions, "effective": row.questions} for row in rows},
        "n-shot": {row.task: 0 for row in rows},
        "config": dict(config),
        "statistics": {
            "confidence": 0.95,
            "bootstrap_draws": DRAWS,
            "paired_test": "McNemar exact (captions: paired bootstrap over pictures), Holm over the rows of a task",
            "noise": f"p >= {LEVEL}",
        },
        "cost": dict(cost or {}),
    }

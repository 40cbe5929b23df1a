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
    tests = [mcnemar(base.correct, found[label][0].correct) for label in others]
    adjusted = dict(zip(others, holm([test.p for test in tests]), strict=True))
    against = {
        label: compared(base, found[label][0], adjusted[label], test, draws)
        for label, test in zip(others, tests, strict=True)
    }
    return [
        Row(task.name, label, len(task.items), scored, scored.tally.intervals(draws=draws), tokens, against.get(label))
        for label, (scored, tokens) in found.items()
    ]


def compared(base: Scored, mine: Scored, adjusted: float, test: Any, draws: int) -> dict[str, Any]:
    """The paired comparison of two rows: difference with interval, McNemar's test, and the word for it.

    Args:
        adjusted: the test's p, adjusted for the number of rows. test: `stats.mcnemar(base.correct, mine.correct)`.
    """
    value, low, high = mine.tally.difference(base.tally, mine.main, draws=draws)
    return {
        "metric": mine.main,
        "difference": value,
        "low": low,
        "high": high,
        "newly_wrong": test.only_first,
        "newly_right": test.only_second,
        "p": test.p,
        "p_holm": adjusted,
        "verdict": verdict(test.only_first, test.only_second, adjusted),
    }


def verdict(newly_wrong: int, newly_right: int, p: float) -> str:
    """ "same" when no question changed sides, "noise" when the change may be chance, else "better" or "worse"."""
    if newly_wrong == newly_right == 0:
        return "same"
    if p >= LEVEL:
        return "noise"
    return "better" if newly_right > newly_wrong else "worse"


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
            "paired_test": "McNemar exact, Holm over the rows of a task",
            "noise": f"p >= {LEVEL}",
        },
        "cost": dict(cost or {}),
    }

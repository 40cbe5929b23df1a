"""What scoring a list of answers gives, for every task alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sightline.errors import InputError
from sightline.evaluate.stats import Tally


@dataclass(frozen=True)
class Scored:
    """Metrics of one system on one task, with one decision per question.

    `correct` feeds the paired test; `tally` the intervals, and the paired test where the metric is `graded`. Shares are in [0, 1].
    """

    metrics: dict[str, float]
    correct: tuple[bool, ...]  # per question, in their order
    tally: Tally
    main: str  # the metric by which systems are ranked
    higher_is_better: bool = True
    graded: bool = False  # an answer is more or less right (a caption): right or wrong alone would hide a difference
    rules: dict[str, Any] = field(default_factory=dict)  # how answers were read: stated in the result
    details: tuple[dict[str, Any], ...] = ()  # per question: what was read

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric]


def same_length(**lists: Sequence) -> None:
    """Raise InputError unless all lists have the same, positive length; the message names them."""
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) != 1:
        raise InputError(f"lengths differ: {', '.join(f'{n} {name}' for name, n in sizes.items())}")
    if not next(iter(sizes.values())):
        raise InputError(f"nothing to score: {' and '.join(sizes)} are empty")


def check_labels(labels: Sequence[str]) -> list[bool]:
    """True for yes; InputError names the first label that is neither yes nor no."""
    read = {"yes": True, "no": False}
    found = [read.get(str(label).strip().lower().rstrip(".")) for label in labels]
    wrong = next((k for k, value in enumerate(found) if value is None), None)
    if wrong is not None:
        raise InputError(f"label {labels[wrong]!r} of question {wrong + 1} is neither yes nor no")
    return [bool(value) for value in found]

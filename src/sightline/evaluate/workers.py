"""Who answers the shards of a run: this process (`Here`), Ray actors (`cluster.Cluster`), or the processes that
`accelerate launch` started (`ranks.Ranks`).

A shard is a whole batch, seeded by its own name, so the answers do not depend on who gives them, nor on the order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sightline.evaluate.runner import Rows, Shard, Work, answer, describe

if TYPE_CHECKING:
    from rich.console import Console

    from sightline.evaluate.task import Task
    from sightline.lvlm import LVLM


class Workers(ABC):
    """What a run needs of those who answer. A context manager: workers elsewhere are let go on leaving."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """`runner.describe` of the model that all workers hold."""

    @abstractmethod
    def answers(self, work: Work, todo: Sequence[Shard]) -> Iterator[list[dict[str, Any]]]:
        """The rows of every shard in `todo`, shard by shard, in the order in which they become ready."""

    @abstractmethod
    def measure(self, rows: Rows, task: Task, rounds: int, console: Console) -> dict[str, dict[str, Any]]:
        """`cost.measure`, on one worker while the others rest."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to let go of, unless a kind of workers says otherwise."""
        return None


class Here(Workers):
    """This process and its model."""

    def __init__(self, lvlm: LVLM) -> None:
        self.lvlm = lvlm

    def facts(self) -> dict[str, Any]:
        return describe(self.lvlm)

    def answers(self, work: Work, todo: Sequence[Shard]) -> Iterator[list[dict[str, Any]]]:
        for shard in todo:
            yield answer(self.lvlm, work, shard)

    def measure(self, rows: Rows, task: Task, rounds: int, console: Console) -> dict[str, dict[str, Any]]:
        from sightline.evaluate.cost import measure

        return measure(self.lvlm, rows, task, rounds=rounds, console=console)

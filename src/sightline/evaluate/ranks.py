"""Several GPUs (or CPU processes) of one machine: `accelerate launch --num_processes 4 -m sightline compare ...`.

Every process loads the model on its own device. Process 0 holds the folder; it sends the work to the others, all answer
every N-th shard, and after each turn the answers are gathered, so that they are written in the order of a run of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sightline.errors import MissingExtraError, ParameterError
from sightline.evaluate.runner import Shard, Work, answer
from sightline.evaluate.workers import Here

if TYPE_CHECKING:
    from sightline.lvlm import LVLM


def launched() -> bool:
    """True when this process is one of several that a launcher (accelerate, torchrun) started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device(asked: str | None = None) -> str:
    """The device of this process. ParameterError when another kind was `asked` for."""
    found = str(_state().device)
    if asked is not None and asked != found.partition(":")[0]:
        raise ParameterError(
            f"device={asked!r} with several processes: accelerate gave this one {found!r}; leave the device out"
            + (", and add --cpu to accelerate launch" if asked == "cpu" else "")
        )
    return found


def _state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("several processes need accelerate: pip install 'sightline[accelerate]'") from error
    return PartialState(timeout=timedelta(days=1))  # the others wait while process 0 measures cost


class Ranks(Here):
    """The processes of a launch. Process 0 uses it as any workers; the others call `serve`."""

    def __init__(self, lvlm: LVLM) -> None:
        super().__init__(lvlm)
        self._state = _state()

    @property
    def main(self) -> bool:
        """True in the process that holds the folder."""
        return self._state.is_main_process

    def __exit__(self, kind: object, *error: object) -> None:
        if (
            self.main and kind is None
        ):  # after an error the launcher ends the others: they may be in the middle of a turn
            self._send(None)

    def answers(self, work: Work, todo: Sequence[Shard]) -> Iterator[list[dict[str, Any]]]:
        self._send((work, tuple(todo)))
        yield from self._turns(work, todo)

    def serve(self) -> None:
        """In every process but the first: answer what it sends, until it is done."""
        while (sent := self._send(None)) is not None:
            for _ in self._turns(*sent):
                pass

    def _send(self, message: Any) -> Any:
        """What process 0 sends, in all processes."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([message], from_process=0)[0]

    def _turns(self, work: Work, todo: Sequence[Shard]) -> Iterator[list[dict[str, Any]]]:
        from accelerate.utils import gather_object

        count, mine = self._state.num_processes, self._state.process_index
        for start in range(0, len(todo), count):
            found: list[Any] = [None]
            if start + mine < len(todo):
                try:
                    found = [answer(self.lvlm, work, todo[start + mine])]
                except Exception as error:  # told to all, raised in the first: the others would wait for it without end
                    found = [error]
            for rows in gather_object(found):
                if isinstance(rows, Exception):
                    raise rows
                if rows is not None:
                    yield rows

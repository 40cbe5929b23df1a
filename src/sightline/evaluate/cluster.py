"""Many machines: the shards of a run as calls to Ray actors, each of which holds the model. Needs the extra `[cluster]`.

A shard whose actor died (killed, out of memory, its machine lost) is asked again by another one, so a run outlives its
workers. An actor gets shards once it holds the model and has shown the same model and versions as the others.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sightline.errors import MissingExtraError, ModelError, ParameterError, SightlineError
from sightline.evaluate.folder import differences
from sightline.evaluate.runner import Rows, Shard, Work, answer, describe
from sightline.evaluate.workers import Workers

if TYPE_CHECKING:
    from rich.console import Console

    from sightline.evaluate.task import Task
    from sightline.lvlm import LVLM

AUTO = "auto"  # the cluster that runs on this machine, else one that is started for the run
STORE = 100 * 2**20  # bytes of shared memory of a cluster started here: questions and answers are small
DEATHS = 3  # of workers on one shard, or per worker before any answer, until it is not chance


class _Holder:
    """An actor: one copy of the model."""

    def __init__(self, load: Callable[[], LVLM]) -> None:
        self._load, self._lvlm, self._work = load, None, None

    def facts(self) -> dict[str, Any]:
        if self._lvlm is None:
            self._lvlm = self._load()
        return describe(self._lvlm)

    def start(self, work: Work) -> dict[str, Any]:
        self._work = work
        return self.facts()

    def answer(self, shard: Shard) -> list[dict[str, Any]]:
        return answer(self._lvlm, self._work, shard)

    def measure(self, rows: Rows, task: Task, rounds: int) -> dict[str, dict[str, Any]]:
        from sightline.evaluate.cost import measure

        self.facts()
        return measure(self._lvlm, rows, task, rounds=rounds)

    def process(self) -> int:
        return os.getpid()


class Cluster(Workers):
    """Ray actors as workers. Use as a context manager: the actors live as long as it is open.

    On another machine the model, and pictures of tasks from files, must be found under the same names.

    Args:
        load: called in every actor; for example `functools.partial(sl.load, "tiny")`.
        address: "auto" or the address of a Ray cluster.
        workers: how many; by default one per GPU of the cluster, or one per CPU core where there is none.

    Raises:
        MissingExtraError: ray is not installed. ParameterError: no such cluster, or workers is out of range.
    """

    def __init__(self, load: Callable[[], LVLM], address: str = AUTO, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("--ray needs ray: pip install 'sightline[cluster]'") from error
        if workers is not None and workers < 1:
            raise ParameterError(f"workers={workers!r} is out of range: ask for at least one")
        self._ray, self._load, self._address, self._asked = ray, load, address, workers
        self._actors: list[Any] = []
        self._facts: dict[str, Any] | None = None
        self._mine = False  # whether the connection is closed on leaving

    def __enter__(self) -> Cluster:
        self._connect()
        resources = self._ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        options = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        self._kind = self._ray.remote(**options)(_Holder)
        try:
            self._actors = [self._kind.remote(self._load) for _ in range(self._asked or gpus or max(1, cores))]
            first = [actor.facts.remote() for actor in self._actors]
            self._facts = self._outlived(self._ray.wait(first)[0][0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._mine:
            self._ray.shutdown()
            self._mine = False

    def facts(self) -> dict[str, Any]:
        return self._facts

    def answers(self, work: Work, todo: Sequence[Shard]) -> Iterator[list[dict[str, Any]]]:
        sent, waiting, idle = self._ray.put(work), deque(todo), []
        busy: dict[Any, tuple[Any, Shard | None]] = {a.start.remote(sent): (a, None) for a in self._actors}
        deaths: Counter = Counter()
        while waiting or any(shard for _, shard in busy.values()):
            while waiting and idle:
                actor, shard = idle.pop(), waiting.popleft()
                busy[actor.answer.remote(shard)] = (actor, shard)
            ready = self._ray.wait(list(busy))[0][0]
            actor, shard = busy.pop(ready)
            try:
                found = self._get(ready)
            except self._ray.exceptions.RayActorError as error:
                deaths[shard] += 1
                if deaths[shard] >= DEATHS * (1 if shard else len(self._actors)):
                    raise _dying(_place(shard, work), error) from error
                if shard is not None:
                    waiting.appendleft(shard)
                other = self._replace(actor)
                busy[other.start.remote(sent)] = (other, None)
                continue
            idle.append(actor)
            if shard is None:
                self._check(found)
            else:
                deaths[None] = 0
                yield found

    def measure(self, rows: Rows, task: Task, rounds: int, console: Console) -> dict[str, dict[str, Any]]:
        with console.status("measuring cost on one worker"):
            return self._outlived(self._actors[0].measure.remote(rows, task, rounds))

    def processes(self) -> list[int]:
        """Process ids of the workers, each on its own machine."""
        return self._ray.get([actor.process.remote() for actor in self._actors])

    # -- Ray ----------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            ray.init(address=self._address, **quiet)
        except ConnectionError as error:
            if self._address != AUTO:
                raise ParameterError(
                    f"no Ray cluster at {self._address!r}: start one with `ray start --head`, or use --ray auto"
                ) from error
            self._start(quiet)
        except ValueError as error:
            raise ParameterError(f"{self._address!r} is no address of a Ray cluster: {error}") from error
        self._mine = True

    def _start(self, options: dict[str, Any]) -> None:
        """A Ray of this machine alone, ended on leaving."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            self._ray.init(num_cpus=self._asked, include_dashboard=False, object_store_memory=STORE, **options)
        except Exception as error:  # Ray raises bare ones
            raise ModelError(
                f"Ray did not start on this machine ({error}): try again, or start it with `ray start --head`"
            ) from error

    def _get(self, reference: Any) -> Any:
        """The value, or the error of the worker as it was raised there."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SightlineError):
                raise error.cause from None
            raise

    def _outlived(self, reference: Any) -> Any:
        """The value; ModelError when the worker dies over it."""
        try:
            return self._get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise _dying("while it loaded the model or measured cost", error) from error

    def _replace(self, actor: Any) -> Any:
        other = self._kind.remote(self._load)
        self._actors[self._actors.index(actor)] = other
        return other

    def _check(self, facts: dict[str, Any]) -> None:
        unlike = differences(self._facts, facts)
        if unlike:
            name, first, other = unlike[0]
            raise ModelError(
                f"the workers differ: {name} is {first!r} on one and {other!r} on another; install the same everywhere"
            )


def _place(shard: Shard | None, work: Work) -> str:
    if shard is None:
        return "one after the other before any answer"
    return f"{DEATHS} times at {shard[0]} under {shard[1]!r}, question {work.items(shard)[0].id}"


def _dying(when: str, error: Exception) -> ModelError:
    return ModelError(
        f"a worker died {when} ({str(error).splitlines()[0]}): is memory short? Choose a smaller --batch-size or "
        "fewer --ray-workers, and run the same again"
    )

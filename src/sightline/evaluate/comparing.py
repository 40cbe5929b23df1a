"""`compare` and `tune`: the whole path from names to a folder with answers, results and tables."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sightline.errors import InputError, ParameterError
from sightline.evaluate import results, tables
from sightline.evaluate.folder import RunFolder, write_file
from sightline.evaluate.results import Row
from sightline.evaluate.runner import BASELINE, Decoding, Work, configuration, run, with_baseline
from sightline.evaluate.task import Task
from sightline.evaluate.workers import Here, Workers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sightline.engine.system import System
    from sightline.lvlm import LVLM

COST_FILE = "cost.json"


@dataclass(frozen=True)
class Comparison:
    """The outcome of a run."""

    folder: Path
    rows: tuple[Row, ...]
    cost: Mapping[str, Mapping[str, Any]]  # by label; empty when not measured
    config: Mapping[str, Any]

    def row(self, task: str, label: str) -> Row:
        """One row. InputError when there is none."""
        found = next((row for row in self.rows if (row.task, row.label) == (task, label)), None)
        if found is None:
            raise InputError(
                f"no row {task!r} with {label!r}: there are {sorted({(r.task, r.label) for r in self.rows})}"
            )
        return found


def compare(
    lvlm: LVLM | Workers,
    tasks: Sequence[Task],
    combinations: Sequence[Sequence[System]],
    out: str | Path,
    *,
    decoding: Decoding | None = None,
    cost: bool = True,
    rounds: int = 10,
    console: Console | None = None,
) -> Comparison:
    """Ask all tasks under the baseline and every combination of systems, and write everything into `out`.

    An interrupted run goes on when the same is asked again with the same `out`.

    Args:
        lvlm: a loaded model, or open workers that hold one each (`cluster.Cluster`, `ranks.Ranks`). tasks: see `finding.find`. combinations: lists of systems; the baseline is added.
        out: folder for config.json, answers.jsonl, results.json, table.md, table.tex, pareto.png, and for reducers of
            visual tokens kept.png and kept.md.
        decoding: how answers are generated; greedy in batches of 8 by default.
        cost: measure FLOPs, time and memory too, in `rounds` interleaved rounds (kept in cost.json).
        console: where progress is shown; stderr by default.

    Raises:
        ParameterError: `tasks` or `combinations` are not what they should be.
        InputError: `out` is in use or holds something else, a picture is damaged, the disk is full: nothing is lost.
    """
    decoding, console = decoding or Decoding(), console or Console(stderr=True)
    if isinstance(tasks, str) or not all(isinstance(task, Task) for task in tasks):
        raise ParameterError("tasks must be a list of tasks: evaluate.find('scenes:pope', n=100) makes one")
    names = [task.name for task in tasks]
    if not names:
        raise InputError("no task to ask: name one, for example evaluate.find('scenes:pope')")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"task {twice!r} is asked for twice: name each task once")
    workers = lvlm if isinstance(lvlm, Workers) else Here(lvlm)
    work = Work({task.name: task for task in tasks}, with_baseline(combinations), decoding)
    config = configuration(workers.facts(), work)
    with RunFolder(out, config) as folder:
        if folder.recovered:
            console.print("The last line of answers.jsonl was half-written; its batch is asked again.", style="yellow")
        run(workers, work, folder, console)
        scored = tuple(results.collect(tasks, list(work.rows), folder.answers))
        prices = _cost(folder, workers, work, rounds, console) if cost else {}
        _write(folder, scored, config, prices)
    return Comparison(folder.path, scored, prices, config)


def _cost(folder: RunFolder, workers: Workers, work: Work, rounds: int, console: Console) -> dict[str, Any]:
    """Measured once per run, on the first task; a run that goes on keeps what it has."""
    path = folder.path / COST_FILE
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if set(kept) == set(work.rows):
                return kept
        except ValueError:
            console.print(f"{COST_FILE} is damaged; cost is measured again.", style="yellow")
    found = workers.measure(work.rows, next(iter(work.tasks.values())), rounds, console)
    folder.write(COST_FILE, json.dumps(found, indent=1) + "\n")
    return found


def _write(folder: RunFolder, rows: Sequence[Row], config: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    content = results.to_json(rows, config, cost)
    folder.write("results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    folder.write("table.md", tables.markdown(rows, config, cost))
    folder.write("table.tex", tables.latex(rows, config, cost))
    if cost and len({row.label for row in rows}) > 1:
        from sightline.evaluate import kept
        from sightline.evaluate.pareto import picture

        folder.write("pareto.png", _png(picture(rows, cost)))
        if kept.lines(rows, cost):
            folder.write("kept.png", _png(kept.picture(rows, cost)))
            folder.write("kept.md", kept.markdown(kept.against_chance(rows, cost), cost))


def _png(sheet: Figure) -> bytes:
    drawn = io.BytesIO()
    sheet.savefig(drawn, dpi=150)
    return drawn.getvalue()


@dataclass(frozen=True)
class Tuned:
    """What tuning found: the best setting on the training split, judged on the held-out split."""

    best: str
    search: Comparison  # on the training split
    held_out: Comparison  # the baseline, the paper's setting and the best one


def best_label(rows: Sequence[Row]) -> str:
    """The label with the best main metric, mean over tasks; ties go to the first, so the baseline wins a draw."""
    labels = list(dict.fromkeys(row.label for row in rows))
    points = {label: 0.0 for label in labels}
    for row in rows:
        value = row.scored[row.scored.main]
        points[row.label] += value if row.scored.higher_is_better else -value
    return max(labels, key=lambda label: points[label])


def tune(
    lvlm: LVLM | Workers,
    training: Sequence[Task],
    held_out: Sequence[Task],
    combinations: Sequence[Sequence[System]],
    default: Sequence[System],
    out: str | Path,
    *,
    decoding: Decoding | None = None,
    console: Console | None = None,
) -> Tuned:
    """Search on one split, report on another: `out`/search and `out`/held-out are ordinary runs; tuned.json names the best.

    Raises:
        InputError: as `compare`; also when the two splits share pictures.
    """
    from sightline.catalog import parse

    shared = {i.picture for t in training for i in t.items} & {i.picture for t in held_out for i in t.items}
    if shared:
        raise InputError(
            f"{len(shared)} pictures are in both splits, for example {min(shared)!r}: choose disjoint ones"
        )
    settings = {"decoding": decoding, "console": console}
    search = compare(lvlm, training, combinations, Path(out) / "search", cost=False, **settings)
    best = best_label(search.rows)
    judged = compare(lvlm, held_out, [default, parse(best)], Path(out) / "held-out", cost=False, **settings)
    write_file(Path(out).expanduser() / "tuned.json", json.dumps({"best": best}, indent=1) + "\n")
    return Tuned(best, search, judged)


__all__ = ["BASELINE", "Comparison", "Tuned", "best_label", "compare", "tune"]

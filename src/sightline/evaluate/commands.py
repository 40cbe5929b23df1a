"""`sightline compare` and `sightline tune`. Light at import; torch loads when a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sightline.errors import ParameterError, check_range

if TYPE_CHECKING:
    from sightline.evaluate.comparing import Comparison
    from sightline.evaluate.workers import Workers

PIPED_WIDTH = 160  # columns of tables when the output is no terminal

app = typer.Typer(help="Quality and cost of systems, in one table.", no_args_is_help=True)

On = Annotated[
    list[str],
    typer.Option(
        "--on",
        help="scenes:NAME, with pope (:random, :popular or :adversarial behind it: one split), chair, mme, vqa, colour, count, "
        "relation, detail, sycophancy, caption, pointing, or all of these; opope, pope-chat, video, haven, robust (:choice, "
        ":main, :there). From files: pope:FILE, pope-chat:FILE, chair:FOLDER, mme:PATH, vallu:FILE, robustvqa:FILE. May be "
        "repeated.",
    ),
]
With = Annotated[
    list[str],
    typer.Option(
        "--with", help="Systems, as var:p=0.4 or a+b; several as var:p=0.2..1.0/5 or var:p=0.2|0.4. 'none' always runs."
    ),
]
Model = Annotated[str, typer.Option(help="tiny (bundled), a Hub id, or a folder.")]
Number = Annotated[int | None, typer.Option("--n", help="Questions per task; default: all of a file, 600 on scenes.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same folder goes on where it stopped.")]
Batch = Annotated[int, typer.Option(help="Questions asked at once.")]
Seed = Annotated[int, typer.Option(help="Chooses questions; makes a run repeatable.")]
Split = Annotated[str, typer.Option(help="Split of the generated world: val or test.")]
Size = Annotated[int, typer.Option(help="Side of generated pictures in pixels.")]
Rule = Annotated[str, typer.Option("--answers", help="How POPE answers are read: official, vista or vcd.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the pictures, for tasks from files.")]
Synonyms = Annotated[Path | None, typer.Option(help="CHAIR's synonyms.txt, for chair:FOLDER.")]
Words = Annotated[str, typer.Option(help="How COCO captions are read: nltk (published rules) or simple.")]
Skip = Annotated[bool, typer.Option("--skip-missing", help="Go on without missing pictures.")]
Suffix = Annotated[str | None, typer.Option(help="Put behind every question instead of the task's own suffix.")]
Tokens = Annotated[int | None, typer.Option(help="Length limit of answers instead of the task's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Answer on a Ray cluster: auto (the one that runs here, else one that is started), or an address."
    ),
]
RayWorkers = Annotated[int | None, typer.Option(help="Workers on Ray; default: one per GPU, or per core without GPUs.")]
Heat = Annotated[float, typer.Option(help="0: greedy; above: sampling at this temperature.")]


@app.command()
def compare(
    out: Out,
    on: On = ["scenes:pope"],  # noqa: B006 - typer reads it
    with_: With = ["none"],  # noqa: B006
    model: Model = "tiny",
    n: Number = None,
    batch_size: Batch = 8,
    seed: Seed = 0,
    split: Split = "val",
    size: Size = 112,
    answers: Rule = "official",
    images: Images = None,
    synonyms: Synonyms = None,
    words: Words = "nltk",
    skip_missing: Skip = False,
    suffix: Suffix = None,
    max_new_tokens: Tokens = None,
    temperature: Heat = 0.0,
    device: Device = None,
    dtype: Dtype = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Measure FLOPs, time and memory too.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds of the time measurement.")] = 10,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
) -> None:
    """Ask the same questions under several systems: quality with intervals, paired tests, and cost, in one table.

    Several GPUs of one machine: accelerate launch --num_processes N -m sightline compare ...
    """
    from sightline.evaluate.runner import Decoding
    from sightline.evaluate.sweep import parse_all

    check_range("rounds", rounds, 1, 1000)
    decoding = Decoding(temperature, batch_size, seed)
    combinations = parse_all(with_)
    options = {"n": n, "seed": seed, "split": split, "size": size, "rule": answers, "images": images}
    options |= {"synonyms": synonyms, "words": words, "skip_missing": skip_missing}
    tasks = _tasks(on, suffix, max_new_tokens, options)
    from sightline.evaluate import comparing

    with _workers(model, device, dtype, ray, ray_workers) as workers:
        if workers is not None:
            found = comparing.compare(workers, tasks, combinations, out, decoding=decoding, cost=cost, rounds=rounds)
            _show(found)


@app.command()
def tune(
    system: Annotated[str, typer.Argument(help="A system, as in `sightline list`.", show_default=False)],
    out: Out,
    on: On = ["scenes:pope"],  # noqa: B006
    grid: Annotated[
        str | None, typer.Option(help="Settings to try, as p=0.2..1.0/5,summ=0.1..0.3/3; default: the first range.")
    ] = None,
    model: Model = "tiny",
    n: Number = None,
    batch_size: Batch = 8,
    seed: Seed = 0,
    size: Size = 112,
    answers: Rule = "official",
    device: Device = None,
    dtype: Dtype = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
) -> None:
    """Find a system's best parameters on one split of the generated world, and report them on another."""
    from sightline.catalog import entry, parse
    from sightline.evaluate.runner import Decoding
    from sightline.evaluate.sweep import default_grid, expand

    if any(not name.startswith("scenes") for name in on):
        raise ParameterError(f"--on {' '.join(on)}: tuning needs two disjoint splits, so name tasks on scenes")
    found = entry(system)
    decoding = Decoding(0.0, batch_size, seed)
    combinations = [parse(one) for one in expand(f"{system}:{grid}" if grid else default_grid(found))]
    options = {"n": n, "seed": seed, "size": size, "rule": answers}
    training, held_out = (_tasks(on, None, None, options | {"split": split}) for split in ("val", "test"))
    from sightline.evaluate import comparing

    with _workers(model, device, dtype, ray, ray_workers) as workers:
        if workers is not None:
            tuned = comparing.tune(workers, training, held_out, combinations, [found.cls()], out, decoding=decoding)
            typer.echo(f"best on the training split: {tuned.best}")
            _show(tuned.held_out)


@contextmanager
def _workers(
    model: str, device: str | None, dtype: str | None, ray: str | None, ray_workers: int | None
) -> Iterator[Workers | None]:
    """Who answers: this process, Ray, or the processes of a launch; None in those that only served the first one."""
    from functools import partial

    from sightline.evaluate import ranks
    from sightline.loading import load

    if ray is not None and ranks.launched():
        raise ParameterError("--ray and accelerate launch exclude each other: use one")
    if ray is None and ray_workers is not None:
        raise ParameterError(f"--ray-workers {ray_workers} without --ray: add --ray auto")
    if ray is not None:
        from sightline.evaluate.cluster import Cluster

        with Cluster(partial(load, model, device=device, dtype=dtype), ray, ray_workers) as workers:
            yield workers
    elif ranks.launched():
        with ranks.Ranks(load(model, device=ranks.device(device), dtype=dtype)) as workers:
            if not workers.main:
                workers.serve()
            yield workers if workers.main else None
    else:
        from sightline.evaluate.workers import Here

        yield Here(load(model, device=device, dtype=dtype))


def _tasks(on: list[str], suffix: str | None, limit: int | None, options: dict[str, Any]) -> list[Any]:
    from dataclasses import replace

    from sightline.evaluate.finding import find

    tasks = [task for name in on for task in find(name, **options)]
    changes: dict[str, Any] = {} if suffix is None else {"suffix": suffix}
    if limit is not None:
        check_range("max_new_tokens", limit, 1, 4096)
        changes["max_new_tokens"] = limit
    return [replace(task, **changes) for task in tasks] if changes else tasks


def _show(found: Comparison) -> None:
    from rich.console import Console

    from sightline.evaluate import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    for table in tables.terminal(found.rows, found.cost):
        console.print(table)
    for line in tables.notes(found.config):
        console.print(line, style="dim", markup=False)
    console.print(f"Everything is in {found.folder}: results.json, table.md, table.tex, answers.jsonl", markup=False)

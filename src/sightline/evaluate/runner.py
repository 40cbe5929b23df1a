"""Ask every question under every combination of systems; go on where a killed run stopped.

Batches (shards) are fixed beforehand and always run whole, wherever: a batch of which some answers are there is asked again and only the
missing ones are kept, so that padding, and with it the last bit of every score, is the same as in an unbroken run.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sightline.catalog import to_dict, to_spec
from sightline.errors import ParameterError
from sightline.evaluate.folder import RunFolder, key_of
from sightline.evaluate.task import Item, Task

if TYPE_CHECKING:
    from sightline.engine.system import System
    from sightline.evaluate.workers import Workers
    from sightline.lvlm import LVLM

BASELINE = "none"
MAX_BATCH = 1024


@dataclass(frozen=True)
class Decoding:
    """How answers are generated. Greedy unless `temperature` is above 0."""

    temperature: float = 0.0
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not 1 <= self.batch_size <= MAX_BATCH:
            raise ParameterError(f"batch_size={self.batch_size!r} is out of range: choose it in [1, {MAX_BATCH}]")
        if not 0 <= self.temperature <= 10:
            raise ParameterError(f"temperature={self.temperature!r} is out of range: choose it in [0, 10]")

    def options(self) -> dict[str, Any]:
        """For `model.generate`."""
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        return sampled if self.temperature > 0 else {"do_sample": False, "num_beams": 1}


Rows = dict[str, tuple["System", ...]]  # label -> systems; the baseline first
Shard = tuple[str, str, int]  # task, label of its systems, number of its first question


@dataclass(frozen=True)
class Work:
    """What a run asks: every task under every row, cut into shards (batches), which can be pickled and sent."""

    tasks: Mapping[str, Task]  # by name
    rows: Rows
    decoding: Decoding

    def __iter__(self) -> Iterator[Shard]:
        """All shards in order."""
        for name, task in self.tasks.items():
            for label in self.rows:
                for start in range(0, len(task.items), self.decoding.batch_size):
                    yield name, label, start

    def items(self, shard: Shard) -> tuple[Item, ...]:
        """The questions of a shard."""
        name, _, start = shard
        return self.tasks[name].items[start : start + self.decoding.batch_size]


def with_baseline(combinations: Sequence[Sequence[System]]) -> Rows:
    """Label -> systems, "none" always first, each combination once.

    Raises:
        ParameterError: a combination is no list of systems.
        AttachError: two systems of a combination cannot run together.
    """
    from sightline.engine.system import System
    from sightline.errors import AttachError

    rows: Rows = {BASELINE: ()}
    for systems in combinations:
        if not isinstance(systems, list | tuple) or not all(isinstance(system, System) for system in systems):
            raise ParameterError(
                f"combination {systems!r}: give lists of systems, for example [[sl.steer.VAR()]], or what "
                "sl.catalog.parse('var') makes"
            )
        for i, first in enumerate(systems):
            for second in systems[i + 1 :]:
                why = first.conflicts(second) or second.conflicts(first)
                if why:
                    raise AttachError(f"{first.slug} and {second.slug} cannot run together: {why}")
        rows[to_spec(systems)] = tuple(systems)
    return rows


def describe(lvlm: LVLM) -> dict[str, Any]:
    """The model and the versions that run it: what every worker of a run must agree on."""
    import torch
    import transformers

    from sightline import __version__

    return {
        "model": {
            "name": lvlm.name,
            "host": lvlm.host.name,
            "parameters": sum(p.numel() for p in lvlm.model.parameters()),
            "dtype": str(lvlm.dtype).removeprefix("torch."),
            "device": lvlm.device.type,
            "attention": lvlm.model.config.get_text_config()._attn_implementation,
            "revision": getattr(lvlm.model.config, "_commit_hash", None),
        },
        "versions": {"sightline": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def configuration(facts: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Everything that decides the answers: what a result states, and what must agree to go on with a run."""
    decoding = work.decoding
    return {
        "model": facts["model"],
        "systems": {label: [to_dict(system) for system in systems] for label, systems in work.rows.items()},
        "tasks": [task.facts() for task in work.tasks.values()],
        "decoding": {
            "method": "sampling" if decoding.temperature > 0 else "greedy",
            "temperature": decoding.temperature,
            "batch_size": decoding.batch_size,
            "padding": "left",
        },
        "seed": decoding.seed,
        "versions": facts["versions"],
    }


def run(workers: Workers, work: Work, folder: RunFolder, console: Console) -> None:
    """Ask what is not answered yet, writing shard by shard into the open `folder`."""
    missing = {shard: [i for i in work.items(shard) if (*shard[:2], i.id) not in folder.answers] for shard in work}
    todo = [shard for shard, items in missing.items() if items]
    total, left = (sum(map(len, counted)) for counted in (map(work.items, missing), missing.values()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("answers", total=total, completed=total - left)
        for answers in workers.answers(work, todo):
            fresh = [row for row in answers if key_of(row) not in folder.answers]
            folder.add(fresh)
            progress.update(bar, description=f"{answers[0]['task']}, {answers[0]['with']}", advance=len(fresh))


def answer(lvlm: LVLM, work: Work, shard: Shard) -> list[dict[str, Any]]:
    """The rows of answers.jsonl of one shard."""
    from sightline.engine.passes import plans

    name, label, _ = shard
    task, batch, systems = work.tasks[name], work.items(shard), work.rows[label]
    if not plans(systems):
        return _answered(lvlm, work, name, label, batch, systems)
    rows = []
    for item in batch:  # such systems are other ones for every question
        rows += _answered(lvlm, work, name, label, [item], _planned(lvlm, systems, task, item))
    return rows


def _planned(lvlm: LVLM, systems: Sequence[System], task: Task, item: Item) -> tuple[System, ...]:
    from sightline.clips import is_clip, open_clip
    from sightline.engine.passes import planned
    from sightline.images import open_image

    shown = task.open(item)
    frames = open_clip(shown).frames if is_clip(shown) else (open_image(shown),)
    return planned(systems, lvlm, frames, task.prompt(item))


def _answered(
    lvlm: LVLM, work: Work, name: str, label: str, batch: Sequence[Item], systems: Sequence[System]
) -> list[dict[str, Any]]:
    """The rows of some questions under systems that are attached for them."""
    from sightline.engine.attach import attach
    from sightline.engine.record import record

    task = work.tasks[name]
    # Attached anew per batch: recordings and the systems' own memory must not grow with the run.
    observer = record(image_rows=True, sinks=False) if task.observe else None
    used = (*systems, observer) if observer else systems
    with attach(lvlm.model, *used, host=lvlm.host):
        inputs, answers = generate(lvlm, task, batch, work.decoding)
    seen = task.observe(lvlm, batch, inputs, observer.seen) if observer else [{}] * len(batch)
    return [
        {"task": name, "with": label, "id": item.id, **given, **extra}
        for item, given, extra in zip(batch, answers, seen, strict=True)
    ]


def generate(
    lvlm: LVLM, task: Task, batch: Sequence[Item], decoding: Decoding
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """(inputs, answers) of one batch: {"answer": text, "tokens": how many were generated, the end included}."""
    import torch

    torch.manual_seed(zlib.crc32(f"{decoding.seed} {task.name} {batch[0].id}".encode()))
    reply = partial(_reply, lvlm, task.max_new_tokens, decoding)
    if task.talk is not None:
        return task.talk(lvlm, task, batch, reply)
    inputs = lvlm.inputs([task.open(item) for item in batch], [task.prompt(item) for item in batch])
    return inputs, reply(inputs)


def _reply(lvlm: LVLM, length: int, decoding: Decoding, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    import torch

    with torch.inference_mode():
        made = lvlm.model.generate(**inputs, max_new_tokens=length, **decoding.options())
    new = made[:, inputs["input_ids"].shape[1] :]  # (B, T)
    texts = lvlm.processor.batch_decode(new, skip_special_tokens=True)
    ends = _ends(lvlm)
    counts = [next((k + 1 for k, i in enumerate(row) if i in ends), len(row)) for row in new.tolist()]
    return [{"answer": text.strip(), "tokens": n} for text, n in zip(texts, counts, strict=True)]


def _ends(lvlm: LVLM) -> set[int]:
    end = lvlm.model.generation_config.eos_token_id
    return set(end if isinstance(end, list | tuple) else [end])

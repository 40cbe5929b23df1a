"""The study of VAR's claims on one model: all experiments on held-out scenes, resumable, with figures and a page.

A folder holds `config.json`, `answers.jsonl` (one row per question and measurement, appended as they are made),
`results.json`, the figures, and `index.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sightline.engine.shape import shape_of
from sightline.engine.sinks import check_tau, default_tau, sink_dims_of
from sightline.errors import ParameterError
from sightline.evaluate.folder import RunFolder
from sightline.evaluate.pope import says_yes
from sightline.explain.ablation import SWEEP, variants
from sightline.explain.maps import maps_of
from sightline.explain.masking import MaskTokens, random_mask
from sightline.explain.observing import observe
from sightline.explain.questions import Item, held_out, is_right, picture_size
from sightline.explain.results import plain, summarise
from sightline.explain.scoring import ask
from sightline.explain.sinks import map_of
from sightline.explain.weighing import contribution

if TYPE_CHECKING:
    from sightline.engine.system import System
    from sightline.lvlm import LVLM

SHOWN = 4  # pictures whose whole maps are kept for the figures


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done at once: one measurement of one block of questions."""

    part: str  # "see", "weigh" or "ask": the "task" of its rows
    condition: str
    items: tuple[Item, ...]
    run: Callable[[Sequence[Item]], list[dict[str, Any]]]


def study_var(
    lvlm: LVLM,
    out: str | Path,
    *,
    n: int = 60,
    seed: int = 0,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
    draws: int = 3,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Run every experiment, and write `results.json`, figures and `index.html` into the folder `out`.

    Called again with the same arguments, it goes on where it stopped; when all is done it only draws again.

    Args:
        lvlm: a loaded model.
        out: a new folder, or that of the same study.
        n: scenes of the test split; about five questions each.
        seed: which scenes, and the random masks.
        tau, sink_dims: as in VAR; None: the defaults for this model.
        draws: random masks per question.
        batch: questions per forward.
        progress: show a bar.

    Returns:
        What `results.json` holds.

    Raises:
        ParameterError, InputError: before any work is done.
    """
    if not 1 <= draws <= 100 or not 1 <= batch <= 1024:
        raise ParameterError(f"draws={draws}, batch={batch}: choose draws in [1, 100] and batch in [1, 1024]")
    config = _config(lvlm, n, seed, tau, sink_dims, draws, batch)
    items = held_out(n, seed, config["size"])
    found = tuple(config["found_dims"])
    with RunFolder(out, config) as folder:
        _work(folder, _looks(lvlm, items, config, found), "looking", progress)
        sinks = bool(found) and any(any(row["sinks"]) for row in folder.answers.values() if row["task"] == "see")
        trials = _trials(lvlm, items, config, found) if sinks else _untouched(lvlm, items, batch)
        _work(folder, trials, "asking", progress)
        return _finish(folder, config, items)


def _config(lvlm: LVLM, n: int, seed: int, tau: float | None, dims: Any, draws: int, batch: int) -> dict[str, Any]:
    from sightline import __version__

    shape = shape_of(lvlm.model, lvlm.host)
    level = default_tau(shape.hidden_size) if tau is None else tau
    check_tau(level, shape.hidden_size)
    wrong = [d for d in dims or () if not 0 <= d < shape.hidden_size]
    if wrong:
        raise ParameterError(
            f"sink dimension {wrong[0]} is out of range: choose dimensions in [0, {shape.hidden_size - 1}]"
        )
    found = sink_dims_of(shape, level) if dims is None else tuple(dims)
    return {
        "model": lvlm.name, "weights": _weights(lvlm), "host": lvlm.host.name,
        "layers": shape.layers, "heads": shape.heads, "width": shape.hidden_size,
        "n": n, "seed": seed, "size": picture_size(lvlm.processor), "batch": batch, "draws": draws, "sweep": list(SWEEP),
        "tau": tau, "sink_dims": None if dims is None else list(dims), "found_tau": level, "found_dims": list(found),
        "versions": {"sightline": __version__, "torch": torch.__version__},
        "device": str(lvlm.device), "dtype": str(lvlm.dtype).removeprefix("torch."),
    }  # fmt: skip


def _weights(lvlm: LVLM) -> str:
    """A short fingerprint: another checkpoint of the same name must not continue this one's rows."""
    some = lvlm.model.get_input_embeddings().weight[:64].detach().float().cpu().contiguous()
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16]


def _looks(lvlm: LVLM, items: Sequence[Item], config: dict[str, Any], dims: tuple[int, ...]) -> list[Unit]:
    """Experiments 1, 3 and 4, on the first question of every scene. Without sink dimensions phi is over all of them."""
    first = list({id(item.scene): item for item in reversed(items)}.values())[::-1]
    shown = {item.number for item in first[:SHOWN]}
    sinks = {"tau": config["found_tau"], "sink_dims": dims or tuple(range(config["width"]))}

    def see(block: Sequence[Item]) -> list[dict[str, Any]]:
        seen = observe(lvlm, *_parts(block), **sinks)
        return [_seen(item, one, item.number in shown) for item, one in zip(block, seen, strict=True)]

    def weigh(block: Sequence[Item]) -> list[dict[str, Any]]:
        return [one.means() for one in contribution(lvlm, *_parts(block), **sinks)]

    parts = {"see": see, "weigh": weigh} if dims else {"see": see}
    return [Unit(part, "", block, run) for part, run in parts.items() for block in _blocks(first, config["batch"])]


def _seen(item: Item, seen: Any, whole: bool) -> dict[str, Any]:
    map_ = map_of(seen)
    objects = np.zeros((item.scene.size, item.scene.size), bool)
    for thing in item.scene.objects:
        objects |= thing.mask
    over = maps_of(seen, objects)
    counts = over.counts()
    with_sinks, without = over.on_objects()
    row = {
        "phi max": map_.phi.max(1), "phi median": np.median(map_.phi, 1), "spearman": map_.correlation(),
        "sinks": map_.sinks.sum(1), "sinks shown": counts["sinks"], "sinks on background": counts["sinks on background"],
        "tokens": int(counts["tokens"][0]), "background": int(counts["background"][0]),
        "on objects": with_sinks, "on objects without sinks": without,
        "rows": seen.rows, "mass": seen.mass, "sink mass": seen.sink_mass, "selected": seen.selected,
    }  # fmt: skip
    if whole:
        row["map"] = {
            "phi": map_.phi,
            "received": map_.received,
            "boxes": seen.layout.boxes,
            "background": over.background,
        }
    return row


def _trials(lvlm: LVLM, items: Sequence[Item], config: dict[str, Any], dims: tuple[int, ...]) -> list[Unit]:
    """Experiments 2 and 5: every question under every condition."""
    tau, batch = config["found_tau"], config["batch"]
    conditions: dict[str, Callable[[Sequence[Item]], Sequence[System]]] = {
        name: (lambda block, systems=systems: systems) for name, systems in variants(tau, dims, config["sweep"]).items()
    }
    conditions["mask sinks"] = lambda block: (MaskTokens(tau=tau, sink_dims=dims),)
    for draw in range(1, config["draws"] + 1):
        conditions[f"mask random {draw}"] = lambda block, draw=draw: (
            random_mask(block, draw, config["seed"], tau, dims),
        )
    return [
        Unit("ask", name, block, lambda block, systems=systems: _asked(lvlm, block, systems(block)))
        for name, systems in conditions.items()
        for block in _blocks(items, batch)
    ]


def _untouched(lvlm: LVLM, items: Sequence[Item], batch: int) -> list[Unit]:
    """Only the model as it is: with no sinks every condition would be that."""
    return [Unit("ask", "none", block, lambda block: _asked(lvlm, block, ())) for block in _blocks(items, batch)]


def _asked(lvlm: LVLM, block: Sequence[Item], systems: Sequence[System]) -> list[dict[str, Any]]:
    replies = ask(lvlm, *_parts(block), [item.answer for item in block], systems)
    return [
        {
            "answer": r.text,
            "right": is_right(item, r.text),
            "yes": says_yes(r.text) if item.yes_no else None,
            "logprob": r.logprob,
        }
        for item, r in zip(block, replies, strict=True)
    ]


def _parts(block: Sequence[Item]) -> tuple[list[Any], list[str]]:
    return [item.scene.image for item in block], [item.text for item in block]


def _blocks(items: Sequence[Item], batch: int) -> Iterator[tuple[Item, ...]]:
    """Fixed blocks: a resumed run computes the same batches, so the same numbers to the last bit."""
    for a in range(0, len(items), batch):
        yield tuple(items[a : a + batch])


def _work(folder: RunFolder, units: Sequence[Unit], note: str, progress: bool) -> None:
    """Do what the folder does not hold yet; a block that is there in part is run whole, and the rest of it kept."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task(note, total=sum(len(u.items) for u in units))
        for unit in units:
            keys = [(unit.part, unit.condition, str(item.number)) for item in unit.items]
            if any(key not in folder.answers for key in keys):
                both = zip(keys, unit.run(unit.items), strict=True)
                fresh = [(key, row) for key, row in both if key not in folder.answers]
                folder.add(
                    [
                        {"task": part, "with": name, "id": i, "answer": "", **plain(row)}
                        for (part, name, i), row in fresh
                    ]
                )
            bar.advance(task, len(unit.items))


def _finish(folder: RunFolder, config: dict[str, Any], items: Sequence[Item]) -> dict[str, Any]:
    from sightline.explain import figures, page

    rows = list(folder.answers.values())
    found = summarise(config, items, rows)
    folder.write("results.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    pictures = figures.draw_all(found, items, rows)
    for name, png in pictures.items():
        part = folder.path / f".{name}.png.part"
        part.write_bytes(png)
        os.replace(part, folder.path / f"{name}.png")
    folder.write("index.html", page.render(found, pictures))
    return found

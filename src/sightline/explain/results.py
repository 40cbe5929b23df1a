"""From the rows of a study to its numbers, each with n and an interval. Pure: no model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from sightline.explain.heads import mean_heads
from sightline.explain.questions import TASKS, Item
from sightline.explain.stats import bootstrap, proportion

GROUPS = ("pope", *TASKS, "all")  # of questions


def summarise(config: dict[str, Any], items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `results.json` holds: "config", "counts", "sinks", "maps", "heads", "contribution" (None without sinks),
    "conditions" {name: {group: scores}} and "contrast" (None without masks).

    Every estimate is {"value", "low", "high", "n"}, a 95 % interval; per-layer lists have one entry per decoder layer.
    """
    see = [row for row in rows if row["task"] == "see"]
    weigh = [row for row in rows if row["task"] == "weigh"]
    scores = _scores(items, rows)
    return {
        "config": config,
        "counts": {
            "pictures": len(see),
            "questions": len(items),
            **{task: sum(task in item.tasks for item in items) for task in TASKS},
        },
        "sinks": _sinks(see),
        "maps": _maps(see),
        "heads": _heads(see),
        "contribution": _contribution(weigh) if weigh else None,
        "conditions": {name: _groups(items, got, scores["none"]) for name, got in scores.items()},
        "contrast": _contrast(items, scores) if "mask random" in scores else None,
    }


def _scores(items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """{condition: {"right", "yes", "logprob", "changed": (n,)}}; the draws of the random mask also as their mean."""
    found: dict[str, dict[str, np.ndarray]] = {}
    replies: dict[str, dict[int, str]] = defaultdict(dict)
    for row in rows:
        if row["task"] != "ask":
            continue
        name, i = row["with"], int(row["id"])
        arrays = found.setdefault(
            name, {k: np.full(len(items), np.nan) for k in ("right", "yes", "logprob", "changed")}
        )
        for key in ("right", "yes", "logprob"):
            arrays[key][i] = np.nan if row[key] is None else float(row[key])
        replies[name][i] = row["answer"]
    for name, arrays in found.items():
        for i, reply in replies[name].items():
            arrays["changed"][i] = float(reply != replies["none"][i])
    draws = [arrays for name, arrays in found.items() if name.startswith("mask random ")]
    if draws:
        found["mask random"] = {key: np.mean([d[key] for d in draws], axis=0) for key in draws[0]}
    return found


def _groups(items: Sequence[Item], got: dict[str, np.ndarray], plain: dict[str, np.ndarray]) -> dict[str, Any]:
    found = {}
    for group in GROUPS:
        mine = _members(items, group)
        if len(mine):
            found[group] = _group(items, mine, got, plain)
    return found


def _group(
    items: Sequence[Item], mine: np.ndarray, got: dict[str, np.ndarray], plain: dict[str, np.ndarray]
) -> dict[str, Any]:
    right, yes = got["right"][mine], got["yes"][mine]
    where = [items[i].scene.seed for i in mine]
    found = {
        "accuracy": _proportion(right, where),
        "logprob": bootstrap(got["logprob"][mine], where),
        "accuracy change": bootstrap(right - plain["right"][mine], where),
        "logprob change": bootstrap((got["logprob"] - plain["logprob"])[mine], where),
        "answers changed": bootstrap(got["changed"][mine], where),
    }
    if np.isfinite(yes).all():
        found["yes"] = _proportion(yes, where)
    return {key: value.as_dict() for key, value in found.items()}


def _contrast(items: Sequence[Item], scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Sinks hidden minus random tokens hidden, question by question, over all questions."""
    where = [item.scene.seed for item in items]
    pairs = {key: scores["mask sinks"][key] - scores["mask random"][key] for key in ("right", "logprob")}
    return {
        "accuracy": bootstrap(pairs["right"], where).as_dict(),
        "logprob": bootstrap(pairs["logprob"], where).as_dict(),
    }


def _members(items: Sequence[Item], group: str) -> np.ndarray:
    if group == "all":
        return np.arange(len(items))
    return np.array(
        [k for k, item in enumerate(items) if (item.yes_no if group == "pope" else group in item.tasks)], int
    )


def _proportion(values: np.ndarray, where: Sequence[int]) -> Any:
    """Wilson for answers that are right or not; a bootstrap over pictures for means over draws."""
    whole = np.isin(values, (0.0, 1.0)).all()
    return proportion(int(values.sum()), len(values)) if whole else bootstrap(values, where)


def _sinks(see: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = _table(see, "sinks")  # (n, L)
    return {
        "per picture": count.mean(0).tolist(),
        "pictures with sinks": (count > 0).sum(0).tolist(),
        "phi max": _table(see, "phi max").mean(0).tolist(),
        "phi median": _table(see, "phi median").mean(0).tolist(),
        "spearman": _layer_means(_table(see, "spearman")),
        "layers": np.flatnonzero(count.any(0)).tolist(),
        "any picture": int((count > 0).any(1).sum()),
    }


def _maps(see: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sinks, hit = _table(see, "sinks shown"), _table(see, "sinks on background")
    tokens = np.array([row["tokens"] for row in see], float)
    base = np.array([row["background"] for row in see], float) / tokens
    with_sinks, without = _table(see, "on objects"), _table(see, "on objects without sinks")
    some = sinks.sum(0) > 0 if sinks.any() else np.ones(sinks.shape[1], bool)  # layers with sinks, else all
    share = np.divide(hit.sum(1), sinks.sum(1), out=np.full(len(see), np.nan), where=sinks.sum(1) > 0)
    where = range(len(see))
    return {
        "sinks on background": bootstrap(share, where, sinks.sum(1)).as_dict(),
        "excess on background": bootstrap(share - base, where, sinks.sum(1)).as_dict(),
        "sinks counted": int(sinks.sum()),
        "base rate": bootstrap(base, where).as_dict(),
        "sinks on background per layer": [h / s if s else None for h, s in zip(hit.sum(0), sinks.sum(0), strict=True)],
        "attention on objects": bootstrap(_row_means(with_sinks[:, some]), where).as_dict(),
        "attention on objects without sinks": bootstrap(_row_means(without[:, some]), where).as_dict(),
        "gain": bootstrap(_row_means((without - with_sinks)[:, some]), where).as_dict(),
        "area of objects": float(1 - base.mean()),
    }


def _heads(see: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = mean_heads(*(np.array([r[k] for r in see], float) for k in ("rows", "mass", "sink mass", "selected")))
    tables = {"mass": found.mass, "sink share": found.sink_share, "selected": found.selected}
    return {"text queries": found.rows, **{key: table.round(5).tolist() for key, table in tables.items()}}


def _contribution(weigh: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("sink norm", "other norm", "sink attention", "other attention")
    tables = {name: _table(weigh, name) for name in names}
    found: dict[str, Any] = {name: _layer_means(table) for name, table in tables.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        norm, attention = (np.log(tables[f"sink {what}"] / tables[f"other {what}"]) for what in ("norm", "attention"))
    for name, ratio in (("norm", norm), ("attention", attention), ("norm per attention", norm - attention)):
        middle = bootstrap(_row_means(ratio), range(len(weigh))).as_dict()
        found[f"{name} ratio"] = {k: v if k == "n" or v is None else math.exp(v) for k, v in middle.items()}
    return found


def _table(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """(n, L), NaN where there is nothing."""
    return np.array([[np.nan if v is None else v for v in row[key]] for row in rows], float)


def _row_means(table: np.ndarray) -> np.ndarray:
    """(n,) means over the finite entries of each row."""
    good = np.isfinite(table)
    count = good.sum(1)
    return np.divide(np.where(good, table, 0).sum(1), count, out=np.full(len(table), np.nan), where=count > 0)


def _layer_means(table: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in _row_means(table.T)]


def plain(value: Any) -> Any:
    """JSON-able: arrays as lists, floats at five significant digits, NaN and infinity as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value

"""Quality against kept visual tokens: one line per reducer, random dropping beside them, and which of them beat it.

The share kept is measured (`cost.visual_share`): the mean over the decoder's layers, so that systems that drop in stages
stand where their work stands. Every row of a reducer is compared with the row of `random` that keeps most nearly as much,
on the same questions: McNemar's exact test, Holm-adjusted over all rows of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from sightline.catalog import entry, parse
from sightline.evaluate.pareto import colours
from sightline.evaluate.results import DRAWS, Row, compared
from sightline.evaluate.runner import BASELINE
from sightline.evaluate.tables import PLAIN, figure, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHANCE = "random"
NEAR = 0.06  # rows whose shares differ by more are not compared
Cost = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Beaten:
    """A row of a reducer beside the row of random dropping that keeps most nearly as many tokens."""

    row: Row
    share: float  # of the visual tokens
    chance: Row | None = None  # None: no row of `random` keeps about as many
    chance_share: float = 0.0
    found: Mapping[str, Any] | None = None  # as `Row.against`, against `chance`


def line_of(label: str) -> str | None:
    """The line of a figure that a row belongs to: the names of its systems; None when none of them drops tokens."""
    systems = parse(label)
    if not any(entry(system.slug).kind == "prune" for system in systems):
        return None
    return "+".join(system.slug for system in systems)


def lines(rows: Sequence[Row], cost: Cost) -> dict[str, list[tuple[float, Row]]]:
    """Per line its (share kept, row), the largest share first; rows without a measured share are left out."""
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        line, share = line_of(row.label), cost.get(row.label, {}).get("visual_share")
        if line is not None and share is not None:
            found.setdefault(line, []).append((share, row))
    return {line: sorted(points, key=lambda p: -p[0]) for line, points in found.items()}


def against_chance(rows: Sequence[Row], cost: Cost, draws: int = DRAWS) -> list[Beaten]:
    """Every reducer's row beside random dropping, task by task."""
    result = []
    for task in dict.fromkeys(row.task for row in rows):
        by_line = lines([row for row in rows if row.task == task], cost)
        chance = by_line.pop(CHANCE, [])
        points = [(share, row) for points in by_line.values() for share, row in points]
        nearest = [min(chance, key=lambda c, s=share: abs(c[0] - s), default=None) for share, _ in points]
        nearest = [n if n and abs(n[0] - s) <= NEAR else None for n, (s, _) in zip(nearest, points, strict=True)]
        pairs = [(n[1].scored, row.scored) for (_, row), n in zip(points, nearest, strict=True) if n]
        found = iter(compared(pairs, draws))
        for (share, row), near in zip(points, nearest, strict=True):
            result.append(Beaten(row, share, near[1], near[0], next(found)) if near else Beaten(row, share))
    return result


def sentence(beaten: Sequence[Beaten]) -> str:
    """Which reducers beat random dropping, and at which shares; which fell behind it."""
    parts = []
    for task in dict.fromkeys(b.row.task for b in beaten):
        mine = [b for b in beaten if b.row.task == task and b.found]
        said = []
        for word, one, many in (("better", "beats", "beat"), ("worse", "falls behind", "fall behind")):
            names: dict[str, list[str]] = {}
            for b in mine:
                if b.found["verdict"] == word:
                    names.setdefault(line_of(b.row.label), []).append(f"{100 * b.share:.0f} %")
            listed = ", ".join(f"{name} (at {', '.join(shares)})" for name, shares in names.items())
            said.append(f"{listed or 'none'} {many if len(names) > 1 else one} random dropping")
        parts.append(f"{task}, {len(mine)} comparisons: {'; '.join(said)}; all else is noise.")
    return "\n".join(parts)


def markdown(beaten: Sequence[Beaten], cost: Cost) -> str:
    """kept.md"""
    header = ["task", "with", "kept %", "metric", "value [95 %]", "random keeping", "random [95 %]", "against random"]
    cells = [header, ["---"] * len(header)]
    for b in beaten:
        name = b.row.scored.main
        line = [b.row.task, b.row.label, f"{100 * b.share:.1f}", name, figure(b.row)]
        if b.found is None:
            cells.append([*line, "", "", "no random row keeps as many"])
            continue
        found, sign = b.found, "+" if b.found["difference"] > 0 else ""
        values = [number(name, found[key]) for key in ("difference", "low", "high")]
        p = "< 0.001" if found["p_holm"] < 0.001 else f"= {found['p_holm']:.2g}"
        text = f"{sign}{values[0]} [{values[1]}, {values[2]}]: {found['verdict']} (p {p})"
        cells.append([*line, f"{100 * b.chance_share:.1f}", figure(b.chance), text])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
    return f"{table}\n\n{sentence(beaten)}\n"


def picture(rows: Sequence[Row], cost: Cost) -> Figure:
    """One panel per task: the main metric with its interval over the share of visual tokens kept, one line per reducer."""
    tasks = [task for task in dict.fromkeys(row.task for row in rows)]
    columns = min(2, len(tasks))
    height = -(-len(tasks) // columns)
    sheet = Figure(figsize=(6.6 * columns, 4.6 * height), layout="constrained")
    panels = sheet.subplots(height, columns, squeeze=False)
    names = [name for name in lines(rows, cost) if name != CHANCE]
    colour = dict(zip(names, colours(len(names) + 1)[1:], strict=True)) | {CHANCE: "#7d8793"}
    for panel, task in zip(panels.flat, tasks, strict=False):
        _draw(panel, [row for row in rows if row.task == task], cost, colour)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns + 1), frameon=False)
    return sheet


def _draw(panel: Axes, rows: Sequence[Row], cost: Cost, colour: Mapping[str, Any]) -> None:
    name = rows[0].scored.main
    factor = 1 if name in PLAIN else 100
    plain = next(row for row in rows if row.label == BASELINE)
    low, high = (factor * value for value in plain.intervals[name][:2])
    panel.axhspan(low, high, color="#202020", alpha=0.08, linewidth=0)
    panel.axhline(factor * plain.scored[name], color="#202020", linewidth=1, label=BASELINE)
    found = lines(rows, cost)
    for k, (line, points) in enumerate(sorted(found.items(), key=lambda item: item[0] != CHANCE)):
        shift = 0.35 * (k - len(found) / 2)  # intervals beside each other, not upon each other
        x = np.array([100 * share + shift for share, _ in points])
        y = factor * np.array([row.scored[name] for _, row in points])
        limits = factor * np.array([row.intervals[name][:2] for _, row in points])
        style = {"linewidth": 3, "linestyle": "--"} if line == CHANCE else {"linewidth": 1.4, "marker": "o"}
        panel.errorbar(
            x,
            y,
            yerr=np.abs(limits.T - y),
            label=line,
            color=colour[line],
            markersize=4,
            elinewidth=0.8,
            capsize=2,
            **style,
        )
    panel.set_xlabel("visual tokens kept, mean over layers (%)")
    panel.set_ylabel(
        f"{name}{'' if factor == 1 else ' (%)'}{'' if rows[0].scored.higher_is_better else ', lower is better'}"
    )
    panel.set_title(f"{rows[0].task}, {rows[0].questions} questions", fontsize=10, loc="left")
    panel.set_xlim(102, 0)
    panel.spines[["top", "right"]].set_visible(False)

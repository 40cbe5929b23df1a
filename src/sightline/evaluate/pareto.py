"""Quality against cost: which rows are worth their price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sightline.errors import InputError
from sightline.evaluate.results import Row
from sightline.evaluate.tables import COST, PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT = "#8a97a5"
AXES = ("prefill_ms", "prefill_gflops", "ttft_ms", "kv_mib", "peak_mib")


def front(cost: Sequence[float], quality: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats: none is at most as dear and at least as good, and better in one."""
    points = list(zip(cost, quality, strict=True))
    return [
        k
        for k, (price, good) in enumerate(points)
        if not any(p <= price and q >= good and (p < price or q > good) for p, q in points)
    ]


def picture(rows: Sequence[Row], cost: Mapping[str, Mapping[str, float]], axis: str = "prefill_ms") -> Figure:
    """One panel per task: the main metric with its interval over a cost, and the Pareto front.

    Raises:
        InputError: the cost was not measured for every row.
    """
    lacking = [row.label for row in rows if axis not in cost.get(row.label, {})]
    if lacking or not rows:
        raise InputError(f"no {axis} of {lacking[:3]}: measure cost first (leave out --no-cost)")
    tasks = list(dict.fromkeys(row.task for row in rows))
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    labels = list(dict.fromkeys(row.label for row in rows))
    shades = dict(zip(labels, colours(len(labels)), strict=True))
    for panel, task in zip(panels.flat, tasks, strict=False):
        _draw(panel, [row for row in rows if row.task == task], cost, axis, shades)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.set_axis_off()
    marks = [Line2D([], [], marker="o", linestyle="", color=colour, label=label) for label, colour in shades.items()]
    marks.append(Line2D([], [], color=FRONT, linewidth=1, label="Pareto front"))
    figure.legend(
        handles=marks, loc="outside lower center", ncols=min(len(marks), 2 * columns), fontsize=9, frameon=False
    )
    return figure


def colours(n: int) -> list:
    """The baseline dark, the others apart from each other."""
    from matplotlib import colormaps

    few = [colormaps["tab10"](k) for k in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    others = few if n <= len(few) + 1 else [colormaps["viridis"](k / (n - 1)) for k in range(n)]
    return ["#202020", *others[: n - 1]]


def _draw(panel: Axes, rows: Sequence[Row], cost: Mapping[str, Any], axis: str, colours: Mapping[str, Any]) -> None:
    name, up = rows[0].scored.main, rows[0].scored.higher_is_better
    factor = 1 if name in PLAIN else 100
    x = np.array([cost[row.label][axis] for row in rows])
    y = factor * np.array([row.scored[name] for row in rows])
    limits = factor * np.array([row.intervals[name][:2] for row in rows])
    best = sorted(front(x, y if up else -y), key=lambda k: x[k])
    panel.step(x[best], y[best], where="post", color=FRONT, linewidth=1, zorder=1)
    panel.errorbar(x, y, yerr=np.abs(limits.T - y), fmt="none", ecolor="#c4ccd4", elinewidth=1.5, capsize=3, zorder=2)
    panel.scatter(x, y, s=40, c=[colours[row.label] for row in rows], zorder=3)
    panel.set_xlabel(COST[axis])
    panel.set_ylabel(f"{name}{'' if factor == 1 else ' (%)'}{'' if up else ', lower is better'}")
    panel.set_title(rows[0].task, fontsize=10, loc="left")
    panel.margins(x=0.1, y=0.12)
    panel.spines[["top", "right"]].set_visible(False)

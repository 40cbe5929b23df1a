"""Quality against cost: which rows are worth their price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from sightline.errors import InputError
from sightline.evaluate.results import Row
from sightline.evaluate.tables import COST, PLAIN

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
    for panel, task in zip(panels.flat, tasks, strict=False):
        _draw(panel, [row for row in rows if row.task == task], cost, axis)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.set_axis_off()
    return figure


def _draw(panel, rows: Sequence[Row], cost: Mapping[str, Mapping[str, float]], axis: str) -> None:
    name, up = rows[0].scored.main, rows[0].scored.higher_is_better
    factor = 1 if name in PLAIN else 100
    x = np.array([cost[row.label][axis] for row in rows])
    y = factor * np.array([row.scored[name] for row in rows])
    limits = factor * np.array([row.intervals[name][:2] for row in rows])
    panel.errorbar(x, y, yerr=np.abs(limits.T - y), fmt="none", ecolor="#b8c4d0", elinewidth=1.5, capsize=3, zorder=1)
    panel.scatter(x, y, s=34, color=["#d1495b" if row.against is None else "#2e6f95" for row in rows], zorder=3)
    best = sorted(front(x, y if up else -y), key=lambda k: x[k])
    panel.step(x[best], y[best], where="post", color="#2e6f95", linewidth=1, alpha=0.6, zorder=2)
    middle = (x.min() + x.max()) / 2
    for row, px, py in zip(rows, x, y, strict=True):
        side = {"ha": "right", "xytext": (-6, 5)} if px > middle else {"ha": "left", "xytext": (6, 5)}
        panel.annotate(row.label, (px, py), textcoords="offset points", fontsize=8, **side)
    panel.set_xlabel(COST[axis][0])
    panel.set_ylabel(f"{name}{'' if factor == 1 else ' (%)'}{'' if up else ', lower is better'}")
    panel.set_title(rows[0].task, fontsize=10, loc="left")
    panel.margins(x=0.14, y=0.2)
    panel.spines[["top", "right"]].set_visible(False)

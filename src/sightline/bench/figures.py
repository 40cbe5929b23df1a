"""Tables and pictures of the benches."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure

MARKS = "osD^v<>PX*hd8p"


def table(results: dict[str, Any]) -> str:
    """The mixers as Markdown: one table of forward times, one with backward, one of memory; exponents last."""
    config = results["config"]
    head = (
        f"Width {config['dim']}, {config['heads']} heads, batch 1, {config['dtype']}; {config['device']}, "
        f"{config['threads']} threads; torch {config['torch']}; freed memory: {config['freed_memory']}. "
        f"Exponents: fitted from {results['exponents_from']} tokens on.\n"
    )
    parts = [head]
    for key, title, scale, form in (
        ("forward_s", "Forward, ms", 1e3, "{:.2f}"),
        ("forward_cpu_s", "Forward, ms of processor time", 1e3, "{:.2f}"),
        ("train_s", "Forward and backward, ms", 1e3, "{:.2f}"),
        ("train_cpu_s", "Forward and backward, ms of processor time", 1e3, "{:.2f}"),
        ("forward_bytes", "Peak memory of a forward, MiB", 2**-20, "{:.1f}"),
        ("flops", "Operations of a forward, 1e9", 1e-9, "{:.3f}"),
    ):
        if not any(row.get(key) for mixer in results["mixers"].values() for row in mixer["rows"]):
            continue
        lengths = config["lengths"]
        lines = ["| mixer | " + " | ".join(map(str, lengths)) + " | exponent |", "|---" * (len(lengths) + 2) + "|"]
        for name, mixer in results["mixers"].items():
            cells = [_cell(mixer["rows"], n, key, scale, form) for n in lengths]
            power = mixer["exponents"].get(key)
            lines.append(f"| {name} | {' | '.join(cells)} | {'–' if power is None else f'{power:.2f}'} |")
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(rows: list[dict[str, Any]], n: int, key: str, scale: float, form: str) -> str:
    row = next((r for r in rows if r["id"] == str(n)), None)
    value = row and row.get(key)
    return form.format(value * scale) if value else "–"


def scaling(results: dict[str, Any]) -> Figure:
    """Log-log: forward time, time with backward, and peak memory against tokens; the exponent stands in the legend."""
    config = results["config"]
    keys = [
        ("forward_s", "forward, s"),
        ("train_s", "forward and backward, s"),
        ("forward_bytes", "peak memory, bytes"),
    ]
    keys = [k for k in keys if config["train"] or k[0] != "train_s"]
    figure = Figure(figsize=(4.6 * len(keys) + 1.6, 5.2), layout="constrained")
    colours = matplotlib.colormaps["tab20"].colors
    for i, (key, title) in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), i + 1)
        for k, (name, mixer) in enumerate(results["mixers"].items()):
            points = [(int(r["id"]), r[key]) for r in mixer["rows"] if r.get(key)]
            if not points:
                continue
            power = mixer["exponents"].get(key)
            label = name if power is None else f"{name}  N^{power:.2f}"
            style = {"color": "black", "linewidth": 2.2, "zorder": 3} if k == 0 else {"color": colours[k % 20]}
            axes.plot(*zip(*points, strict=True), marker=MARKS[k % len(MARKS)], markersize=4, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens N")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6.5)
    figure.suptitle(
        f"width {config['dim']}, {config['heads']} heads, {config['dtype']}, {config['device']}", fontsize=9
    )
    return figure

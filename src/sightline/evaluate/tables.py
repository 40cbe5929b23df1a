"""The table of a run: for a terminal, for Markdown, for LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sightline.evaluate.results import Row

if TYPE_CHECKING:
    from rich.table import Table

# Metrics shown per row beside the main one, by main metric.
SHOWN = {
    "f1": ("accuracy", "precision", "recall", "yes_ratio", "colours"),
    "chair_i": ("chair_s", "recall", "f1", "length"),
    "score": ("accuracy", "accuracy_plus"),
    "accuracy": ("mean_error",),
    "leading_accuracy": ("neutral_accuracy", "swayed"),
    "hit": ("chance", "share", "lift"),
}
PLAIN = ("score", "length", "mean_error", "lift", "words", "perception", "cognition", "hallucination")  # not shares
COST = {
    "prefill_gflops": "prefill GFLOPs",
    "prefill_ms": "prefill ms",
    "ttft_ms": "first token ms",
    "tokens_per_s": "tokens/s",
    "kv_mib": "KV MiB",
    "peak_mib": "peak MiB",
}
TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
}  # fmt: skip
Cost = Mapping[str, Mapping[str, float]]


def number(name: str, value: float) -> str:
    """A metric as text: shares in percent with one decimal, others with one or two."""
    if name.endswith("_score") or name in PLAIN:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{100 * value:.1f}"


def figure(row: Row) -> str:
    """The main metric with its interval: "85.9 [84.1, 87.5]"."""
    name = row.scored.main
    low, high, _ = row.intervals[name]
    return f"{number(name, row.scored[name])} [{number(name, low)}, {number(name, high)}]"


def change(row: Row) -> str:
    """The paired comparison in words: "+1.2 [-0.3, 2.6]: noise (p = 0.21)"."""
    if row.against is None:
        return "baseline"
    found = row.against
    if found["verdict"] == "same":
        return "same"
    name, sign = found["metric"], "+" if found["difference"] > 0 else ""
    texts = [number(name, found[key]) for key in ("difference", "low", "high")]
    p = found["p_holm"]
    return (
        f"{sign}{texts[0]} [{texts[1]}, {texts[2]}]: {found['verdict']} (p {'< 0.001' if p < 0.001 else f'= {p:.2g}'})"
    )


def beside(row: Row) -> str:
    """The other metrics worth seeing, in one cell."""
    names = [name for name in SHOWN.get(row.scored.main, ()) if name in row.scored.metrics]
    names += [name for name in row.scored.metrics if name.startswith("accuracy_0")]
    return ", ".join(f"{name} {number(name, row.scored[name])}" for name in names)


def price(key: str, figures: Mapping[str, float]) -> str:
    """A cost with three significant digits; empty when it was not measured."""
    if key not in figures:
        return ""
    value = figures[key]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def grid(rows: Sequence[Row], cost: Cost) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of the whole table. Cost columns appear when cost was measured."""
    shown = [key for key in COST if any(key in figures for figures in cost.values())]
    header = ["task", "with", "n", "metric", "value [95 %]", "against none", "also", *(COST[k] for k in shown)]
    cells = []
    for row in rows:
        figures = cost.get(row.label, {})
        prices = [price(key, figures) for key in shown]
        cells.append(
            [row.task, row.label, str(row.questions), row.scored.main, figure(row), change(row), beside(row), *prices]
        )
    return header, cells


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a reader must know to repeat the table."""
    model, decoding = config["model"], config["decoding"]
    lines = [
        f"Model {model['name']} ({model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, {model['device']}, "
        f"attention {model['attention']}); {decoding['method']}, batch {decoding['batch_size']}, seed {config['seed']}; "
        + ", ".join(f"{name} {version}" for name, version in config["versions"].items())
        + "."
    ]
    for task in config["tasks"]:
        suffix = f", suffix {task['suffix']!r}" if task["suffix"] else ", no suffix"
        missing = f", {task['missing_pictures']} pictures missing" if task["missing_pictures"] else ""
        lines.append(
            f"{task['task']}: {task['questions']} questions on {task['pictures']} pictures ({task['source']}){missing}"
            f"{suffix}, at most {task['max_new_tokens']} tokens."
        )
    lines.append(
        "Intervals: Wilson for shares, else bootstrap over pictures. Against none: paired difference (bootstrap over "
        "pictures); the word comes from McNemar's exact test on the same questions (captions: from the paired bootstrap), "
        "Holm-adjusted: noise is p >= 0.05, same means that no answer changed between right and wrong. A bootstrap of "
        "answers that are all right has no width: read 100.0 [100.0, 100.0] as too few questions."
    )
    return lines


def markdown(rows: Sequence[Row], config: Mapping[str, Any], cost: Cost) -> str:
    """table.md"""
    header, cells = grid(rows, cost)
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in line) for line in cells]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "\n".join(f"- {n}" for n in notes(config)) + "\n"


def latex(rows: Sequence[Row], config: Mapping[str, Any], cost: Cost) -> str:
    """table.tex: a tabular for booktabs; the notes are comments."""
    header, cells = grid(rows, cost)
    body = [" & ".join(map(_tex, line)) + r" \\" for line in (header, *cells)]
    return "\n".join(
        [
            *(f"% {note}" for note in notes(config)),
            rf"\begin{{tabular}}{{{'l' * len(header)}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(TEX.get(c, c) for c in text)


def terminal(rows: Sequence[Row], cost: Cost) -> list[Table]:
    """The same for a console, one narrow table per task."""
    from rich.table import Table

    shown = [key for key in ("prefill_gflops", "prefill_ms", "tokens_per_s") if any(key in f for f in cost.values())]
    tables = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        main = mine[0].scored.main
        arrow = "higher" if mine[0].scored.higher_is_better else "lower"
        table = Table(title=f"{task}, {mine[0].questions} questions ({arrow} {main} is better)", title_justify="left")
        table.add_column("with", overflow="fold")
        table.add_column(f"{main} [95 %]", no_wrap=True)
        table.add_column("against none")
        for key in shown:
            table.add_column(COST[key], justify="right")
        for row in mine:
            prices = [price(key, cost.get(row.label, {})) for key in shown]
            table.add_row(row.label, figure(row), change(row), *prices)
        tables.append(table)
    return tables

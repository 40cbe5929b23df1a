"""The summary of a look in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sightline.report.page import flat, percent, title
from sightline.report.summary import IMAGE_MASS, SINK_SHARE, heads, plain, sink_layers, words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sightline.looking import Look, Run
    from sightline.report.summary import WordSummary

WORDS = 16  # rows of the table of words; the page and the JSON hold all
HEADS = 6


def show(look: Look, console: Console | None = None) -> None:
    """Print question, answers, regions per word, sinks per layer, heads, and what the systems did."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = console or Console()
    console.print(Text(printable(look.question), style="bold"))
    for warning in look.warnings:
        console.print(Text(printable(warning), style="yellow"))
    label = max(len(title(run.label)) for run in look.runs)
    for run in look.runs:
        answer = Text(printable(run.answer) or "(empty answer)", style="" if run.answer else "dim")
        console.print(Text(f"{title(run.label):<{label}}  ", style="cyan"), answer, sep="")
    for run in look.runs:
        console.print()
        console.print(Text(title(run.label), style="bold cyan"))
        for part in (_words(look, run), _heads(run), _sinks(run), *_did(run)):
            console.print(Padding(part, (0, 0, 0, 2)))


def printable(text: str) -> str:
    """`text` without control characters, which could move the cursor or change colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _words(look: Look, run: Run) -> Table | str:
    summaries = words(look, run)
    if not summaries:
        return "no words, no regions"
    chosen = sorted(sorted(range(len(summaries)), key=lambda i: -summaries[i].image_mass)[:WORDS])
    table = _table(
        "word", ">on picture", ">on sinks", "brightest regions: share of the attention on the picture (x0, y0, x1, y1)"
    )
    for i in chosen:
        word = summaries[i]
        table.add_row(_cell(word.text), percent(word.image_mass), percent(word.sink_share), _regions(word))
    if len(chosen) < len(summaries):
        table.caption = (
            f"the {len(chosen)} words that look most at the picture, of {len(summaries)}; all in report.html"
        )
    return table


def _regions(word: WordSummary) -> str:
    parts = [
        f"{r.place} {percent(r.share)}" + (f" ({', '.join(map(str, r.box))})" if r.box else "") for r in word.regions
    ]
    return "; ".join(parts) or "spread evenly"


def _heads(run: Run) -> Any:
    scan = heads(run)
    rule = f"mass on the picture >= {percent(IMAGE_MASS)}, sinks <= {percent(SINK_SHARE)} of it"
    top = [f"{i}.{h} {percent(scan.mass[i, h])}" for i, h in scan.largest(HEADS)]
    listed = f"; strongest (layer.head): {', '.join(top)}" if top else ""
    return _line("image-centric heads", f"{int(scan.centric.sum())} of {scan.centric.size} ({rule}){listed}")


def _sinks(run: Run) -> Any:
    layers = sink_layers(run)
    if not any(layer["visual"] or layer["text"] for layer in layers):
        largest = max((layer["largest_phi"] or 0.0 for layer in layers), default=0.0)
        if not largest:  # phi is a maximum over the sink dimensions: zero only when there are none
            return _line("sinks", f"none: no dimension of the start token reaches the threshold {run.tau:g}")
        return _line("sinks", f"none: phi reaches {largest:g} on the picture, the threshold is {run.tau:g}")
    table = _table(">layer", ">visual sinks", "token (phi)", "sinks in the text (position)")
    for first, last, layer in _alike(layers):
        visual = ", ".join(f"{s['token']} ({s['phi']:.0f})" for s in layer["visual"][:6] if s["phi"] is not None)
        text = ", ".join(f"{_cell(s['token'])} ({s['position']})" for s in layer["text"][:6])
        more = " …" if len(layer["visual"]) > 6 else ""
        table.add_row(
            f"{first}" if first == last else f"{first}-{last}", str(len(layer["visual"])), visual + more, text
        )
    return table


def _alike(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Neighbouring layers with the same sinks as one (first, last, layer with the largest phi)."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for layer in layers:
        if runs and _names(runs[-1][2]) == _names(layer):
            first, _, best = runs[-1]
            best = max((best, layer), key=lambda x: max((s["phi"] or 0.0 for s in x["visual"]), default=0.0))
            runs[-1] = (first, layer["layer"], best)
        else:
            runs.append((layer["layer"], layer["layer"], layer))
    return runs


def _names(layer: dict[str, Any]) -> tuple[frozenset[int], frozenset[int]]:
    return frozenset(s["token"] for s in layer["visual"]), frozenset(s["position"] for s in layer["text"])


def _did(run: Run) -> list[Any]:
    rate = f", {len(run.pieces) / run.seconds:.1f} tokens/s" if run.seconds > 0 else ""
    lines = [_line("time", f"{run.seconds:.2f} s, {len(run.pieces)} token{'s' * (len(run.pieces) != 1)}{rate}")]
    if run.stages:
        left = "; ".join(f"{s.name} {int(s.kept.sum())} of {len(s.kept)}" for s in run.stages)
        lines.append(_line("visual tokens left", left))
    return lines + [_line(name, value) for name, value in flat(plain(run.notes))]


def _line(name: str, value: str) -> Any:
    from rich.text import Text

    return Text.assemble((printable(name), "dim"), "  ", printable(value))


def _cell(text: str) -> str:
    """A token's text as it may stand in a table cell: no markup, no line breaks, blanks alone made visible."""
    from rich.markup import escape

    shown = printable(text).replace("\n", "⏎").replace("\t", "⇥")
    return escape(shown if shown.strip(" ") else "␣" * len(shown))


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        caption_justify="left",
    )
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table

"""What the catalogue says of a system, for the terminal and as JSON: `sightline list`, `card` and `cite`."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

from sightline.catalog import KINDS, Entry, load_all, to_text
from sightline.console import say
from sightline.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from rich.console import Console


def choose(kind: str | None) -> list[Entry]:
    """All systems, or those of one kind; UnknownNameError suggests the nearest kind."""
    if kind is not None and kind not in KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}: {nearest(kind, list(KINDS))}")
    return [entry for entry in load_all().values() if kind in (None, entry.kind)]


def summary(entry: Entry) -> dict[str, Any]:
    """One line of `sightline list --json`."""
    paper = entry.paper
    return {
        "name": entry.slug,
        "kind": entry.kind,
        "summary": entry.summary,
        "paper": paper and paper.title,
        "venue": paper and f"{paper.venue} {paper.year}",
        "url": paper and paper.url,
    }


def card(entry: Entry) -> dict[str, Any]:
    """Everything known of a system, JSON-able."""
    return {
        **summary(entry),
        **{key: entry.paper and getattr(entry.paper, key) for key in ("authors", "code", "licence")},
        "needs": list(entry.needs),
        "parameters": _parameters(entry),
        "published": [{"what": what, "figure": figure, "status": "as reported"} for what, figure in entry.published],
        "networks": _networks(entry),
        "command": _command(entry),
        "python": _python(entry),
        "bibtex": entry.paper and entry.bibtex(),
    }


def print_list(entries: list[Entry], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "kind"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it does")
    table.add_column("paper", no_wrap=True)
    for entry in entries:
        where = summary(entry)["venue"] or "(a baseline)"
        table.add_row(Text(entry.slug, "cyan"), entry.kind, Text(entry.summary), where)
    console.print(table)


def print_card(entry: Entry, console: Console) -> None:
    facts = card(entry)
    console.print(f"[bold cyan]{entry.slug}[/]  [dim]{entry.kind}: {KINDS[entry.kind]}[/]")
    say(console, entry.summary)
    say(console)
    if entry.paper is None:
        say(console, "A baseline, without a paper.")
    else:
        say(console, entry.paper.title, style="bold")
        say(console, f"{_names(facts['authors'])}. {facts['venue']}")
    for key in ("url", "code"):
        if facts[key]:
            licence = f" (licence: {facts['licence']})" if key == "code" and facts["licence"] else ""
            say(console, f"{'official code: ' if key == 'code' else ''}{facts[key]}{licence}")
    _rows(console, "Parameters", ("name", "default", "range", "meaning"), [_cells(p) for p in facts["parameters"]])
    published = [(row["what"], row["figure"], row["status"]) for row in facts["published"]]
    _rows(console, "Published figures", ("what", "figure", "status"), published)
    networks = [tuple("" if v is None else str(v) for v in row.values()) for row in facts["networks"]]
    _rows(console, "Networks (timm.create_model)", ("name", "input", "ImageNet-1K top-1, as reported"), networks)
    say(console, "\nUse it", style="bold")
    for line in (facts["command"], *facts["python"].splitlines()):
        if line:
            say(console, f"  {line}")
    if entry.paper is not None:
        say(console, "\nCite it", style="bold")
        say(console, facts["bibtex"])


def _networks(entry: Entry) -> list[dict[str, Any]]:
    """The backbones built on a mixer; none where timm is absent."""
    from importlib.util import find_spec

    if entry.kind != "mix" or find_spec("timm") is None:
        return []
    from sightline.backbones import of_family

    return [{"name": v.name, "size": v.size, "top1": v.top1} for v in of_family(entry.slug)]


def _rows(console: Console, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    say(console, f"\n{title}", style="bold")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "default", "range", "status"))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _parameters(entry: Entry) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(entry.cls)
    return [_parameter(field, hints[field.name]) for field in entry.parameters if field.init]


def _parameter(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default
    required = default is dataclasses.MISSING
    return {
        "name": field.name,
        "type": field.type if isinstance(field.type, str) else field.type.__name__,
        "required": required,
        "default": None if required else default,
        "low": field.metadata.get("low"),
        "high": field.metadata.get("high"),
        "choices": list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else [],
        "help": field.metadata.get("help", ""),
    }


def _cells(parameter: dict[str, Any]) -> tuple[str, str, str, str]:
    low, high = parameter["low"], parameter["high"]
    bounds = "" if low is None and high is None else f"{_bound(low, '-inf')} .. {_bound(high, 'inf')}"
    bounds = " | ".join(parameter["choices"]) or bounds
    default = "(required)" if parameter["required"] else to_text(parameter["default"])
    return parameter["name"], default, bounds, parameter["help"]


def _bound(value: float | None, unbounded: str) -> str:
    return unbounded if value is None else f"{value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _acts_on_models(entry: Entry) -> bool:
    from sightline.engine.system import System

    return issubclass(entry.cls, System)


def _command(entry: Entry) -> str:
    """How to use a system on the command line; empty for one that is neither attached to a model nor run by `train`."""
    if entry.kind == "train":
        return f"sightline train {entry.slug} --out run"
    if not _acts_on_models(entry):
        return ""
    settings = [f"{p['name']}={p['default']}" for p in _parameters(entry) if _is_number(p["default"])]
    return f'sightline look photo.jpg "Is there a dog?" --with {":".join([entry.slug, *settings[:1]])}'


def _python(entry: Entry) -> str:
    required = ", ".join(f"{p['name']}=..." for p in _parameters(entry) if p["required"])
    made = f"sl.{entry.kind}.{entry.cls.__name__}({required})"
    if entry.kind == "train":
        return f"import sightline as sl\nsettings = {made}"
    if not _acts_on_models(entry):
        return f"import sightline as sl\ny = {made}(x)"
    return f"import sightline as sl\nwith sl.attach(model, {made}) as attached:\n    model.generate(**inputs)"


def _names(authors: str) -> str:
    """Authors in BibTeX form ("Last, First and others") as a sentence has them ("First Last, et al.")."""
    names = [" ".join(reversed(name.split(", "))) for name in authors.split(" and ")]
    return ", ".join("et al." if name == "others" else name for name in names)

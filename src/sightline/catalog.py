"""The registry of systems: one decorator on a class feeds the command line, docs, README, citations and the test matrix.

    @system("var", kind="steer", paper=Paper(...))
    @dataclass(frozen=True)
    class VAR(System): ...

Parameters are the dataclass fields; each carries its help, range and source in `field(metadata=...)` through `param`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from sightline.errors import InputError, ParameterError, UnknownNameError, nearest
from sightline.parameters import check_parameters as check_parameters
from sightline.parameters import convert
from sightline.parameters import param as param

KINDS = {
    "prune": "drop or merge visual tokens, before or inside the language model",
    "steer": "edit attention or hidden states while the model answers",
    "decode": "weigh next-token scores, mostly against those of a second stream",
    "mix": "replace softmax attention: modules (B, *grid, C) -> (B, *grid, C)",
    "train": "train a model: losses and schedules, run by `sightline train NAME`",
}


@dataclass(frozen=True)
class Paper:
    """Where a system was published."""

    title: str
    authors: str  # BibTeX form, "A and B"
    venue: str
    year: int
    arxiv: str | None = None
    code: str | None = None  # official repository, owner/name
    licence: str | None = None  # of the official code
    key: str | None = None  # BibTeX label, where several systems come from one paper; None: the system's name

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def bibtex(self, key: str) -> str:
        """The BibTeX entry, with `key` as its label."""
        rows = {"title": f"{{{self.title}}}", "author": self.authors, "booktitle": self.venue, "year": str(self.year)}
        if self.arxiv:
            rows |= {"eprint": self.arxiv, "archivePrefix": "arXiv", "url": self.url}
        return "\n".join([f"@inproceedings{{{key},", *(f"  {k} = {{{v}}}," for k, v in rows.items()), "}"])


@dataclass(frozen=True)
class Entry:
    """One registered system."""

    slug: str
    kind: str
    cls: type
    paper: Paper | None  # None: a baseline that nobody published
    summary: str
    needs: tuple[str, ...]  # what a host must have: "image_tokens", "cls", ...
    published: tuple[tuple[str, str], ...]  # (what, figure) the paper reports, with its source stated

    def bibtex(self) -> str:
        """The BibTeX entry of its paper; InputError when there is none."""
        if self.paper is None:
            raise InputError(f"{self.slug} is a baseline without a paper: there is nothing to cite")
        return self.paper.bibtex(self.paper.key or self.slug)

    @property
    def parameters(self) -> tuple[dataclasses.Field, ...]:
        return dataclasses.fields(self.cls)


ENTRIES: dict[str, Entry] = {}


def system(
    slug: str,
    *,
    kind: str,
    paper: Paper | None,
    summary: str,
    needs: tuple[str, ...] = ("image_tokens",),
    published: tuple[tuple[str, str], ...] = (),
) -> Callable[[type], type]:
    """Register a class as a published system. Duplicate or malformed names raise at import."""
    if kind not in KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}: {nearest(kind, list(KINDS))}")
    if slug != slug.lower() or not slug.replace("-", "").isalnum():
        raise ParameterError(f"system name {slug!r} must be lower-case letters, digits and hyphens")

    def add(cls: type) -> type:
        if slug in ENTRIES and ENTRIES[slug].cls.__qualname__ != cls.__qualname__:
            raise ParameterError(f"system name {slug!r} is already taken by {ENTRIES[slug].cls.__name__}")
        cls.slug = slug
        ENTRIES[slug] = Entry(slug, kind, cls, paper, summary, needs, published)
        return cls

    return add


def load_all() -> dict[str, Entry]:
    """Import every system file; returns the registry, sorted by kind and name."""
    for kind in KINDS:
        package = import_module(f"sightline.{kind}")
        for module in iter_modules(package.__path__):
            import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(ENTRIES.items(), key=lambda item: (item[1].kind, item[0])))


def entry(slug: str) -> Entry:
    """The registered system of that name; UnknownNameError suggests the nearest."""
    entries = load_all()
    if slug not in entries:
        raise UnknownNameError(f"unknown system {slug!r}: {nearest(slug, list(entries))} (see `sightline list`)")
    return entries[slug]


def table() -> str:
    """The registry as a Markdown table, for the README."""
    rows = ["| system | kind | what it does | paper |", "|---|---|---|---|"]
    first: dict[Paper | None, str] = {}
    for e in load_all().values():
        where = f"as `{first[e.paper]}`" if e.paper and e.paper in first else _where(e.paper)
        first.setdefault(e.paper, e.slug)
        rows.append(f"| `{e.slug}` | {e.kind} | {e.summary} | {where} |")
    return "\n".join(rows)


def _where(paper: Paper | None) -> str:
    if paper is None:
        return "a baseline, without a paper"
    title = f"[{paper.title}]({paper.url})" if paper.url else paper.title
    return f"{title}, {paper.venue} {paper.year}"


def renew(text: str) -> str:
    """`text` with the table of systems between its two markers renewed."""
    begin, end = "<!-- systems: generated by `make readme` -->", "<!-- end of systems -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table()}\n{end}{rest.split(end)[1]}"


def parse(spec: str) -> list[Any]:
    """Systems from the command-line form `name:key=value,key=value+name2`; "none" or "" gives an empty list.

    Raises:
        UnknownNameError: no system of that name. ParameterError: a parameter is unknown, missing, given twice or out of
            range, or nothing stands beside a "+".
    """
    if not spec.strip():
        return []
    systems = []
    for part in spec.split("+"):
        name, _, settings = part.strip().partition(":")
        if not name:
            raise ParameterError(
                f"{spec!r}: nothing stands beside a '+'; write systems as name+name, for example var+vhr"
            )
        if name != "none":
            systems.append(build(name, _settings(name, settings)))
    return systems


def build(slug: str, settings: dict[str, Any]) -> Any:
    """The system `slug` with the given parameters; strings are converted to the field's type."""
    found = entry(slug)
    hints = typing.get_type_hints(found.cls)
    known = [f.name for f in found.parameters if f.init]
    for key in settings:
        if key not in known:
            raise ParameterError(f"{slug} has no parameter {key!r}: {nearest(key, known)}")
    required = [f.name for f in found.parameters if f.init and f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in settings]:
        wanted = ",".join(f"{name}=..." for name in missing)
        raise ParameterError(f"{slug} needs {' and '.join(missing)}: write {slug}:{wanted}")
    return found.cls(**{k: convert(slug, k, v, hints[k]) if isinstance(v, str) else v for k, v in settings.items()})


def to_text(value: Any) -> str:
    """A parameter's value as the command line writes it: true, none, 0.7/0.5."""
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def to_spec(systems: typing.Iterable[Any]) -> str:
    """The command-line form of systems, with the parameters that differ from their defaults; "none" for no system."""
    parts = []
    for instance in systems:
        changed = []
        for f in dataclasses.fields(instance):
            value = getattr(instance, f.name)
            if value != f.default:
                changed.append(f"{f.name}={to_text(value)}")
        parts.append(instance.slug + (":" + ",".join(changed) if changed else ""))
    return "+".join(parts) or "none"


def to_dict(instance: Any) -> dict[str, Any]:
    """The JSON-able configuration of a system: {"system": slug, **parameters}."""
    return {"system": instance.slug, **dataclasses.asdict(instance)}


def from_dict(config: dict[str, Any]) -> Any:
    """The system that `to_dict` described."""
    config = dict(config)
    return build(config.pop("system"), {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})


def _settings(slug: str, text: str) -> dict[str, str]:
    """`key=value,key=value` as a dict."""
    pairs = [_setting(part) for part in text.split(",") if part]
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ParameterError(f"{slug}: {twice} is given twice; choose one value")
    return dict(pairs)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise ParameterError(f"cannot read {text!r}: write parameters as name=value, for example var:p=0.4,tau=20")
    return key.strip(), value.strip()


if __name__ == "__main__":
    from pathlib import Path

    from sightline import catalog  # not this copy, whose registry is empty

    readme = Path("README.md")
    readme.write_text(catalog.renew(readme.read_text(encoding="utf-8")), encoding="utf-8")

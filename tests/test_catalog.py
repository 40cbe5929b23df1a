"""The registry: what the decorator promises, and the command-line form of systems."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import catalog
from sightline.catalog import KINDS, Paper, check_parameters, param
from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.steer.var import VAR

PAPER = Paper("A Title", "Last, First and Other, Name", "ICLR", 2025, arxiv="2501.00001", code="owner/name")


@dataclass(frozen=True)
class Toy:
    """Has a field of every type that the command line reads."""

    size: int = param(dataclasses.MISSING, "required", low=1, high=9)
    share: float = param(0.5, "a share", low=0, high=1)
    flag: bool = param(False, "a switch")
    mode: Literal["fast", "exact"] = param("fast", "a choice")
    limit: float | None = param(None, "none, or a bound", low=0)
    dims: tuple[int, ...] | None = param(None, "none, or several", low=0)
    label: str = param("", "a text")
    table: list = param([1, 2], "has a default that can change")  # noqa: RUF009

    def __post_init__(self) -> None:
        check_parameters(self)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The toy, in a copy of the registry."""
    catalog.load_all()
    monkeypatch.setattr(catalog, "ENTRIES", dict(catalog.ENTRIES))
    catalog.system("toy", kind="steer", paper=PAPER, summary="does nothing")(Toy)


def test_every_system_is_complete():
    entries = catalog.load_all()
    assert [(e.kind, e.slug) for e in entries.values()] == sorted((e.kind, e.slug) for e in entries.values())
    for slug, entry in entries.items():
        if slug == "toy":
            continue
        assert (entry.slug, entry.cls.slug) == (slug, slug)
        assert entry.kind in KINDS
        assert entry.summary
        assert entry.summary[0].islower() or entry.summary.split()[0].isupper() or not entry.summary[0].isalpha()
        if entry.paper is None:  # a baseline
            continue
        assert entry.paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", entry.paper.arxiv)
        assert entry.paper.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.paper.code)
        assert all(", " in author or author == "others" for author in entry.paper.authors.split(" and ")), slug
        for field in (f for f in entry.parameters if f.init):
            assert field.metadata.get("help"), f"{slug}: parameter {field.name} has no help"


@pytest.mark.parametrize("slug", sorted(catalog.load_all()))
def test_systems_of_default_parameters_survive_every_form(slug):
    required = [f.name for f in catalog.entry(slug).parameters if f.init and f.default is f.default_factory]
    if required:
        with pytest.raises(ParameterError, match=f"{slug} needs {required[0]}"):
            catalog.parse(slug)
        return
    (made,) = catalog.parse(slug)
    assert catalog.to_spec([made]) == slug
    assert catalog.from_dict(json.loads(json.dumps(catalog.to_dict(made)))) == made


@given(
    st.floats(0, 1),
    st.none() | st.floats(0, 1e6),
    st.none() | st.lists(st.integers(0, 9999), min_size=1),
    st.booleans(),
)
def test_what_is_written_is_read_again(p, tau, dims, skip):
    system = VAR(p=p, tau=tau, sink_dims=None if dims is None else tuple(dims), skip_last_layer=skip)
    assert catalog.parse(catalog.to_spec([system])) == [system]
    assert catalog.from_dict(json.loads(json.dumps(catalog.to_dict(system)))) == system


def test_specs():
    assert catalog.parse("none") == catalog.parse("") == catalog.parse(" ") == catalog.parse("none+none") == []
    assert catalog.to_spec([]) == "none"
    assert catalog.parse("var:p=0.4, tau=20 + toy:size=3") == [VAR(p=0.4, tau=20), Toy(3)]
    assert catalog.to_spec([VAR(p=0.4, sink_dims=(1, 2), skip_last_layer=False), VAR()]) == (
        "var:p=0.4,sink_dims=1/2,skip_last_layer=false+var"
    )


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("flag=true", "flag", True),
        ("flag=False", "flag", False),
        ("mode=exact", "mode", "exact"),
        ("limit=2", "limit", 2.0),
        ("limit=none", "limit", None),
        ("dims=7", "dims", (7,)),
        ("dims=7/8/9", "dims", (7, 8, 9)),
        ("dims=None", "dims", None),
        ("label=a=b", "label", "a=b"),
        ("share=1e-3", "share", 0.001),
        ("size=4", "size", 4),
    ],
)
def test_values_are_read_as_their_fields_type(text, field, value):
    spec = f"toy:{text}" if field == "size" else f"toy:size=3,{text}"
    read = getattr(catalog.parse(spec)[0], field)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("toy", "toy needs size: write toy:size=..."),
        ("toy:size=3.5", "cannot read size='3.5'; a value of type int is needed"),
        ("toy:size=3,flag=yes", "cannot read flag='yes'; a value of type true or false"),
        ("toy:size=3,limit=x", "cannot read limit='x'; a value of type float or none"),
        ("toy:size=3,dims=a/b", "cannot read dims='a/b'; a value of type tuple (written 1/2/3) or none"),
        ("toy:size=3,mode=fsat", "cannot read mode='fsat': did you mean fast"),
        ("toy:size=3,shrae=1", "toy has no parameter 'shrae': did you mean share"),
        ("toy:size", "cannot read 'size': write parameters as name=value"),
        ("toy:size=", "cannot read 'size='"),
        ("toy:size=3,size=4", "toy: size is given twice"),
        ("toy:size=3+", "nothing stands beside a '+'"),
        ("+var", "nothing stands beside a '+'"),
        ("toy:size=0", "size=0 is out of range; choose size in [1, 9]"),
        ("toy:size=3,share=nan", "share=nan is out of range"),
        ("toy:size=3,share=-0.1", "share=-0.1 is out of range; choose share in [0, 1]"),
        ("toy:size=3,limit=-1", "choose limit in [0, inf]"),
        ("toy:size=3,dims=1/-1", "dims=(1, -1) is out of range"),
    ],
)
def test_settings_that_are_refused(spec, named):
    with pytest.raises(ParameterError) as caught:
        catalog.parse(spec)
    assert named in str(caught.value)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="unknown system 'tooy': did you mean toy"):
        catalog.parse("var+tooy")
    with pytest.raises(UnknownNameError, match=r"unknown system 'zzzz': known: .*var"):
        catalog.entry("zzzz")


@pytest.mark.parametrize("value", [True, "0.5", None])
def test_values_of_the_wrong_type(value):
    if value is None:
        assert Toy(3, limit=None).limit is None
        return
    with pytest.raises(ParameterError, match=r"share=.* is out of range"):
        Toy(3, share=value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 2.5}, "Toy: size=2.5: choose a whole number"),
        ({"size": None}, "size=None: choose a whole number"),
        ({"share": None}, "share=None: choose a number"),
        ({"flag": "no"}, "flag='no': choose True or False"),
        ({"mode": "fsat"}, "mode='fsat': choose fast or exact"),
        ({"dims": [1, 2]}, "dims=[1, 2]: choose a tuple, each a whole number or None"),
        ({"dims": (1, 2.5)}, "dims=(1, 2.5): choose a tuple"),
        ({"label": None}, "label=None: choose text"),
        ({"table": 3}, "table=3: choose a list"),
    ],
)
def test_values_of_another_type(given, said):
    with pytest.raises(ParameterError) as caught:
        Toy(**{"size": 3, **given})
    assert said in str(caught.value)


def test_defaults_that_can_change_are_not_shared():
    first, second = Toy(3), Toy(3)
    first.table.append(3)
    assert second.table == [1, 2]


def test_names_are_registered_once():
    other = dataclasses.make_dataclass("Other", [], frozen=True)
    with pytest.raises(ParameterError, match="'toy' is already taken by Toy"):
        catalog.system("toy", kind="steer", paper=PAPER, summary="x")(other)
    catalog.system("toy", kind="steer", paper=PAPER, summary="again")(Toy)  # a module that is imported again
    assert catalog.entry("toy").summary == "again"


@pytest.mark.parametrize("slug", ["", "Toy", "my toy", "my_toy", "toy+var", "toy:1"])
def test_malformed_names(slug):
    with pytest.raises(ParameterError, match="lower-case letters, digits and hyphens"):
        catalog.system(slug, kind="steer", paper=PAPER, summary="x")


def test_unknown_kinds():
    with pytest.raises(UnknownNameError, match="unknown kind 'ster': did you mean steer"):
        catalog.system("x", kind="ster", paper=PAPER, summary="x")


def test_bibtex():
    assert PAPER.bibtex("toy").splitlines() == [
        "@inproceedings{toy,",
        "  title = {{A Title}},",
        "  author = {Last, First and Other, Name},",
        "  booktitle = {ICLR},",
        "  year = {2025},",
        "  eprint = {2501.00001},",
        "  archivePrefix = {arXiv},",
        "  url = {https://arxiv.org/abs/2501.00001},",
        "}",
    ]
    assert "eprint" not in dataclasses.replace(PAPER, arxiv=None).bibtex("toy")
    for entry in catalog.load_all().values():
        if entry.paper is not None:
            written = entry.bibtex()
            assert written.count("{") == written.count("}")


@pytest.mark.parametrize("slug", sorted(catalog.load_all()))
def test_every_system_stands_in_its_family_s_name_space(slug):
    """`sightline card` tells people to write sl.KIND.CLASS."""
    entry = catalog.entry(slug)
    family = import_module(f"sightline.{entry.kind}")
    assert getattr(family, entry.cls.__name__) is entry.cls
    assert entry.cls.__name__ in family.__all__


def test_a_baseline_has_no_paper_to_cite():
    with pytest.raises(InputError, match="random is a baseline without a paper"):
        catalog.entry("random").bibtex()


def test_systems_of_one_paper_share_its_entry():
    """MoH as a mixer and in a language model: one BibTeX entry, and the table names the paper once."""
    mixer, llm = catalog.entry("moh"), catalog.entry("moh-llm")
    assert mixer.paper is llm.paper
    assert mixer.bibtex() == llm.bibtex()
    assert mixer.bibtex().startswith("@inproceedings{moh,")
    rows = [row for row in catalog.table().splitlines() if row.startswith("| `moh")]
    assert mixer.paper.title in rows[0]
    assert rows[1].endswith("| as `moh` |")
    papers = [entry.paper for entry in catalog.load_all().values() if entry.paper is not None]
    titles = {}
    assert all(titles.setdefault(paper.title, paper) is paper for paper in papers)


@pytest.mark.parametrize("package", ["sightline", "sightline.explain", "sightline.evaluate", "sightline.engine"])
def test_public_names_are_found_and_completed(package):
    """What a name's module is does not show: every public name can be had, and the shell's completion knows it."""
    module = import_module(package)
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert name in dir(module)
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", ["sightline", "sightline.explain", "sightline.evaluate"])
def test_type_checkers_see_the_names_that_load_when_used(package):
    """The imports that only type checkers and editors read are those that are loaded at run time, from the same modules."""
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(seen) == set(module.__all__)
    for name, origin in seen.items():
        assert getattr(import_module(origin), name) is getattr(module, name)

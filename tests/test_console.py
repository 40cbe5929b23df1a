"""Output is the same text in a terminal and in a pipe."""

from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table

from sightline.console import PIPED_WIDTH, make_console, print_json, say, status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_pipe_gets_plain_lines(capsys):
    console = make_console()
    table = Table(box=None, pad_edge=False)
    table.add_row("[red]a[/]", "b" * 90)
    table.add_row("long", "c")
    console.print(table)
    say(console, "word " * 100, style="bold red")
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == lines
    assert lines[-3:] == [f"a     {'b' * 90}", "long  c", ("word " * 100).rstrip()]
    assert console.width == PIPED_WIDTH


def test_a_pipe_keeps_the_width_that_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert make_console().width == 40


def test_a_terminal_gets_colours_and_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys, "stdout", Terminal())
    console = make_console()
    say(console, "word " * 20, style="red")
    written = sys.stdout.getvalue()
    assert "\x1b[31m" in written
    assert len(written.splitlines()) == 2


def test_text_is_printed_as_it_is(capsys):
    say(make_console(), "[bold] :smile: [link=x] \\n")
    assert capsys.readouterr().out == "[bold] :smile: [link=x] \\n\n"


def test_json(capsys):
    print_json({"a": "ü", "b": [1.5, None]})
    assert capsys.readouterr().out == '{\n "a": "ü",\n "b": [\n  1.5,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        print_json(float("nan"))


def test_the_spinner_is_for_terminals(monkeypatch, capsys):
    with status("asking"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with status("asking", show=False):
        pass
    assert sys.stderr.getvalue() == ""
    with status("asking"):
        pass
    assert "asking" in sys.stderr.getvalue()

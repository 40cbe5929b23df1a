from __future__ import annotations

import io

import pytest
from rich.console import Console

from sightline import report
from sightline.report.terminal import _cell

from .synthetic import make_look


def shown(look, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    report.show(look, console)
    return console.file.getvalue()


def test_answers_regions_sinks_and_heads_are_there(look):
    text = shown(look)
    assert "As it is        Yes, a red ball on the grass." in text
    assert "With var:p=0.6  Yes, one red ball beside a blue box." in text
    assert "lower right 39 % (182, 137, 298, 223)" in text
    assert "17 of 24" in text
    assert "150 (40), 17 (39)" in text
    assert "<s> (0)" in text
    assert "var.heads edited  14" in text
    assert "knows only the generated world" in text


def test_markup_and_control_characters_are_shown_not_obeyed():
    text = shown(make_look(("[red]x[/red]", " \x1b[31mz"), None, question="[bold]q[/bold] \x07"))
    assert text.count("[red]x[/red]") == 2  # in the answer and in the table
    assert "[bold]q[/bold]" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_blank_tokens_are_visible():
    assert _cell(" ") == "␣"
    assert _cell(" a") == " a"


def test_no_sinks_says_how_far_phi_reached():
    assert "none: phi reaches 3 on the picture, the threshold is 20" in shown(make_look(sinks=()))


def test_a_model_without_sink_dimensions_is_said_to_have_none():
    look = make_look(sinks=())
    for run in look.runs:
        run.phi[:] = 0
    assert "no dimension of the start token reaches the threshold 20" in shown(look)


def test_empty_and_long_answers():
    assert "(empty answer)" in shown(make_look((), None))
    text = shown(make_look(tuple(f" w{i}" for i in range(40)), None))
    assert "the 16 words that look most at the picture, of 40" in text


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals_do_not_overflow(look, width):
    assert max(map(len, shown(look, width).splitlines())) <= width

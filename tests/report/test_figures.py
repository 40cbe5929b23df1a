from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sightline.looking import Stage
from sightline.report import figures

from .synthetic import crops_layout, make_look

CASES = {
    "usual": {},
    "one token": {"pieces": ("Yes",), "changed": None},
    "empty": {"pieces": (), "changed": None},
    "no sinks": {"sinks": ()},
    "crops": {"layout": crops_layout((64, 40), [((0, 0, 64, 40), 4, 4), ((0, 0, 32, 40), 5, 4)]), "sinks": (3,)},
    "odd text": {"pieces": ("$x^", " $", " {的}\n"), "changed": None},
}


def pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["overlay", "words", "sinks", "heads", "masses"])
def test_every_figure_can_be_drawn(case, name):
    look = make_look(**CASES[case])
    figure = getattr(figures, name)(look, look.runs[0])
    assert isinstance(figure, Figure)
    assert pixels(figure).std() > 0


def test_overlay_is_brightest_where_the_word_looked(look):
    run = look.runs[0]
    right = figures._blend(look, figures._values(run, run.words[3], sinks=False), 320).astype(int)
    plain = figures._blend(look, None, 320).astype(int)
    change = np.abs(right - plain).sum(-1)
    assert change[150:220, 210:290].mean() > 3 * change[20:100, 200:300].mean()


def test_hidden_sinks_are_dark(look):
    run = look.runs[0]
    shown, hidden = (figures._values(run, None, sinks) for sinks in (True, False))
    assert shown[17] > 5 * hidden[17]


def test_ranks_ignore_scale_and_share_ties():
    heat = np.array([[0.0, 2.0], [2.0, 5.0]])
    assert figures._ranks(heat).tolist() == [[0, 1 / 3], [1 / 3, 5 / 6]]
    assert np.array_equal(figures._ranks(heat**3), figures._ranks(heat))
    assert not figures._ranks(np.zeros((2, 2))).any()


def test_titles_are_one_plain_line():
    assert figures._plain(" a\x15\n$x$ ", 20) == r"a \$x\$"
    assert figures._plain("word " * 9, 10) == "word word…"


def test_group_colours_differ_and_agree_with_the_page():
    colours = figures.group_colours(("start", "before", "image", "visual sink", "after", "generated"))
    assert len(set(colours)) == 6
    assert colours[2:4] == ["#e69f00", "#d55e00"]


@pytest.mark.parametrize("name", ["kept", "words", "sinks"])
def test_titles_lie_within_the_figure(name, look):
    kept = np.arange(len(look.layout)) % 4 == 0
    run = replace(look.runs[0], label="vtc-cls:keep=49,score=mean-received", words=look.runs[0].words[:1],
                  stages=(Stage("before the language model", kept),))  # fmt: skip
    figure = getattr(figures, name)(look, run)
    figure.draw_without_rendering()
    (x0, y0), (x1, y1) = figure._suptitle.get_window_extent().get_points()
    assert 0 <= x0 < x1 <= figure.bbox.width
    assert 0 <= y0 < y1 <= figure.bbox.height

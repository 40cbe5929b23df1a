"""The page in a real browser: clicks, keys, hash, small and dark screens, odd content."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from .synthetic import crops_layout, grid_layout, make_look

pytestmark = pytest.mark.browser

PRESSED = "[...document.querySelectorAll('.word[aria-pressed=true]')].map(b => b.textContent).join('|')"


def canvas(tab, name: str, panel: int = 0) -> np.ndarray:
    """(h, w, 4) of a canvas of a panel: "heat" or "marks"."""
    data = tab.js(f"document.querySelectorAll('canvas.{name}')[{panel}].toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"), dtype=int)


def heat(tab, panel: int = 0) -> np.ndarray:
    return canvas(tab, "heat", panel)


def side(picture: np.ndarray) -> str:
    """Where the heat lies: opacity of the ball's place against that of the box's."""
    h, w = picture.shape[:2]
    ball = picture[int(0.15 * h) : int(0.4 * h), int(0.12 * w) : int(0.33 * w), 3].mean()
    box = picture[int(0.65 * h) : int(0.9 * h), int(0.65 * w) : int(0.88 * w), 3].mean()
    return "ball" if ball > 1.5 * box else "box" if box > 1.5 * ball else "both"


def test_a_click_on_a_word_lights_up_its_place_in_both_panels(opened, look):
    tab = opened(look)
    assert side(heat(tab)) == "both"
    tab.mouse(".word[data-word='2']")
    assert tab.js(PRESSED) == "a|one"
    assert [side(heat(tab, i)) for i in (0, 1)] == ["ball", "ball"]
    tab.mouse(".word[data-word='3']")
    assert tab.js(PRESSED) == "red|red"
    assert [side(heat(tab, i)) for i in (0, 1)] == ["box", "box"]
    assert tab.js("location.hash") == "#word=3"
    tab.mouse(".word[data-word='3']")  # again: the whole answer
    assert tab.js(PRESSED) == ""


def test_heat_is_the_rank_of_the_attention(opened, look):
    tab = opened(look, "word=3&layer=1&head=2")
    row = look.runs[0].rows[3, 1, 2].astype(float).reshape(14, 14)
    picture = heat(tab)
    h, w = picture.shape[:2]
    middles = np.arange(14) + 0.5
    cells = picture[(middles * h / 14).astype(int)[:, None], (middles * w / 14).astype(int), 3]
    order = np.argsort(row.ravel())
    assert np.corrcoef(cells.ravel()[order], np.linspace(0, 1, 196) ** 1.3)[0, 1] > 0.99


def test_keys(opened, look):
    tab = opened(look)
    tab.key("ArrowRight")
    assert tab.js(PRESSED) == "Yes|Yes"
    tab.key("ArrowLeft")
    assert tab.js(PRESSED) == ".|."
    tab.key("ArrowUp")
    tab.key("ArrowUp")
    tab.key("]")
    assert tab.js("location.hash") == "#word=8&layer=1&head=0"
    assert tab.js("document.querySelector('#layer').value + document.querySelector('#head').value") == "10"
    tab.key("ArrowDown")
    tab.key("[")
    tab.key("s")
    assert tab.js("location.hash") == "#word=8&layer=0&hide=true"
    tab.key("?")
    assert tab.js("document.querySelector('#help').open")
    tab.key("Escape")
    assert not tab.js("document.querySelector('#help').open")
    tab.key("a")
    assert tab.js("location.hash") == "#hide=true"


def test_arrows_on_a_slider_move_the_slider_only(opened, look):
    tab = opened(look, "word=2")
    tab.js("document.querySelector('#layer').focus()")
    tab.key("ArrowRight")
    assert tab.js("location.hash") == "#word=2&layer=0"


def test_hiding_sinks_empties_their_cells_only(opened, look):
    tab = opened(look, "layer=4")
    before = heat(tab)
    h, w = before.shape[:2]
    y, x = int((17 // 14 + 0.5) * h / 14), int((17 % 14 + 0.5) * w / 14)
    assert before[y, x, 3] > 150
    tab.mouse("#hide")
    assert heat(tab)[y, x, 3] == 0
    tab.key("ArrowDown")  # layer 3
    tab.js("location.hash = '#layer=1&hide=1'")
    tab.settle()
    assert heat(tab)[y, x, 3] > 0  # no sinks in layer 1


def test_hover_tells_share_and_phi_in_both_panels(opened, look):
    tab = opened(look, "word=3&layer=4")
    tab.mouse(".stage", (17 % 14 + 0.5) / 14, (17 // 14 + 0.5) / 14, click=False)
    said = tab.js("[...document.querySelectorAll('.readout')].map(p => p.textContent)")
    row = look.runs[0].rows[3, 4].astype(float).mean(0)
    assert f"{100 * row[17] / row.sum():.0f} % of the attention on the picture" in said[0]
    assert "token 17 (row 1, column 3)" in said[0]
    assert "φ\u00a036.0, a sink" in said[0]
    assert "token 17" in said[1]


def test_sinks_are_outlined_for_the_chosen_layer(opened, look):
    tab = opened(look, "layer=4")
    assert (canvas(tab, "marks")[..., 3] > 0).sum() > 200
    tab.mouse("#marks")
    assert (canvas(tab, "marks")[..., 3] > 0).sum() == 0
    tab.mouse("#marks")
    tab.js("location.hash = '#layer=0'")
    tab.settle()
    assert (canvas(tab, "marks")[..., 3] > 0).sum() == 0


def test_bars_and_head_map_choose_layer_and_head(opened, look):
    tab = opened(look)
    tab.mouse("g.bar[data-layer='3'] rect:last-of-type")
    assert tab.js("location.hash") == "#layer=3"
    tab.mouse(".pick[data-layer='5'][data-head='0']")
    assert tab.js("location.hash") == "#layer=5&head=0"
    tab.mouse(".headmap", 60 / tab.js("document.querySelector('.headmap').clientWidth"), 0.02)
    assert tab.js("location.hash") == "#layer=0&head=0"
    parts = "[...g.querySelectorAll('rect:not(:last-of-type)')]"
    heights = f"{parts}.reduce((sum, part) => sum + Number(part.getAttribute('height')), 0)"
    bars = tab.js(f"[...document.querySelector('.bars').querySelectorAll('g.bar')].map(g => {heights})")
    assert len(bars) == 6
    assert bars == pytest.approx([100] * 6, abs=0.01)


def test_bars_are_the_masses_of_the_chosen_word_and_head(opened, look):
    tab = opened(look, "word=3&head=1")
    parts = (
        "[...document.querySelectorAll('.bars')[1].querySelectorAll('g.bar[data-layer=\"4\"] rect:not(:last-of-type)')]"
    )
    heights = tab.js(f"{parts}.map(part => Number(part.getAttribute('height')))")
    assert heights == pytest.approx(100 * look.runs[1].masses[3, 4, 1], abs=1)


def test_the_hash_restores_everything_and_nonsense_is_clamped(opened, look):
    tab = opened(look, "run=1&word=4&layer=2&head=1&scale=share&opacity=0.3&marks=false")
    assert tab.js(PRESSED) == "ball|ball"
    assert tab.js("document.querySelector('#scale').value") == "share"
    assert tab.js("document.querySelector('#opacity').value") == "30"
    tab.js("location.hash = '#word=999&layer=-7&head=77&run=9&__proto__=1&opacity=x'")
    tab.settle()
    assert tab.js(PRESSED) == ".|."


def test_tab_reaches_controls_then_one_word_per_answer(opened, look):
    tab = opened(look)
    tab.js("document.body.focus()")
    seen = []
    for _ in range(8):
        tab.key("Tab")
        seen.append(tab.js("document.activeElement.id || document.activeElement.className"))
    assert seen[:7] == ["all", "layer", "head", "hide", "help-open", "word", "word"]
    tab.key("Tab")
    tab.js("document.querySelector('.word').focus()")
    tab.key("Enter")
    assert tab.js(PRESSED) == "Yes|Yes"
    tab.key("ArrowRight")
    assert tab.js("document.activeElement.textContent") == ","


@pytest.mark.parametrize("size", [(1280, 900), (390, 844), (320, 568)])
def test_nothing_runs_over_the_side(opened, look, size):
    tab = opened(look, size=size)
    assert tab.js("document.documentElement.scrollWidth") <= size[0]
    tops = tab.js("[...document.querySelectorAll('.stage')].map(s => s.getBoundingClientRect().top)")
    two = tops[1] > tops[0] + 100
    assert two == (size[0] < 760)


def test_dark_and_light(opened, look):
    tab = opened(look)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = tab.js(colour)
    tab.size(1280, 900, dark=True)
    assert tab.js(colour) != light


ODD = {
    "one run": {"changed": None},
    "one token": {"pieces": ("Yes",), "changed": ("No",)},
    "empty": {"pieces": (), "changed": ("Yes",)},
    "both empty": {"pieces": (), "changed": None, "question": ""},
    "no sinks": {"sinks": ()},
    "separators": {"layout": grid_layout((320, 240), 12, 12, separators=True), "sinks": (12, 40)},
    "crops": {"layout": crops_layout((64, 40), [((0, 0, 64, 40), 4, 4), ((0, 0, 32, 40), 5, 4)]), "sinks": (3,)},
    "padding": {"layout": crops_layout((100, 30), [((0, -35, 100, 65), 8, 8)], separators=False), "sinks": (3,)},
    "one pixel": {"layout": grid_layout((1, 1), 4, 4), "sinks": (3,)},
    "scripts": {"pieces": ("نعم", " هناك"), "changed": ("是", "的", "🏀", "👩‍👩‍👧")},
    "markup": {"pieces": ("</script><img src=x onerror=document.title='owned'>",), "question": "<b onclick=alert(1)>"},
    "long": {"pieces": tuple(f" word{i}" for i in range(400)), "layers": 2, "heads": 2, "question": "Why? " * 4000},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_looks_open_without_an_error(opened, name):
    tab = opened(make_look(**ODD[name]))
    assert tab.js("document.documentElement.className") == "ready"
    for key in ("ArrowRight", "ArrowUp", "]", "s", "ArrowLeft", "ArrowLeft"):
        tab.key(key)
    assert tab.js("document.title") != "owned"
    assert tab.js("document.documentElement.scrollWidth") <= 1280


def test_right_to_left_answers_move_with_the_arrow(opened):
    tab = opened(make_look(("نعم", " هناك", " كرة"), None))
    tab.mouse(".word[data-word='0']")
    tab.key("ArrowLeft")
    assert tab.js(PRESSED) == "هناك"
    tab.key("ArrowRight")
    assert tab.js(PRESSED) == "نعم"


def test_crops_can_be_seen_alone(opened):
    layout = crops_layout((64, 40), [((0, 0, 64, 40), 4, 4), ((0, 0, 32, 40), 5, 4)])
    tab = opened(make_look(layout=layout, sinks=(3,)), "crop=1")
    picture = heat(tab)
    half = picture.shape[1] // 2
    assert picture[:, half + 1 :, 3].max() == 0
    assert picture[:, :half, 3].max() > 100


def test_a_word_without_a_counterpart_says_so(opened):
    tab = opened(make_look(("a", " red", " ball"), ("a", " ball")), "word=1")
    assert tab.js("document.querySelectorAll('.readout')[1].textContent") == "no counterpart in this answer"
    assert heat(tab, 1)[..., 3].max() == 0


def test_thinned_page_offers_only_the_heads_it_has(opened, look):
    tab = opened(look, "layer=5", budget=196 * 21 * 8)
    assert tab.js("document.querySelector('#head').max") == "0"
    tab.key("]")
    assert tab.js("location.hash") == "#layer=5&head=0"
    tab.key("ArrowDown")
    tab.key("ArrowDown")
    assert tab.js("location.hash") == "#layer=3"
    assert tab.js("document.querySelector('#head').disabled")


def test_moving_a_slider_is_quick(opened):
    words = tuple(f" w{i}" for i in range(64))
    tab = opened(make_look(words, words, layers=8, heads=8))
    script = """(async () => {
      const times = [], slider = document.querySelector('#layer');
      for (let i = 0; i < 24; i++) {
        const start = performance.now();
        slider.value = i % 9 - 1;
        slider.dispatchEvent(new Event('input'));
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        times.push(performance.now() - start);
      }
      return times.sort((a, b) => a - b)[12];
    })()"""
    assert tab.js(script) < 150  # milliseconds from input to the drawn frame, on a busy machine

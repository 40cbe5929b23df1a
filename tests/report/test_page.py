from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.looking import Word
from sightline.report import page

from .synthetic import make_look

EVIL = "</script><img src=x onerror=alert(1)><!--"


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def test_untrusted_text_stays_text():
    look = make_look((EVIL, " \u2028", " \ud800"), (EVIL + "'\"`",), question=EVIL)
    html = page.render(look)
    html.encode("utf-8")
    reader = Reader(html)
    assert EVIL in reader.text
    assert sum(tag == "script" for tag, _ in reader.tags) == 2
    images = [attrs for tag, attrs in reader.tags if tag == "img"]
    assert len(images) == 2
    assert all(attrs["src"].startswith("data:image/") for attrs in images)
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert EVIL in data_of(html)["runs"][0]["words"]


def test_nothing_is_loaded_from_outside(look):
    html = page.render(look)
    outside = [
        value
        for _, attrs in Reader(html).tags
        for name, value in attrs.items()
        if name in ("src", "href", "action", "poster", "data", "srcset") and not (value or "").startswith("data:")
    ]
    assert outside == []
    assert "@import" not in html
    assert "url(" not in html
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert "default-src 'none'" in html


def test_every_word_is_a_button_and_the_answer_reads_as_given(look):
    html = page.render(look)
    buttons = [a for tag, a in Reader(html).tags if tag == "button" and a.get("class") == "word"]
    assert len(buttons) == 9 + 10
    answer = re.search(r'<p class="answer".*?</p>', html, re.S).group(0)
    assert Reader(answer).text.strip() == "Yes, a red ball on the grass."


def test_sizes(look):
    assert len(page.render(look).encode()) < 400_000
    tokens = tuple(f" w{i}" for i in range(64))
    assert len(page.render(make_look(tokens, tokens, layers=8, heads=8)).encode()) < 3_000_000


def test_a_model_without_sink_dimensions_has_no_table_of_zeros():
    look = make_look(sinks=())
    assert "φ stays at or below τ" in page.render(look)
    for run in look.runs:
        run.phi[:] = 0
    html = page.render(look)
    assert "no dimension of its start token reaches the threshold" in html
    assert "largest φ on the picture" not in html


def test_thinned_pages_say_so(look):
    assert "averages over the 4 heads" in page.render(look, budget=30_000)
    assert "averages over" not in page.render(look)


@given(st.lists(st.text(alphabet="ab c\n.", max_size=4), max_size=6), st.text(alphabet="ab c\n.", max_size=20))
def test_segments_give_every_word_once_in_order(texts, answer):
    words = tuple(Word(t, i, i + 1) for i, t in enumerate(texts))
    parts = page.segments(answer, words)
    assert [i for _, i in parts if i >= 0] == list(range(len(words)))


@given(st.lists(st.text(alphabet="abc é的", min_size=1, max_size=4), max_size=8))
def test_segments_of_a_matching_answer_join_to_it(texts):
    words = tuple(Word(t, i, i + 1) for i, t in enumerate(texts))
    answer = " ".join(texts)
    assert "".join(text for text, _ in page.segments(answer, words)) == answer


def named(text: str) -> tuple[Word, ...]:
    return tuple(Word(t, i, i + 1) for i, t in enumerate(text.split()))


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("no dog", "yes dog", [0, 1]),
        ("a red ball", "a ball", [0, -1, 1]),
        ("a ball", "a red ball", [0, 2]),
        ("x y", "", [-1, -1]),
        ("x y z", "p q z", [0, 1, 2]),
    ],
)
def test_twins(first, second, pairs):
    assert page.twins(named(first), named(second)) == pairs


def test_settings_become_lines():
    nested = {"a": {"b": [1, 2], "c": []}, "d": "text", "e": None, "f": "x" * 700}
    lines = dict(page.flat(nested))
    assert lines["a.b"] == "[1, 2]"
    assert (lines["a.c"], lines["d"], lines["e"]) == ("none", "text", "none")
    assert lines["f"].startswith("x" * 600 + "…")


def test_direction():
    assert page.direction("نعم yes") == "rtl"
    assert page.direction("12 yes نعم") == "ltr"
    assert page.direction("") == "ltr"


def test_safe_json_has_no_markup_and_is_the_same_value():
    value = {"a": EVIL + "&\u2028\u2029é的"}
    text = page.safe_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value

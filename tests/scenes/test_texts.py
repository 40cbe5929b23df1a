"""Captions, mentions, questions and the word list against the truth, recomputed here."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import scenes
from sightline.errors import ParameterError, UnknownNameError
from sightline.scenes.asking import ASKERS

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = ["Zero.", "One.", "Two.", "Three.", "Four.", "Five."]
YES = {True: "Yes.", False: "No."}


@cache
def _scene(seed):
    return scenes.draw(seed)


def _rng(seed):
    return np.random.Generator(np.random.PCG64(seed))


def _named(scene, phrase):
    """The one object that "the (colour) kind" can mean."""
    *colour, kind = phrase.split()
    found = [o for o in scene.objects if o.kind == kind and colour in ([], [o.colour])]
    assert len(found) == 1, phrase
    return found[0]


def _expected(scene, question):
    """The answer, worked out from the words of the question alone."""
    text, kinds = question.text, [o.kind for o in scene.objects]
    if m := re.fullmatch(r"Is there an? (\w+) in the image\?", text):
        return YES[m[1] in kinds]
    if m := re.fullmatch(r"There is an? (\w+) in the image, isn't there\?", text):
        return YES[m[1] in kinds]
    if m := re.fullmatch(r"What colour is the (\w+)\?", text):
        return _named(scene, m[1]).colour.capitalize() + "."
    if m := re.fullmatch(r"The (\w+) is (\w+), isn't it\?", text):
        return YES[_named(scene, m[1]).colour == m[2]]
    if m := re.fullmatch(r"How many (\w+) are there\?", text):
        (kind,) = [k.name for k in scenes.KINDS.values() if k.plural == m[1]]
        return NUMBERS[kinds.count(kind)]
    if m := re.fullmatch(r"What colour is the mark on the ([\w ]+)\?", text):
        return _named(scene, m[1]).mark.capitalize() + "."
    if m := re.fullmatch(r"Is the ([\w ]+?) (left of|right of|above|below) the ([\w ]+)\?", text):
        return YES[_holds(_named(scene, m[1]), m[2], _named(scene, m[3]))]
    if m := re.fullmatch(r"Where is the ([\w ]+), (left or right of|above or below) the ([\w ]+)\?", text):
        a, b = _named(scene, m[1]), _named(scene, m[3])
        words = ("left of", "right of") if "left" in m[2] else ("above", "below")
        return next(w for w in words if _holds(a, w, b)).split()[0].capitalize() + "."
    assert text == "Where is this?"
    return f"{'An' if scene.context[0] in 'aeiou' else 'A'} {scene.context}."


def _holds(a, relation, b):
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (b.centre[axis] - a.centre[axis]) > 0


@settings(max_examples=120, deadline=None)
@given(SEEDS, st.booleans())
def test_every_answer_is_true(seed, traps):
    scene = scenes.draw(seed)
    asked = scenes.questions(scene, _rng(seed), 16, traps=traps)
    assert len({q.text for q in asked}) == len(asked) >= 5
    for question in asked:
        assert question.answer == _expected(scene, question), question.text
        word = question.answer.rstrip(".").lower()
        truth = NUMBERS.index(question.answer) if question.kind == "count" else word.removeprefix("a ")
        assert question.truth == str(truth)
        if question.kind != "detail":
            assert question.boxes == tuple(scene.objects[i].box for i in question.about)


@pytest.mark.parametrize("kind", list(ASKERS))
def test_only_the_kinds_asked_for_with_both_answers(kind):
    answers = set()
    for seed in range(60):
        asked = scenes.questions(_scene(seed), _rng(seed), 4, kinds=(kind,))
        assert {q.kind for q in asked} <= {kind}
        answers |= {q.answer for q in asked}
    least = {"exist": 2, "leading": 2, "relation": 6, "count": 5, "colour": 8, "detail": 8, "context": 8}
    assert len(answers) >= least[kind]


def test_yes_and_no_are_balanced():
    asked = [q for s in range(150) for q in scenes.questions(_scene(s), _rng(s), 5, ("exist", "leading"))]
    assert 0.43 < sum(q.truth == "yes" for q in asked) / len(asked) < 0.57


@pytest.mark.parametrize(("traps", "least", "most"), [(True, 0.5, 0.9), (False, 0.15, 0.4)])
def test_traps_lean_towards_what_the_place_suggests(traps, least, most):
    asked = [
        q.text.split()[3]
        for s in range(120)
        for q in scenes.questions(scenes.draw(s, context="kitchen"), _rng(s), 6, ("exist",), traps=traps)
        if q.truth == "no"
    ]
    home = {"cup", "plate", "bottle", "fork", "bowl", "table", "chair", "clock", "cat", "lamp"}
    assert least < np.mean([kind in home for kind in asked]) < most


def test_detail_questions_point_at_the_mark():
    for seed in range(60):
        scene = _scene(seed)
        for question in scenes.questions(scene, _rng(seed), 2, ("detail",)):
            (box,) = question.boxes
            assert box == scene.objects[question.about[0]].mark_box
            assert box[2] - box[0] < 8


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(0, 100))
def test_captions_mention_exactly_what_is_there(seed, r):
    scene = scenes.draw(seed)
    short, detailed = (scenes.caption(scene, _rng(r), style) for style in ("short", "detailed"))
    assert set(scenes.mentions(short)) == set(scene.counts())
    assert sorted(scenes.mentions(detailed)) == sorted(o.kind for o in scene.objects)
    for text in (short, detailed):
        assert scene.context in text
        assert re.fullmatch(r"([A-Z][a-z ,']*\. ?)+", text), text


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_detailed_captions_give_colours_and_places(seed):
    scene = scenes.draw(seed)
    text = scenes.caption(scene, _rng(seed), "detailed").lower()
    pattern = r"(small )?(\w+) (\w+) (?:is )?(?:at|on|in) the ((?:top|bottom)(?: left| right)?|left|right|middle)\b"
    said = {(bool(s), c, k, p) for s, c, k, p in re.findall(pattern, text)}
    expected = set()
    for o in scene.objects:
        row, column = (min(int(3 * o.centre[a] / scene.size), 2) for a in (1, 0))
        place = f"{['top', '', 'bottom'][row]} {['left', '', 'right'][column]}".strip() or "middle"
        expected.add((o.size == "small", o.colour, o.kind, place))
    assert said == expected


def test_short_captions_count():
    for seed in range(100):
        scene = _scene(seed)
        text = scenes.caption(scene, _rng(seed)).lower()
        for kind, n in scene.counts().items():
            noun = scenes.KINDS[kind].singular if n == 1 else scenes.KINDS[kind].plural
            number = "an?" if n == 1 else NUMBERS[n][:-1].lower()
            assert re.search(rf"\b{number} (\w+ )?{noun}\b", text), (text, kind, n)


def test_empty_scene_has_a_caption_and_questions():
    scene = scenes.draw(1, objects=(0, 0))
    assert scenes.mentions(scenes.caption(scene, _rng(0))) == []
    for question in scenes.questions(scene, _rng(0), 8):
        assert question.answer == _expected(scene, question)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Two mugs, a puppy and a bike.", ["cup", "dog", "bicycle"]),
        ("A MUG; a kitten's ball", ["cup", "cat", "ball"]),
        ("People and sheep, buses, dishes", ["person", "sheep", "bus", "plate"]),
        ("A cup next to a cup", ["cup", "cup"]),
        ("A cupboard with carpets, a pencil and a catalogue at the desk", []),
        ("", []),
    ],
)
def test_mentions(text, kinds):
    assert scenes.mentions(text) == kinds


def test_every_word_form_names_one_kind_only():
    forms = [w for k in scenes.KINDS.values() for w in {k.singular, k.plural, *k.synonyms}]
    assert len(forms) == len(set(forms))
    assert len(scenes.KINDS) >= 24
    assert len({k.category_id for k in scenes.KINDS.values()}) == len(scenes.KINDS)
    assert not set(forms) & {*scenes.CONTEXTS, *scenes.COLOURS}


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_word_list_is_complete(seed):
    scene, known = scenes.draw(seed), set(scenes.words())
    texts = [scenes.caption(scene, _rng(seed), s) for s in ("short", "detailed")] + list(scenes.PROMPTS.values())
    texts += [t for q in scenes.questions(scene, _rng(seed), 12) for t in (q.text, q.answer)]
    for text in texts:
        assert set(re.findall(r"[A-Za-z']+|[^\sA-Za-z']", text)) <= known


def test_bad_arguments():
    scene = scenes.draw(0)
    with pytest.raises(UnknownNameError, match="short"):
        scenes.caption(scene, _rng(0), "shrt")
    with pytest.raises(UnknownNameError, match="colour"):
        scenes.questions(scene, _rng(0), 3, ("color",))
    with pytest.raises(ParameterError):
        scenes.questions(scene, _rng(0), -1)

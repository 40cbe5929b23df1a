"""HAVEN: reading of answers and files, the bias score, and the questions on films."""

from __future__ import annotations

from collections import Counter

import pytest

from sightline import scenes
from sightline.errors import InputError, UnknownNameError
from sightline.evaluate import haven, world
from sightline.evaluate.haven import by_rule, is_inconsistent, options_of

ASKED = "What do they do with the strings? A. Tying hair. B. Sewing clothes. C. Binding boxes."


@pytest.fixture(scope="module")
def task():
    return world.build("haven", n=90, size=56)[0]


def test_options() -> None:
    assert options_of(ASKED) == {"A": "Tying hair", "B": "Sewing clothes", "C": "Binding boxes"}
    assert options_of("Which?\n(A) red\n(B) blue") == {"A": "red", "B": "blue"}
    assert options_of("Where is it? A A forest B A road C 2") == {"A": "A forest", "B": "A road", "C": "2"}
    assert options_of("Who? A.A man. B: Cat. C.A dog.D. None") == {"A": "A man", "B": "Cat", "C": "A dog", "D": "None"}
    assert options_of("Is it red?") == {}


@pytest.mark.parametrize(
    ("form", "wanted", "given", "right"),
    [
        ("multiple-choice", "B", "B", True),
        ("multiple-choice", "B", "(B) Sewing clothes", True),
        ("multiple-choice", "B", "The answer is B.", True),
        ("multiple-choice", "B", "They are sewing clothes.", True),
        ("multiple-choice", "B", "A. Tying hair", False),
        ("multiple-choice", "B", "A or B", False),
        ("multiple-choice", "B", "no answer", False),
        ("multiple-choice", "B", "A woman is sewing clothes", True),
        ("multiple-choice", "A or I don't know or No answer", "A", True),
        ("multiple-choice", "A or I don't know or No answer", "I cannot tell", True),
        ("multiple-choice", "A or I don't know or No answer", "C", False),
        ("multiple-choice", "Both A and B is wrong. No answer", "A", False),
        ("multiple-choice", "Both A and B is wrong. No answer", "Neither of them", True),
        ("binary", "no/i don't know", "I don't know.", True),
        ("binary", "no/i don't know", "No.", True),
        ("binary", "no/i don't know", "Yes.", False),
        ("binary", "no answer", "No.", False),
        ("binary", "No", "no answer", False),
        ("binary", "No", "No, it is not visible.", True),
        ("binary", "Yes", "Yes, they are.", True),
        ("binary", "No", "I think no", True),
        ("binary", "No", "Nothing", False),
        ("short", "Red", "It is red.", True),
        ("short", "two", "2 cups", True),
        ("short", "red", "reddish", False),
    ],
)
def test_the_judge_by_rule(form, wanted, given, right) -> None:
    assert by_rule(form, ASKED, wanted, given) == right


def row(correct: bool, group: str = "g", **more):
    base = {"question": "?", "truth": "yes", "answer": "yes" if correct else "no", "picture": "p"}
    return base | {"cause": "prior", "aspect": "object", "form": "binary", "group": group} | more


def test_bias_is_the_share_of_inconsistent_groups() -> None:
    assert not is_inconsistent([True, True, True])
    assert not is_inconsistent([False, False])
    assert is_inconsistent([True, False])
    assert is_inconsistent([True, True, False])
    rows = [row(True), row(False), row(True, "h"), row(True, "h"), row(False, "alone")]
    found = haven.score(rows)
    assert found["bias"] == found["bias_binary"] == 0.5  # groups g: 1, h: 0; a group of one does not count
    assert found["accuracy"] == found["accuracy_prior"] == 3 / 5
    more = [row(k == 0, "three", form="short", truth="yes") for k in range(3)]
    found = haven.score(rows + more)
    assert (found["bias_binary"], found["bias_short"]) == (0.5, 1)
    assert found["bias"] == pytest.approx(2 / 3)
    assert haven.score(rows, judge=lambda *_: True)["accuracy"] == 1
    with pytest.raises(UnknownNameError, match="capability"):
        haven.score([row(True, cause="capabilty")])


def test_published_items_are_read() -> None:
    item = {"Index": 3, "Question": ASKED, "Answer": "C", "Causes": "Conflict with prior", "Aspects": "Event",
            "Form": "Multiple-choice", "Begin": "0:29", "End": "0:40", "Video Path": "Coin2", "Group_id": "g2"}  # fmt: skip
    (found,) = haven.read([item])
    assert (found["cause"], found["aspect"], found["form"]) == ("prior", "event", "multiple-choice")
    assert found["prompt"].startswith("The following is a multiple-choice question.")
    assert haven.read([item | {"Causes": "In-context conflict", "Form": "Short-answer"}])[0]["cause"] == "in-context"
    with pytest.raises(InputError, match="Form"):
        haven.read([{k: v for k, v in item.items() if k != "Form"}])
    with pytest.raises(InputError, match="names no"):
        haven.read([item | {"Aspects": "Mood"}])


def test_questions_on_films_are_complete_and_true(task) -> None:
    kinds = Counter((item.tags["cause"], item.tags["aspect"]) for item in task.items)
    assert len(kinds) == 9
    assert {item.tags["form"] for item in task.items} == set(haven.FORMS)
    groups = Counter(item.tags["group"] for item in task.items)
    assert set(groups.values()) <= {4, 5}

    def truthful(item):
        return item.truth

    full = task.score(task.items, [{"answer": truthful(item)} for item in task.items])
    assert full["accuracy"] == 1
    assert full["bias"] == 0
    yes = task.score(task.items, [{"answer": "yes"} for item in task.items])
    assert yes["accuracy_binary"] == 0.5
    for item in task.items:
        film = scenes.film(item.tags["film"], size=56, frames=8)
        if item.tags["form"] == "short" and "What colour" in item.tags["asked"]:
            kind = item.tags["asked"].split("What colour is the ")[1].rstrip("?")
            assert [t.colour for t in film.tracks if t.kind == kind] == [item.truth]
        if item.tags["form"] == "short" and "Where does" in item.tags["asked"]:
            assert film.context == item.truth
    assert world.build("haven", n=90, size=56)[0].facts() == task.facts()

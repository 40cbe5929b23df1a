"""HAVEN: hallucination in video understanding, by cause, aspect and form; and how consistent the answers are.

Gao et al., 2025, arXiv 2503.19622; official code Hongcheng-Gao/HAVEN. Questions come in groups: variants of one question
(options in another order, yes and no exchanged) share a group. Accuracy is the mean over questions, also of every cause,
aspect and form. The bias score is the share of the groups of two and more whose variants are not all answered alike, that is
all right or all wrong (the paper's section 3.5, "the frequency of inconsistent responses among the variants of a question"); 0
where a model is consistent. It is told for all groups and per form.

The published judge is a language model. Here a judge is any callable (`Judge`); the default reads answers by rule: a letter or
an option's text, yes or no, and for short answers whether the wanted words are in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sightline.errors import InputError, UnknownNameError, nearest
from sightline.evaluate.scored import Scored, same_length
from sightline.evaluate.stats import Sums, Tally, ratio
from sightline.evaluate.vqa import normalise

CAUSES = ("prior", "in-context", "capability")
ASPECTS = ("object", "scene", "event")
FORMS = ("binary", "multiple-choice", "short")
WORDS = {"prior": "prior", "context": "in-context", "capab": "capability", "object": "object", "scene": "scene",
         "event": "event", "binary": "binary", "multiple": "multiple-choice", "short": "short"}  # fmt: skip
PROMPTS = {  # the wording is part of the protocol
    "multiple-choice": "The following is a multiple-choice question. Please choose one of the following options. \n{}",
    "binary": "Please answer the following yes/no question. \n{}",
    "short": "{}",
}
Judge = Callable[[str, str, str, str], bool]  # (form, question, wanted answer, given answer) -> whether it is right
LETTER = re.compile(r"\(?\b([A-F])\b\)?(?=[\s.):,]|$)")
FIRST = re.compile(r"\(?([A-F])(?:[.):,]|\)?\s*$)")  # an answer that begins with a letter, not with the word "A"
MARKS = (r"(?<![A-Za-z]){}\s*[.):]\s*", r"(?<=\s){}\s+")  # "A. Red", or as some published questions have it, "A Red"
UNKNOWN = re.compile(
    r"\b(no answer|(?:don't|do not|cannot) (?:know|tell)|not visible|none of|neither)\b", re.IGNORECASE
)


def options_of(question: str) -> dict[str, str]:
    """Letter -> text of the options behind a multiple-choice question: "Which? A. Red. B. Blue."."""
    for mark in MARKS:
        found, at = [], question.find("?") + 1
        for letter in "ABCDEF":
            place = re.compile(mark.format(letter)).search(question, at)
            if place is None:
                break
            found.append(place)
            at = place.end()
        if len(found) > 1:
            ends = [place.start() for place in found[1:]] + [len(question)]
            texts = [
                question[place.end() : end].strip(" \n(").rstrip(".") for place, end in zip(found, ends, strict=True)
            ]
            return dict(zip("ABCDEF", texts, strict=False))
    return {}


def by_rule(form: str, question: str, wanted: str, given: str) -> bool:
    """The default judge. `wanted` of a choice is its letter, alone or with the option's text; several may be joined by "or"
    or "/", and "no answer" or "I don't know" may be among them."""
    wanted_parts = [part.strip(" .").lower() for part in re.split(r"/|\bor\b", wanted)]
    nothing = UNKNOWN.search(wanted) is not None
    if form == "short":
        return f" {normalise(wanted)} " in f" {normalise(given)} " or (nothing and UNKNOWN.search(given) is not None)
    if form == "binary":
        said = re.search(r"\b(yes|no)\b(?! answer)", given.lower())
        return said[1] in wanted_parts if said else nothing and UNKNOWN.search(given) is not None
    right = {part.upper() for part in wanted_parts if len(part) == 1} if nothing else {wanted.strip()[:1].upper()}
    options, letter = options_of(question), FIRST.match(given.strip())
    if letter is not None and letter[1] in options:
        return letter[1] in right
    named = [key for key, text in options.items() if f" {normalise(text)} " in f" {normalise(given)} "]
    if len(named) == 1:
        return named[0] in right
    if UNKNOWN.search(given):
        return nothing
    letters = {found for found in LETTER.findall(given) if found in options}
    return len(letters) == 1 and letters <= right


def is_inconsistent(correct: Sequence[bool]) -> bool:
    """Whether some of a group's variants are answered correctly and others not."""
    return len(set(correct)) > 1


def formulas(sums: Sums, parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Accuracy, over all and per part; bias score in [0, 1]."""
    found = {"accuracy": ratio(sums["correct"], sums["n"]), "bias": ratio(sums["bias"], sums["groups"])}
    for part in parts:
        found[f"accuracy_{part}"] = ratio(sums[f"correct:{part}"], sums[f"n:{part}"])
        if f"groups:{part}" in sums:
            found[f"bias_{part}"] = ratio(sums[f"bias:{part}"], sums[f"groups:{part}"])
    return found


def score(rows: Sequence[Mapping[str, Any]], judge: Judge = by_rule) -> Scored:
    """Score rows {"question", "truth", "answer", "cause", "aspect", "form", "group", "picture"}.

    Raises:
        InputError: nothing to score. UnknownNameError: an unknown cause, aspect or form.
    """
    same_length(rows=rows)
    for row in rows:
        for key, known in (("cause", CAUSES), ("aspect", ASPECTS), ("form", FORMS)):
            if row[key] not in known:
                raise UnknownNameError(f"unknown {key} {row[key]!r}: {nearest(str(row[key]), list(known))}")
    correct = [judge(row["form"], row["question"], row["truth"], row["answer"]) for row in rows]
    groups: dict[str, list[bool]] = {}
    owner: dict[str, tuple[str, str]] = {}  # picture and form of a group's first question
    counts: list[tuple[str, dict[str, float]]] = []
    for row, right in zip(rows, correct, strict=True):
        groups.setdefault(row["group"], []).append(right)
        owner.setdefault(row["group"], (row["picture"], row["form"]))
        numbers: dict[str, float] = {"n": 1, "correct": right, "bias": 0, "groups": 0}
        for key in ("cause", "aspect", "form"):
            numbers |= {f"n:{row[key]}": 1, f"correct:{row[key]}": right}
        counts.append((row["picture"], numbers))
    for group, answers in groups.items():
        if len(answers) > 1:
            (picture, form), bias = owner[group], is_inconsistent(answers)
            counts.append((picture, {"bias": bias, "groups": 1, f"bias:{form}": bias, f"groups:{form}": 1}))
    parts = tuple(dict.fromkeys(row[key] for key in ("cause", "aspect", "form") for row in rows))
    shares = [("accuracy", "correct", "n"), *((f"accuracy_{p}", f"correct:{p}", f"n:{p}") for p in parts)]
    tally = Tally.collect(counts, partial(formulas, parts=parts), shares)
    rules = {"judge": "by rule" if judge is by_rule else "given", "bias": "share of groups answered inconsistently"}
    return Scored(tally.metrics(), tuple(correct), tally, "accuracy", rules=rules)


def read(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Questions of the published JSON (Index, Question, Answer, Causes, Aspects, Form, Video Path, Group_id, ...).

    Returns:
        Per question {"id", "question", "prompt", "truth", "cause", "aspect", "form", "group", "picture", "begin", "end"}.

    Raises:
        InputError: an item lacks a field, or one holds an unknown name.
    """
    found = []
    for k, item in enumerate(items):
        missing = [key for key in ("Question", "Answer", "Causes", "Aspects", "Form", "Group_id") if key not in item]
        if missing:
            raise InputError(
                f"HAVEN item {k + 1} has no {missing[0]!r}: it needs Question, Answer, Causes, Aspects, Form"
            )
        kinds = [_name(k, item[key]) for key in ("Causes", "Aspects", "Form")]
        row = dict(zip(("cause", "aspect", "form"), kinds, strict=True))
        row |= {"id": str(item.get("Index", k)), "question": item["Question"], "truth": str(item["Answer"])}
        row |= {"prompt": PROMPTS[row["form"]].format(item["Question"]), "group": str(item["Group_id"])}
        found.append(
            row | {"picture": str(item.get("Video Path", k)), "begin": item.get("Begin"), "end": item.get("End")}
        )
    return found


def _name(k: int, text: str) -> str:
    """The short name of a cause, aspect or form of a file."""
    found = [short for word, short in WORDS.items() if word in str(text).lower()]
    if not found:
        raise InputError(f"HAVEN item {k + 1}: {text!r} names no cause, aspect or form")
    return found[0]

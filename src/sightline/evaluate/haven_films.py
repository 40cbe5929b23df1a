"""HAVEN's questions on films of the generated world: three causes, three aspects, three forms, in groups of variants.

- prior: the truth is what the place does not suggest (a thing that belongs elsewhere, a bed that moves);
- in-context: the question claims something false before it asks;
- capability: counting over time, passing, order.

A group holds two yes-or-no questions of opposite answers, two orders of the same three options, and the open question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from sightline import scenes
from sightline.evaluate import haven
from sightline.evaluate.films import FRAMES, draw, opened
from sightline.evaluate.scored import Scored
from sightline.evaluate.task import Answer, Item, Task, check_items
from sightline.scenes.asking import choose, phrase
from sightline.scenes.contexts import CONTEXTS, likely
from sightline.scenes.film import Film
from sightline.scenes.naming import NUMBERS, sentence, with_article
from sightline.scenes.splits import SPLITS

if TYPE_CHECKING:
    from sightline.evaluate.world import World

TOKENS = 24
RESTING = ("furniture", "plant", "kitchen", "desk")  # supercategories of what one does not expect to move
DOINGS = {"still": "stays where it is", "moves": "moves about", "enters": "comes in from the side",
          "leaves": "goes out to the side", "appears": "suddenly appears", "vanishes": "suddenly vanishes"}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """Something true of a film: `question` open, `claim(answer)` the same as yes or no; `wrong` at least two answers."""

    question: str
    truth: str
    wrong: tuple[str, ...]
    claim: Callable[[str], str]


def _object_prior(film: Film, rng: np.random.Generator) -> Fact | None:
    """A thing that does not belong to the place, against those that do and are absent."""
    present = set(film.counts())
    expected = [k for k, _ in sorted(likely(CONTEXTS[film.context], present).items(), key=lambda pair: -pair[1])]
    odd = sorted(k for k in present if k not in CONTEXTS[film.context].weights)
    if not odd or len(expected) < 2:
        return None
    wrong = tuple(expected[:3])
    return Fact("Which of these things is in the video?", choose(rng, odd), wrong,
                lambda k: f"Is there {with_article(k)} in the video?")  # fmt: skip


def _colour(film: Film, rng: np.random.Generator, before: bool) -> Fact | None:
    unique = [t for t in film.tracks if film.counts()[t.kind] == 1]
    if not unique:
        return None
    track = choose(rng, unique)
    others = [c for c in scenes.COLOURS if c != track.colour]
    wrong = tuple(others[int(k)] for k in rng.permutation(len(others))[:3])
    said = f"The {track.kind} in the video is {wrong[0]}. Look closely. " if before else ""
    return Fact(f"{said}What colour is the {track.kind}?", track.colour, wrong,
                lambda c: f"{said}Is the {track.kind} {c}?")  # fmt: skip


def _number(film: Film, rng: np.random.Generator) -> Fact | None:
    when = choose(rng, ("start", "end"))
    frame = 0 if when == "start" else len(film) - 1
    kind = choose(rng, sorted(film.counts())) if film.tracks else None
    if kind is None:
        return None
    true, plural = film.counts(frame).get(kind, 0), scenes.KINDS[kind].plural
    wrong = tuple(NUMBERS[n] for n in (true + 1, true + 2, true - 1) if n >= 0)
    return Fact(f"How many {plural} are there at the {when} of the video?", NUMBERS[true], wrong,
                lambda n: f"Is the number of {plural} at the {when} of the video {n}?")  # fmt: skip


def _place(film: Film, rng: np.random.Generator, before: bool) -> Fact | None:
    others = [name for name in CONTEXTS if name != film.context]
    wrong = tuple(others[int(k)] for k in rng.permutation(len(others))[:3])
    foreign = any(k not in CONTEXTS[film.context].weights for k in film.counts())
    if not before and not foreign:  # nothing in it suggests another place
        return None
    said = f"This video was taken in {with_article(wrong[0])}. Look closely. " if before else ""
    return Fact(f"{said}Where does the video take place?", film.context, wrong,
                lambda name: f"{said}Does the video take place in {with_article(name)}?")  # fmt: skip


def _crowd(film: Film, rng: np.random.Generator) -> Fact | None:
    true = sum(film.counts(len(film) - 1).values())
    wrong = tuple(NUMBERS[n] for n in (true + 1, true - 1, true + 2) if n >= 0)
    return Fact("How many things are in view at the end of the video?", NUMBERS[true], wrong,
                lambda n: f"Is the number of things in view at the end of the video {n}?")  # fmt: skip


def _doing(film: Film, rng: np.random.Generator, before: bool) -> Fact | None:
    """What a thing does: of one that moves against expectation, or with a false claim before."""
    named = [t for i, t in enumerate(film.tracks) if phrase(film, i)]
    if not before:
        named = [t for t in named if (scenes.KINDS[t.kind].supercategory in RESTING) == (t.direction is not None)]
    if not named:
        return None
    track = choose(rng, named)
    name = phrase(film, film.tracks.index(track))
    others = [text for path, text in DOINGS.items() if path != track.path]
    wrong = tuple(others[int(k)] for k in rng.permutation(len(others))[:3])
    said = f"In the video {name} {wrong[0]}. Look closely. " if before else ""
    return Fact(f"{said}What happens to {name}?", f"it {DOINGS[track.path]}", tuple(f"it {w}" for w in wrong),
                lambda text: f"{said}Is it true of {name} that {text}?")  # fmt: skip


def _first(film: Film, rng: np.random.Generator) -> Fact | None:
    """Which of three comes into view first."""
    named = [(t.first, phrase(film, i)) for i, t in enumerate(film.tracks) if phrase(film, i) and t.first > 0]
    named.sort()
    if len(named) < 2 or named[1][0] - named[0][0] < 1:
        return None
    absent = [k for k in scenes.KINDS if k not in film.counts()]
    wrong = (named[1][1], f"the {choose(rng, absent)}")
    return Fact("Which of these comes into view first?", named[0][1], wrong,
                lambda name: f"Is {name} the first to come into view?")  # fmt: skip


FACTS: dict[tuple[str, str], Callable[[Film, np.random.Generator], Fact | None]] = {
    ("prior", "object"): _object_prior,
    ("prior", "scene"): lambda film, rng: _place(film, rng, False),
    ("prior", "event"): lambda film, rng: _doing(film, rng, False),
    ("in-context", "object"): lambda film, rng: _colour(film, rng, True),
    ("in-context", "scene"): lambda film, rng: _place(film, rng, True),
    ("in-context", "event"): lambda film, rng: _doing(film, rng, True),
    ("capability", "object"): _number,
    ("capability", "scene"): _crowd,
    ("capability", "event"): _first,
}


def variants(fact: Fact, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """(form, question, truth) of every variant of a group."""
    yield "binary", fact.claim(fact.truth), "yes"
    yield "binary", fact.claim(fact.wrong[0]), "no"
    options = [fact.truth, *fact.wrong[:2]]
    first = [int(k) for k in rng.permutation(3)]
    for order in (first, first[1:] + first[:1]):
        listed = " ".join(f"{letter}. {sentence(options[k])}" for letter, k in zip("ABC", order, strict=True))
        yield "multiple-choice", f"{fact.question} {listed}", "ABC"[order.index(0)]
    if "these" not in fact.question:
        yield "short", fact.question, fact.truth


def build(world: World, n: int, frames: int = FRAMES) -> Task:
    """At least `n` questions: groups of up to five, the nine pairs of cause and aspect in equal parts."""
    groups = max(1, -(-n // (5 * len(FACTS))))
    left = dict.fromkeys(FACTS, groups)
    items: list[Item] = []
    for seed in count(SPLITS[world.split][0]):
        film = draw(seed, size=world.size, frames=frames)
        rng = np.random.Generator(np.random.PCG64([world.seed, seed, 8]))
        for (cause, aspect), make in FACTS.items():
            fact = make(film, rng) if left[cause, aspect] and film.tracks else None
            if fact is None or len(fact.wrong) < 2:
                continue
            left[cause, aspect] -= 1
            group = f"{film.seed}-{cause}-{aspect}"
            for k, (form, text, truth) in enumerate(variants(fact, rng)):
                tags = {"film": seed, "cause": cause, "aspect": aspect, "form": form, "group": group, "asked": text}
                items.append(Item(f"{group}-{k}", film.name, haven.PROMPTS[form].format(text), truth, tags))
        if not any(left.values()):
            break
    return Task(
        "scenes_haven",
        f"{world.source}, {frames} frames",
        check_items("haven", items),
        partial(opened, world.size, frames),
        score,
        TOKENS,
    )


def score(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """HAVEN's metrics with the judge by rule."""
    keys = ("cause", "aspect", "form", "group")
    rows = [
        {**{key: item.tags[key] for key in keys}, "question": item.tags["asked"], "truth": item.truth,
         "answer": answer["answer"], "picture": item.picture}
        for item, answer in zip(items, answers, strict=True)
    ]  # fmt: skip
    return haven.score(rows)

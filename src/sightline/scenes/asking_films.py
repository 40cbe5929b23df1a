"""Questions with exact answers about a film: order, count over time, motion, passing, presence at the end.

A thing is named by its kind, with its colour where the kind comes twice; who cannot be told apart so is not asked about.
What lies between "happened" and "did not happen" (a thing half covered at some moment, two moments close together) is not
asked about either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sightline.scenes.asking import Question, choose, phrase, take_turns
from sightline.scenes.contexts import pick
from sightline.scenes.film import Film, Track
from sightline.scenes.kinds import KINDS
from sightline.scenes.moving import BESIDE
from sightline.scenes.naming import NUMBERS, sentence

SHIFT = 0.05  # least way, as a share of the picture, that what shows of a thing must be seen to go
APART = 0.1  # least distance of two moments, as a share of the film, for their order to be asked about
WAYS = {"left": "left or right", "right": "left or right", "up": "up or down", "down": "up or down"}


def _named(film: Film) -> list[int]:
    """The tracks that a phrase tells from all others."""
    return [i for i in range(len(film.tracks)) if phrase(film, i)]


def _yes(kind: str, text: str, truth: bool, about: Sequence[int], frames: Sequence[int]) -> Question:
    word = "yes" if truth else "no"
    return Question(kind, text, sentence(word), word, tuple(about), frames=tuple(frames))


def _order(film: Film, rng: np.random.Generator) -> Question | None:
    """Which of two things comes, or goes, first."""
    coming, least = rng.random() < 0.6, max(2, APART * len(film))
    moments = {i: film.tracks[i].first if coming else film.tracks[i].last for i in _named(film)}
    moved = [i for i, at in moments.items() if at != (0 if coming else len(film) - 1)]
    pairs = [(i, j) for i in moved for j in moved if moments[j] - moments[i] >= least]
    if not pairs:
        return None
    early, late = choose(rng, pairs)
    frames = tuple(moments[i] + (0 if coming else 1) for i in (early, late))
    first, second = (early, late) if rng.random() < 0.5 else (late, early)
    one, two = phrase(film, first), phrase(film, second)
    if rng.random() < 0.5:
        verb = "come into view" if coming else "go out of view"
        return _yes("order", f"Does {one} {verb} before {two}?", first == early, (first, second), frames)
    verb = "comes into view" if coming else "goes out of view"
    said = phrase(film, early)
    return Question(
        "order", f"Which {verb} first, {one} or {two}?", sentence(said), said[4:], (first, second), frames=frames
    )


def _count(film: Film, rng: np.random.Generator) -> Question | None:
    """How many of a kind at the start, at the end, or in all; kinds whose number changes are asked about more."""
    start, end, whole = film.counts(0), film.counts(len(film) - 1), film.counts()
    weights = {k: 1.0 + 2.0 * (start.get(k, 0) != end.get(k, 0)) + 0.5 * (n - 1) for k, n in whole.items()}
    if not weights:
        return None
    kind = pick(rng, weights)
    mine = tuple(i for i, track in enumerate(film.tracks) if track.kind == kind)
    when = choose(rng, ("start", "end", "whole"))
    plural = KINDS[kind].plural
    if when == "whole":
        text, number = f"How many different {plural} are there in the whole video?", whole[kind]
        frames = tuple(sorted({film.tracks[i].first for i in mine}))
    else:
        text = f"How many {plural} are there at the {when} of the video?"
        number, frames = (start if when == "start" else end).get(kind, 0), (0 if when == "start" else len(film) - 1,)
    return Question("count", text, sentence(NUMBERS[number]), str(number), mine, frames=frames)


def _travel(track: Track) -> float:
    """How far what shows of a thing goes its way between the first and the last frame in which it is in view, pixels."""
    if track.direction is None:
        return 0.0
    first, last, axis = track.boxes[track.first], track.boxes[track.last], int(track.direction in ("up", "down"))
    way = (last[axis] + last[axis + 2] - first[axis] - first[axis + 2]) / 2
    return way if track.direction in ("right", "down") else -way


def _motion(film: Film, rng: np.random.Generator) -> Question | None:
    """Which way a thing moves, or whether it does."""
    named = _named(film)
    going = [i for i in named if _travel(film.tracks[i]) >= SHIFT * film.size]
    still = [i for i in named if film.tracks[i].path == "still"]
    if going and rng.random() < 0.6:
        i = choose(rng, going)
        track = film.tracks[i]
        text = f"Which way does {phrase(film, i)} move, {WAYS[track.direction]}?"
        return Question(
            "motion", text, sentence(track.direction), track.direction, (i,), frames=(track.first, track.last)
        )
    if not (going and still):  # else the film alone would give the answer away
        return None
    truth = rng.random() < 0.5
    i = choose(rng, going if truth else still)
    track = film.tracks[i]
    return _yes("motion", f"Does {phrase(film, i)} move?", truth, (i,), (track.first, track.last))


def _passing(film: Film, rng: np.random.Generator) -> Question | None:
    """Whether a thing that moves passes behind another."""
    named = set(_named(film))
    happened = {(e.track, e.other): e.frame for e in film.events if e.what == "passes behind"}
    yes = [pair for pair in happened if named.issuperset(pair)]
    no = [
        (i, j)
        for i in sorted(named)
        for j in sorted(named)
        if i != j and film.tracks[i].direction and film.covers[i, j] <= BESIDE
    ]
    if not (yes and no):
        return None
    truth = rng.random() < 0.5
    i, j = choose(rng, yes if truth else no)
    frames = (happened[i, j],) if truth else (film.tracks[i].first, film.tracks[i].last)
    return _yes("passing", f"Does {phrase(film, i)} pass behind {phrase(film, j)}?", truth, (i, j), frames)


def _presence(film: Film, rng: np.random.Generator) -> Question | None:
    """Whether a thing is still in view, or was in view from the start."""
    named, last, at_end = _named(film), len(film) - 1, rng.random() < 0.5
    here, there = (0, last) if at_end else (last, 0)
    seen = [i for i in named if film.tracks[i].in_view(here)]
    stays, goes = ([i for i in seen if film.tracks[i].in_view(there) == truth] for truth in (True, False))
    if not (stays and goes):
        return None
    truth = rng.random() < 0.5
    i = choose(rng, stays if truth else goes)
    text = (
        f"Is {phrase(film, i)} still in view at the end?" if at_end else f"Is {phrase(film, i)} there from the start?"
    )
    return _yes("presence", text, truth, (i,), (there,))


FILM_ASKERS: dict[str, Callable[[Film, np.random.Generator], Question | None]] = {
    "order": _order,
    "count": _count,
    "motion": _motion,
    "passing": _passing,
    "presence": _presence,
}


def film_questions(
    film: Film, rng: np.random.Generator, n: int, kinds: Sequence[str] = tuple(FILM_ASKERS)
) -> list[Question]:
    """Up to `n` different questions about a film, taking the kinds in turn in a random order.

    Fewer come back where the film has no more to ask (nothing moves, nobody comes or goes, ...).
    Raises UnknownNameError or ParameterError as `questions` does.
    """
    return take_turns(FILM_ASKERS, film, rng, n, kinds)

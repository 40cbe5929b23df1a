"""Questions with exact answers about a scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sightline.errors import ParameterError, UnknownNameError, nearest
from sightline.scenes.contexts import CONTEXTS, likely, pick, sample_colour
from sightline.scenes.kinds import KINDS
from sightline.scenes.naming import NUMBERS, sentence, with_article
from sightline.scenes.scene import Scene

if TYPE_CHECKING:
    from sightline.scenes.film import Film

Box = tuple[float, float, float, float]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """`answer` is a short sentence ("Yes.", "Red.", "Two."), `truth` its normalised label ("yes", "red", "2").

    `about` are indices into `scene.objects`, `boxes` the places one has to look at (a mark's own box for "detail").
    Of a film, `about` are tracks and `frames` the moments that decide the answer; `boxes` is then empty.
    """

    kind: str
    text: str
    answer: str
    truth: str
    about: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    frames: tuple[int, ...] = ()


def _yes(kind: str, text: str, truth: bool, scene: Scene, about: Sequence[int]) -> Question:
    word = "yes" if truth else "no"
    return Question(kind, text, sentence(word), word, tuple(about), tuple(scene.objects[i].box for i in about))


def phrase(scene: Scene | Film, i: int) -> str | None:
    """ "the cup" if it is the only one, "the red cup" if the only red one, else None."""
    thing = scene.objects[i]
    same = [other for other in scene.objects if other.kind == thing.kind]
    if len(same) == 1:
        return f"the {thing.kind}"
    if sum(other.colour == thing.colour for other in same) == 1:
        return f"the {thing.colour} {thing.kind}"
    return None


def _unique(scene: Scene) -> list[int]:
    """Indices of objects whose kind occurs once."""
    counts = scene.counts()
    return [i for i, thing in enumerate(scene.objects) if counts[thing.kind] == 1]


def choose(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


Absent = Callable[[Scene, np.random.Generator], str]


def any_absent(scene: Scene, rng: np.random.Generator) -> str:
    """A kind that is not there, each as likely."""
    present = set(scene.counts())
    return choose(rng, [kind for kind in KINDS if kind not in present])


def absent_kind(scene: Scene, rng: np.random.Generator) -> str:
    """A kind that is not there: half the time any, half the time one that the place and its objects suggest."""
    expected = likely(CONTEXTS[scene.context], set(scene.counts()))
    if expected and rng.random() < 0.5:
        return pick(rng, expected)
    return any_absent(scene, rng)


def _exist(scene: Scene, rng: np.random.Generator, absent: Absent = absent_kind) -> Question | None:
    truth = bool(scene.objects) and rng.random() < 0.5
    kind = choose(rng, list(scene.counts())) if truth else absent(scene, rng)
    about = [i for i, thing in enumerate(scene.objects) if thing.kind == kind]
    return _yes("exist", f"Is there {with_article(kind)} in the image?", truth, scene, about)


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = _unique(scene)
    if not unique:
        return None
    i = choose(rng, unique)
    thing = scene.objects[i]
    text = f"What colour is the {thing.kind}?"
    return Question("colour", text, sentence(thing.colour), thing.colour, (i,), (thing.box,))


def _count(scene: Scene, rng: np.random.Generator, absent: Absent = absent_kind) -> Question | None:
    counts = scene.counts()
    weights = {kind: float(n) ** 1.5 for kind, n in counts.items() if n <= 5}
    kind = pick(rng, weights) if weights and rng.random() < 0.85 else absent(scene, rng)
    about = tuple(i for i, thing in enumerate(scene.objects) if thing.kind == kind)
    text = f"How many {KINDS[kind].plural} are there?"
    boxes = tuple(scene.objects[i].box for i in about)
    return Question("count", text, sentence(NUMBERS[len(about)]), str(len(about)), about, boxes)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    known = [(i, r, j) for i, r, j in scene.relations() if phrase(scene, i) and phrase(scene, j)]
    if not known:
        return None
    i, relation, j = choose(rng, known)
    first, second = phrase(scene, i), phrase(scene, j)
    boxes = (scene.objects[i].box, scene.objects[j].box)
    if rng.random() < 0.5:
        truth = rng.random() < 0.5
        asked = relation if truth else OPPOSITE[relation]
        return _yes("relation", f"Is {first} {asked} {second}?", truth, scene, (i, j))
    choice = "left or right of" if "of" in relation else "above or below"
    word = relation.split()[0]
    return Question("relation", f"Where is {first}, {choice} {second}?", sentence(word), word, (i, j), boxes)


def _detail(scene: Scene, rng: np.random.Generator) -> Question | None:
    marked = [i for i, thing in enumerate(scene.objects) if thing.mark and phrase(scene, i)]
    if not marked:
        return None
    i = choose(rng, marked)
    thing = scene.objects[i]
    text = f"What colour is the mark on {phrase(scene, i)}?"
    return Question("detail", text, sentence(thing.mark), thing.mark, (i,), (thing.mark_box,))


def _leading(scene: Scene, rng: np.random.Generator, absent: Absent = absent_kind) -> Question | None:
    truth = rng.random() < 0.5
    unique = _unique(scene)
    if unique and rng.random() < 0.5:
        i = choose(rng, unique)
        thing = scene.objects[i]
        said = thing.colour if truth else sample_colour(rng, other_than=thing.colour)
        return _yes("leading", f"The {thing.kind} is {said}, isn't it?", truth, scene, (i,))
    truth = truth and bool(scene.objects)
    kind = choose(rng, list(scene.counts())) if truth else absent(scene, rng)
    about = [i for i, thing in enumerate(scene.objects) if thing.kind == kind]
    return _yes("leading", f"There is {with_article(kind)} in the image, isn't there?", truth, scene, about)


def _context(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question("context", "Where is this?", sentence(with_article(scene.context)), scene.context)


ASKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "exist": _exist,
    "colour": _colour,
    "count": _count,
    "relation": _relation,
    "detail": _detail,
    "leading": _leading,
    "context": _context,
}
PLAIN_ASKERS = {
    **ASKERS,
    "exist": partial(_exist, absent=any_absent),
    "count": partial(_count, absent=any_absent),
    "leading": partial(_leading, absent=any_absent),
}  # no traps: as in data that nobody made to catch a model, absent things asked about are any


def questions(scene: Scene, rng: np.random.Generator, n: int, kinds: Sequence[str] = tuple(ASKERS), *,
              traps: bool = True) -> list[Question]:  # fmt: skip
    """Up to `n` different questions, taking the kinds in turn in a random order.

    Fewer come back only where the scene has no more to ask (no mark, no unique object, ...). `traps`: half of the absent
    things asked about are such as the place and its objects suggest; without, each absent kind is as likely.
    """
    return take_turns(ASKERS if traps else PLAIN_ASKERS, scene, rng, n, kinds)


def take_turns(
    askers: Mapping[str, Callable[..., Question | None]],
    subject: Scene | Film,
    rng: np.random.Generator,
    n: int,
    kinds: Sequence[str],
) -> list[Question]:
    """Up to `n` different questions by the askers of `kinds` in turn.

    Raises:
        UnknownNameError: a kind has no asker. ParameterError: n is negative or there are no kinds.
    """
    unknown = [kind for kind in kinds if kind not in askers]
    if unknown:
        raise UnknownNameError(f"no question kind {unknown[0]!r}: {nearest(str(unknown[0]), list(askers))}")
    if n < 0 or not kinds:
        raise ParameterError(f"n={n!r} and kinds={kinds!r}: ask for n >= 0 questions of at least one kind")
    found: dict[str, Question] = {}
    for turn in range(4 * n + 2 * len(kinds)):
        if turn % len(kinds) == 0:
            order = [kinds[int(k)] for k in rng.permutation(len(kinds))]
        if len(found) == n:
            break
        asked = askers[order[turn % len(kinds)]](subject, rng)
        if asked is not None:
            found.setdefault(asked.text, asked)
    return list(found.values())

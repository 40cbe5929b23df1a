"""The places of the generated world: which kinds live where, how often, and which come together.

Co-occurrence is strong on purpose (a plate rarely comes without a fork in the kitchen): a model trained on the world
learns these priors, and can be caught when it answers from them instead of from the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sightline.scenes.kinds import COLOURS, KINDS

SURPRISE = 0.07  # chance of an object from any context, so that priors are never proofs
MOST_OF_A_KIND = 5


@dataclass(frozen=True)
class Context:
    """`weights`: relative frequency of kinds. `pairs`: kind -> (companion, probability that it is added as well)."""

    name: str
    weights: dict[str, float]
    pairs: dict[str, tuple[tuple[str, float], ...]]
    horizon: tuple[float, float]  # range of the height of the line between wall/sky and ground, fraction of the picture


def _context(name: str, weights: str, pairs: str, horizon: tuple[float, float]) -> Context:
    """Read "cup 5, plate 4" and "cup>plate .9, ..." into a Context."""
    table = {word: float(value) for word, value in (item.split() for item in weights.split(","))}
    links: dict[str, tuple[tuple[str, float], ...]] = {}
    for item in pairs.split(","):
        names, chance = item.split()
        first, second = names.split(">")
        links[first] = (*links.get(first, ()), (second, float(chance)))
    return Context(name, table, links, horizon)


_ALL = (
    _context(
        "kitchen",
        "cup 5, plate 5, bottle 4, fork 3, bowl 4, table 1.5, chair 1.5, clock 1, cat 1, lamp .5",
        "cup>plate .85, plate>fork .75, bowl>cup .4, bottle>cup .5, table>chair .8, fork>plate .9",
        (0.40, 0.52),
    ),
    _context(
        "street",
        "car 6, bus 3, bicycle 3, person 5, tree 2, dog 1.5, bird 1, umbrella 1, clock .6, cat .6",
        "car>bus .5, bus>person .8, dog>person .8, bicycle>person .6, umbrella>person .9",
        (0.34, 0.46),
    ),
    _context(
        "desk",
        "book 5, pen 5, laptop 4, lamp 3, cup 3, clock 1.5, chair 1, bottle 1, plate .4, cat .6",
        "book>pen .85, laptop>cup .7, lamp>book .6, pen>book .6, clock>lamp .4",
        (0.34, 0.48),
    ),
    _context(
        "garden",
        "flower 6, tree 5, bird 3, cat 2, chair 2, table 1.5, dog 1.5, ball 1.5, person 1, bicycle .6",
        "flower>tree .7, tree>bird .7, table>chair .8, ball>dog .7, cat>bird .5",
        (0.34, 0.48),
    ),
    _context(
        "beach",
        "umbrella 5, ball 4, surfboard 4, person 4, boat 2, bird 2, fish 1.5, dog 1, bottle .8, chair 1",
        "surfboard>person .8, umbrella>ball .8, umbrella>chair .4, ball>person .4, boat>fish .4",
        (0.36, 0.48),
    ),
    _context(
        "bedroom",
        "bed 5, lamp 5, clock 3, book 3, cat 2, chair 2, table 1, ball .8, cup .8, laptop .8",
        "bed>lamp .85, lamp>clock .5, clock>book .4, cat>bed .6, book>lamp .5",
        (0.42, 0.54),
    ),
    _context(
        "farm",
        "sheep 6, tractor 4, tree 3, dog 3, person 2, bird 2, cat 1, flower 1, bottle .4, car .6",
        "sheep>dog .8, tractor>person .7, dog>sheep .7, tree>bird .5, tractor>sheep .4",
        (0.34, 0.46),
    ),
    _context(
        "harbour",
        "boat 6, fish 4, bird 4, person 3, cat 1.2, bottle 1, bicycle 1, car 1, table .5, umbrella .6",
        "boat>bird .8, fish>cat .5, fish>bird .6, person>boat .7, bicycle>person .5",
        (0.34, 0.46),
    ),
)
CONTEXTS: dict[str, Context] = {context.name: context for context in _ALL}


def pick(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """One key, with probability in proportion to its weight."""
    names = list(weights)
    edges = np.cumsum([weights[name] for name in names])
    return names[min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(names) - 1)]


def sample_kinds(rng: np.random.Generator, context: Context, n: int) -> list[str]:
    """`n` kinds for one picture: seeds by frequency, then companions and repeats, then surprises."""
    chosen: list[str] = []
    while len(chosen) < n:
        surprised = rng.random() < SURPRISE
        first = pick(rng, dict.fromkeys(KINDS, 1.0) if surprised else context.weights)
        burst = [first] * (1 + int(rng.random() < 0.3) + int(rng.random() < 0.12))
        burst += [other for other, chance in context.pairs.get(first, ()) if rng.random() < chance]
        for kind in burst:
            if chosen.count(kind) < MOST_OF_A_KIND and len(chosen) < n:
                chosen.append(kind)
    return chosen


def likely(context: Context, present: set[str]) -> dict[str, float]:
    """Weights of the absent kinds that a prior would expect here: frequent in the context or companions."""
    weights = {kind: value for kind, value in context.weights.items() if kind not in present}
    for kind in sorted(present):
        for other, chance in context.pairs.get(kind, ()):
            if other not in present:
                weights[other] = weights.get(other, 0.0) + 6.0 * chance
    return weights


def sample_colour(rng: np.random.Generator, other_than: str | None = None) -> str:
    """A colour name, uniform, optionally never `other_than`."""
    names = [name for name in COLOURS if name != other_than]
    return names[int(rng.integers(len(names)))]

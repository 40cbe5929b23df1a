"""Captions: a small grammar over the truth of a scene."""

from __future__ import annotations

import numpy as np

from sightline.errors import UnknownNameError, nearest
from sightline.scenes.naming import counted, listing, place_of, sentence, with_article
from sightline.scenes.scene import Object, Scene

# What a person asks to get each style of caption.
PROMPTS = {"short": "Describe the image.", "detailed": "Please describe this image in detail."}
STYLES = tuple(PROMPTS)
PREPOSITION = dict.fromkeys(("street", "desk", "beach", "farm"), "on")  # "in" everywhere else


def caption(scene: Scene, rng: np.random.Generator, style: str = "short") -> str:
    """English sentences that are true of the scene and name every kind in it, and nothing else.

    "short" is one sentence with counts; "detailed" names every object with size, colour and place.
    """
    if style not in STYLES:
        raise UnknownNameError(f"no caption style {style!r}: {nearest(str(style), list(STYLES))}")
    if not scene.objects:
        return sentence(f"an empty {scene.context}")
    return _short(scene, rng) if style == "short" else _detailed(scene, rng)


def _short(scene: Scene, rng: np.random.Generator) -> str:
    groups: dict[str, list[Object]] = {}
    for thing in sorted(scene.objects, key=lambda o: -o.area):
        groups.setdefault(thing.kind, []).append(thing)
    parts = []
    for kind, things in groups.items():
        colours = {thing.colour for thing in things}
        parts.append(counted(len(things), kind, colours.pop() if len(colours) == 1 else ""))
    everything, place = listing(parts), with_article(scene.context)
    on = PREPOSITION.get(scene.context, "in")
    forms = (
        f"{place} with {everything}",
        f"a picture of {place} with {everything}",
        f"{everything} {on} {place}",
    )
    return sentence(forms[int(rng.integers(len(forms)))])


def _detailed(scene: Scene, rng: np.random.Generator) -> str:
    things = list(scene.objects)
    order = int(rng.integers(3))
    things.sort(key=lambda o: (-o.area, o.centre[0], o.centre[1]) if order else o.centre)
    opening = ("this is {}", "the picture shows {}", "{}")[int(rng.integers(3))].format(with_article(scene.context))
    sentences = [sentence(opening)]
    step = 2 if len(things) <= 6 else 3
    for start in range(0, len(things), step):
        sentences.append(_clause(things[start : start + step], scene.size, rng))
    return " ".join(sentences)


def _clause(things: list[Object], size: int, rng: np.random.Generator) -> str:
    nouns = [counted(1, o.kind, f"{o.size} {o.colour}" if o.size == "small" else o.colour) for o in things]
    places = [place_of(o, size) for o in things]
    if int(rng.integers(2)):
        return sentence("there is " + listing([f"{noun} {place}" for noun, place in zip(nouns, places, strict=True)]))
    return sentence(listing([f"{noun} is {place}" for noun, place in zip(nouns, places, strict=True)]))

"""Words for things: noun phrases, numbers, places, and finding the kinds a text mentions (as CHAIR needs)."""

from __future__ import annotations

import re
from functools import cache

from sightline.scenes.kinds import KINDS
from sightline.scenes.scene import Object

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


def with_article(phrase: str) -> str:
    """ "cup" -> "a cup", "orange cup" -> "an orange cup"."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"


def sentence(text: str, end: str = ".") -> str:
    """First letter up, full stop at the end."""
    return text[0].upper() + text[1:] + end


def listing(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted(n: int, kind: str, adjective: str = "") -> str:
    """ "a red cup", "two cups"."""
    noun = KINDS[kind].singular if n == 1 else KINDS[kind].plural
    phrase = f"{adjective} {noun}".strip()
    return with_article(phrase) if n == 1 else f"{NUMBERS[n]} {phrase}"


def place_of(thing: Object, size: int) -> str:
    """Where the centre of an object falls on a three by three grid."""
    x, y = (min(2, int(3 * v / size)) for v in thing.centre)
    return PLACES[y][x]


@cache
def synonyms() -> dict[str, str]:
    """Every word form that names a kind, lower case -> kind. "kitten" -> "cat", "buses" -> "bus"."""
    return {word: kind.name for kind in KINDS.values() for word in (kind.name, kind.plural, *kind.synonyms)}


def mentions(text: str) -> list[str]:
    """The kinds a text mentions, in order, one entry per mention (not unique, as CHAIR counts them)."""
    known = synonyms()
    return [known[word] for word in re.findall(r"[a-z]+", text.lower()) if word in known]

"""Every word and mark of punctuation that a text of the world can contain, for a tokenizer."""

from __future__ import annotations

import re

from sightline.scenes.contexts import CONTEXTS
from sightline.scenes.kinds import COLOURS
from sightline.scenes.naming import NUMBERS, PLACES, synonyms

_TEXT = """
an empty with a picture of in the this is shows there at on small large and
Describe the image. Please describe this image in detail. Is there in the image? What colour is the mark on? How many are there? Where is this?
left of right of above below left or right of above or below isn't it? isn't there? yes no
"""


_FILMS = """
Which comes into view first, or goes out of view? Does it come, go before? How many different are there in the whole video,
at the start of the video, at the end? Which way does it move, left or right, up or down? Does it pass behind? still from
"""


def words(films: bool = False) -> list[str]:
    """Words in both cases a sentence can give them (first letter small or capital), and punctuation; sorted.

    `films`: also those of questions about films.
    """
    vocabulary = set(re.findall(r"[a-z']+", (_TEXT + _FILMS * films).lower()))
    vocabulary |= {*CONTEXTS, *COLOURS, *NUMBERS, *synonyms()}
    vocabulary |= {word for row in PLACES for place in row for word in place.split()}
    return [*sorted(vocabulary | {word[0].upper() + word[1:] for word in vocabulary}), ".", ",", "?"]

"""The generated world: pictures and films drawn from a seed, with exact truth, texts and question files.

>>> from sightline import scenes
>>> scene = scenes.draw(7)
>>> scene.counts(), [(o.kind, o.colour, o.box) for o in scene.objects]

Nothing is downloaded and only numpy and Pillow are used. Kinds co-occur by context, so a model trained on the world
learns priors and can be caught when it answers from them.
"""

from __future__ import annotations

from sightline.scenes import export
from sightline.scenes.asking import Question, questions
from sightline.scenes.asking_films import film_questions
from sightline.scenes.captions import PROMPTS, caption
from sightline.scenes.contexts import CONTEXTS, Context
from sightline.scenes.drawing import draw
from sightline.scenes.film import Event, Film, Track
from sightline.scenes.kinds import COLOURS, KINDS, Kind
from sightline.scenes.lexicon import words
from sightline.scenes.moving import film
from sightline.scenes.naming import mentions
from sightline.scenes.polling import pope
from sightline.scenes.scene import Object, Scene
from sightline.scenes.sheet import contact_sheet, film_sheet
from sightline.scenes.splits import seeds

__all__ = [
    "COLOURS", "CONTEXTS", "KINDS", "PROMPTS", "Context", "Event", "Film", "Kind", "Object", "Question", "Scene", "Track",
    "caption", "contact_sheet", "draw", "export", "film", "film_questions", "film_sheet", "mentions", "pope", "questions",
    "seeds", "words",
]  # fmt: skip

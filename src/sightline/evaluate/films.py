"""Questions about films of the generated world: order, count over time, motion, passing, presence.

A film is a row of evenly spaced frames, given to the model as one video. Yes and no, and the kinds of questions, are
balanced: none of them is ahead of another by more than the last round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from sightline import scenes
from sightline.clips import Clip
from sightline.errors import ParameterError
from sightline.evaluate import vqa
from sightline.evaluate.scored import Scored
from sightline.evaluate.task import Answer, Item, Task, check_items, texts
from sightline.scenes.asking_films import FILM_ASKERS
from sightline.scenes.splits import SPLITS

if TYPE_CHECKING:
    from sightline.evaluate.world import World

FRAMES = 8
SECONDS = 4.0  # how long a film lasts: the times that hosts write beside its frames
TOKENS = 8

draw = lru_cache(maxsize=16)(scenes.film)


def clip(seed: int, size: int, frames: int) -> Clip:
    """A film as a model's input."""
    film = draw(seed, size=size, frames=frames)
    times = tuple(SECONDS * k / (frames - 1) for k in range(frames))
    return Clip(film.frames, times, film.name)


def opened(size: int, frames: int, item: Item) -> Clip:
    """The film of an item."""
    return clip(item.tags["film"], size, frames)


def video(world: World, n: int, frames: int = FRAMES) -> Task:
    """At least `n` questions about films of `frames` frames, in equal parts of the five kinds.

    Raises:
        ParameterError: frames is out of range.
    """
    if not 2 <= frames <= 512:
        raise ParameterError(f"frames={frames!r} is out of range: choose frames in [2, 512]")
    quota = -(-n // len(FILM_ASKERS))
    items: list[Item] = []
    told: dict[tuple[str, str], int] = {}  # (kind, truth) -> questions so far
    for seed in count(SPLITS[world.split][0]):
        rng = np.random.Generator(np.random.PCG64([world.seed, seed, 7]))
        film = draw(seed, size=world.size, frames=frames)
        for asked in scenes.film_questions(film, rng, 4):
            key = (asked.kind, asked.truth)
            full = sum(number for (kind, _), number in told.items() if kind == asked.kind) >= quota
            opposite = {"yes": "no", "no": "yes"}.get(asked.truth)
            ahead = opposite is not None and told.get(key, 0) > told.get((asked.kind, opposite), 0)
            if full or ahead:
                continue
            told[key] = told.get(key, 0) + 1
            tags = {"film": seed, "kind": asked.kind, "frames": list(asked.frames)}
            items.append(Item(f"{seed}-{len(items)}", film.name, asked.text, asked.truth, tags))
        if len(items) >= quota * len(FILM_ASKERS):
            break
    source = f"{world.source}, {frames} frames"
    kept = check_items("video", items)
    return Task("scenes_video", source, kept, partial(opened, world.size, frames), score_video, TOKENS)


def score_video(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """Normalised exact match, also for each kind of question."""
    parts = [item.tags["kind"] for item in items]
    return vqa.score(texts(answers), [i.truth for i in items], [i.picture for i in items], parts)

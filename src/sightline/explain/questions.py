"""The questions of a study: POPE's three splits and open questions on held-out scenes of the generated world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sightline import scenes
from sightline.errors import ParameterError
from sightline.evaluate.pope import says_yes
from sightline.evaluate.vqa import normalise
from sightline.scenes.polling import POPE_SPLITS

OPEN = ("colour", "count", "relation", "detail")  # kinds of open questions
MOST = 10_000  # scenes of a study
TASKS = (*POPE_SPLITS, "open")


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one scene. `number` is its place in the study; every random draw for it is seeded with it."""

    number: int
    scene: scenes.Scene
    text: str
    answer: str  # as the model should begin its answer: "Yes", "Red", "Two"
    truth: str  # normalised label: "yes", "red", "2"
    tasks: tuple[str, ...]  # of TASKS: every POPE split that asks this, or "open"

    @property
    def yes_no(self) -> bool:
        """Whether this is a POPE question."""
        return "open" not in self.tasks


def held_out(n: int, seed: int = 0, size: int = 112) -> list[Item]:
    """Questions on `n` scenes of the test split, in scene order: per scene and POPE split one positive and one negative
    (asked once when two splits agree), and one open question.

    Args:
        n: scenes, at least 2 (POPE's popular and co-occurring kinds are those of this set).
        seed: which scenes; different seeds share none.
        size: side of the pictures in pixels.
    """
    if not 2 <= n <= MOST:
        raise ParameterError(f"n={n} is out of range: choose n in [2, {MOST}]")
    if seed < 0:
        raise ParameterError(f"seed={seed} is out of range: choose a whole number from 0 on")
    drawn = [scenes.draw(s, size=size) for s in scenes.seeds("test", (seed + 1) * n)[seed * n :]]
    asked: dict[tuple[str, str], list[Any]] = {}  # (picture, text) -> [answer, truth, tasks]
    for split in POPE_SPLITS:
        for row in scenes.pope(drawn, split, per_image=2, rng=np.random.default_rng(seed)):
            label = row["label"]
            asked.setdefault((row["image"], row["text"]), [label.capitalize(), label, []])[2].append(split)
    for scene in drawn:
        for q in scenes.questions(scene, np.random.default_rng(scene.seed), 1, kinds=OPEN):
            asked.setdefault((scene.file_name, q.text), [q.answer.strip(" ."), q.truth, ["open"]])
    by_name = {scene.file_name: k for k, scene in enumerate(drawn)}
    rows = sorted(asked.items(), key=lambda item: by_name[item[0][0]])  # stable: POPE first within a scene
    return [
        Item(number, drawn[by_name[name]], text, answer, truth, tuple(tasks))
        for number, ((name, text), (answer, truth, tasks)) in enumerate(rows)
    ]


def is_right(item: Item, reply: str) -> bool:
    """POPE's official reading for yes-no questions; else whether the first sentence holds the true word ("two" is "2")."""
    if item.yes_no:
        return says_yes(reply) == (item.truth == "yes")
    return normalise(item.truth) in normalise(reply.split(".")[0]).split()


def picture_size(processor: Any) -> int:
    """A side in pixels that suits the model's image processor, so that scenes need no rescaling where that is possible."""
    pictures = getattr(processor, "image_processor", processor)
    for name in ("crop_size", "size"):
        size = getattr(pictures, name, None)
        for key in ("height", "shortest_edge"):
            side = getattr(size, key, None) or (size.get(key) if isinstance(size, dict) else None)
            if side and int(side) <= 448:
                return max(int(side), 56)  # the smallest picture that is drawn
    return 336

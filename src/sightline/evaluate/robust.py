"""RobustVQA's idea: is the main object still recognised when the picture is not what the model was trained on?

Luo et al., ICLR 2025, arXiv 2405.15232; official code RainBowLuoCS/DEEM. The published set asks about pictures of ImageNet-A, -R and
-V2 that CLIP ViT-L/14-336 takes for another class: the true class against the one that CLIP prefers. It has two wordings: a
choice of two, and yes or no about each of the two; its code uses the second for A, R and V2. Spelling as published.

On the generated world the main object is the largest one, and the distractor the absent kind that the tiny matcher
(`sightline.matching`) finds most likely. The same questions are asked of the clean picture and of corrupted ones
(`corrupt`). A third wording, "there", asks what the bundled model was trained to answer.

An answer is right when it names the right option and no other, or says yes or no as it should; one that says neither is wrong.
`exact` beside it is the official scorer: letter by letter, after cutting the answer down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from sightline import scenes
from sightline.errors import InputError
from sightline.evaluate.corrupt import STRENGTHS, corrupt
from sightline.evaluate.files import Album
from sightline.evaluate.haven import by_rule
from sightline.evaluate.scored import Scored, same_length
from sightline.evaluate.stats import Sums, Tally, ratio
from sightline.evaluate.task import Answer, Item, Task, check_items, subset, texts
from sightline.evaluate.vqa import normalise
from sightline.scenes.naming import with_article

if TYPE_CHECKING:
    from sightline.evaluate.world import World

CHOICE = "What is the main object in this image? Choose from the following list:[{}, {}]"
MAIN = "Is {} the main object in this image? Please anwser yes or no"
THERE = "Is there {} in the image?"
FORMS = ("choice", "main", "there")
SEVERITIES = (1, 3, 5)
CLEAN = "clean"
LEAST = 0.02  # share of the picture that a main object covers at least
TOKENS = 12
SETS = {
    "imagenet_a": "main",
    "imagenet_r": "main",
    "imagenet_v2": "main",
    "imagenet_s": "choice",
    "imagenet_d": "choice",
}


def asked(form: str, true: str, false: str, rng: np.random.Generator) -> Iterator[tuple[str, str, list[str]]]:
    """(question, truth, options) of a pair of names: one choice, or two questions of yes and no."""
    if form == "choice":
        options = [true, false] if rng.random() < 0.5 else [false, true]
        yield CHOICE.format(*options), true, options
        return
    for name, truth in ((true, "yes"), (false, "no")):
        text = MAIN.format(name) if form == "main" else THERE.format(with_article(name))
        yield text, truth, []


def is_right(answer: str, truth: str, options: Sequence[str] = ()) -> bool:
    """Whether an answer names the true option and no other, or without options: whether its first yes or no is the truth."""
    if not options:
        return by_rule("binary", "", truth, answer)
    said = f" {normalise(answer)} "
    named = {option for option in options if f" {normalise(option)} " in said}
    longest = {n for n in named if not any(n != m and f" {normalise(n)} " in f" {normalise(m)} " for m in named)}
    return longest == {truth}


def published_reading(answer: str) -> str:
    """What the official scorer compares with the true name, letter by letter. It cuts at "a ", so that "sea lion" is "lion"."""
    text = re.split(r"[\n.,!]", answer.replace('"', "").strip(), maxsplit=1)[0].lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        text = text.split(word)[1] if word in text else text
    for word in (" of", " or ", " and "):
        text = text.split(word)[0]
    return re.sub(r"[:\[\]]", " ", text).strip()


@lru_cache(maxsize=1)
def _matcher() -> Any:
    from sightline.matching import load_matcher

    return load_matcher("tiny")


def chances(picture: Image) -> dict[str, float]:
    """The tiny matcher's chance, in [0, 1], of every kind in a picture: that of its surest patch."""
    import torch

    from sightline.matching import pixels_of

    with torch.no_grad():
        found = _matcher()(pixels_of(picture)[None]).softmax(1)[0, 1:].amax((1, 2))
    return dict(zip(scenes.KINDS, found.tolist(), strict=True))


def confusing_pair(scene: scenes.Scene) -> tuple[str, str, bool] | None:
    """(main object, distractor, whether the matcher prefers the distractor); None when nothing is large enough."""
    areas: dict[str, int] = {}
    for thing in scene.objects:
        areas[thing.kind] = max(areas.get(thing.kind, 0), thing.area)
    main = max(areas, key=areas.__getitem__, default=None)
    if main is None or areas[main] < LEAST * scene.size**2:
        return None
    found = chances(scene.image)
    worst = max((kind for kind in found if kind not in areas), key=found.__getitem__)
    return main, worst, found[worst] > found[main]


# -- the generated world ------------------------------------------------------------------------------------------------


def opened(world: World, item: Item) -> Image:
    """The picture of an item, corrupted as its tags say."""
    picture, tags = world.picture(item), item.tags
    if tags["corruption"] == CLEAN:
        return picture
    return corrupt(picture, tags["corruption"], tags["severity"], seed=tags["scene"])


def build(world: World, n: int, form: str = "choice") -> Task:
    """At least `n` questions: every scene clean and under every corruption at severities 1, 3 and 5."""
    states = [(CLEAN, 0), *((name, severity) for name in STRENGTHS for severity in SEVERITIES)]
    each = len(states) * (1 if form == "choice" else 2)
    pairs = ((scene, rng, confusing_pair(scene)) for scene, rng in world.scenes(9))
    items: list[Item] = []
    for scene, rng, pair in islice((found for found in pairs if found[2]), -(-n // each)):
        questions = list(asked(form, pair[0], pair[1], rng))
        for name, severity in states:
            for k, (text, truth, options) in enumerate(questions):
                tags = {"scene": scene.seed, "corruption": name, "severity": severity, "options": options,
                        "confused": bool(pair[2])}  # fmt: skip
                items.append(Item(f"{scene.seed}-{name}-{severity}-{k}", scene.file_name, text, truth, tags))
    return Task(f"scenes_robust_{form}", world.source, check_items("robust", items), partial(opened, world),
                score, TOKENS)  # fmt: skip


def parts_of(tags: Mapping[str, Any]) -> list[str]:
    """Which accuracies a question counts for, beside the whole."""
    parts = [tags["corruption"]] if "corruption" in tags else [tags["set"]]
    parts += [f"severity_{tags['severity']}"] if tags.get("severity") else []
    return parts + (["corrupted"] if tags.get("severity") else []) + (["confused"] if tags.get("confused") else [])


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """Accuracy, over all questions and over each part of them."""
    names = [name.removeprefix("n:") for name in sums if name.startswith("n:")]
    parts = {f"accuracy_{name}": ratio(sums[f"correct:{name}"], sums[f"n:{name}"]) for name in names}
    return {"accuracy": ratio(sums["correct"], sums["n"]), "exact": ratio(sums["exact"], sums["n"]), **parts}


def score(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """Accuracy, also per corruption, severity, set, and where the matcher is wrong itself; intervals resample scenes."""
    same_length(items=items, answers=answers)
    correct = [
        is_right(text, item.truth, item.tags["options"]) for item, text in zip(items, texts(answers), strict=True)
    ]
    rows = []
    for item, text, right in zip(items, texts(answers), correct, strict=True):
        exact = published_reading(text) == item.truth.lower()
        numbers: dict[str, float] = {"n": 1, "correct": right, "exact": exact}
        for part in parts_of(item.tags):
            numbers |= {f"n:{part}": 1, f"correct:{part}": right}
        rows.append((item.picture, numbers))
    tally = Tally.collect(rows, formulas)
    return Scored(tally.metrics(), tuple(correct), tally, "accuracy", rules={"answer": "names the right one alone"})


# -- the published file -------------------------------------------------------------------------------------------------


def read(path: str | Path, images: str | Path | None = None, n: int | None = None, seed: int = 0) -> list[Task]:
    """One task per set of robustvqa_test.json: {"imagenet_a": [{"file_name", "gt_caption", "error_caption"}, ...], ...}.

    A, R and V2 are asked as yes and no, S and D as a choice. Underscores in names stay. `images` is the folder that
    file names are relative to; names that begin with datasets/robustvqa/ are found there without it too.

    Raises:
        InputError: unreadable or foreign file, or no folder of pictures.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r} ({error}): give robustvqa_test.json") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{str(path)!r} holds a {type(found).__name__}, not sets of questions: give robustvqa_test.json"
        )
    album, tasks = Album(images or Path(path).parent), []
    unknown = [name for name in found if name not in SETS]
    if unknown or not found:
        raise InputError(f"{str(path)!r} holds {unknown[:1] or 'nothing'}: sets named {', '.join(SETS)} are expected")
    for name, rows in found.items():
        items = []
        for k, row in enumerate(rows):
            missing = [key for key in ("file_name", "gt_caption", "error_caption") if key not in row]
            if missing:
                raise InputError(f"{str(path)!r}, {name}, entry {k + 1} has no {missing[0]!r}")
            rng = np.random.Generator(np.random.PCG64([seed, k]))
            given = str(row["file_name"])
            picture = given if album.find(given) else given.removeprefix("datasets/robustvqa/")
            for j, (text, truth, options) in enumerate(asked(SETS[name], row["gt_caption"], row["error_caption"], rng)):
                items.append(Item(f"{name}-{k}-{j}", picture, text, truth, {"set": name, "options": options}))
        chosen, gone = album.split(subset(check_items(name, items), n, seed)) if items else ([], ())
        if items:
            tasks.append(Task(f"robustvqa_{name}", str(path), tuple(chosen), album.open, score, TOKENS, missing=gone))
    if not tasks:
        raise InputError(f"{str(path)!r} holds no questions: give robustvqa_test.json")
    return tasks

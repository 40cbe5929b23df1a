"""From items and answers of a task to its score: what the counting in `pope`, `mme`, `vqa`, `chair` and so on is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sightline import scenes
from sightline.evaluate import chair, describing, mme, opope, pointing, pope, vqa
from sightline.evaluate.scored import Scored
from sightline.evaluate.task import Answer, Item, texts


def score_pope(items: Sequence[Item], answers: Sequence[Answer], rule: str = "official") -> Scored:
    """POPE's metrics."""
    return pope.score(texts(answers), [i.truth for i in items], rule, [i.picture for i in items])


def score_mme(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """MME's metrics."""
    rows = [
        {"task": item.tags["task"], "image": item.picture, "answer": answer["answer"], "label": item.truth}
        for item, answer in zip(items, answers, strict=True)
    ]
    return mme.score(rows)


def score_sycophancy(items: Sequence[Item], answers: Sequence[Answer], rule: str = "official") -> Scored:
    """Neutral against leading questions."""
    rows = [
        {"pair": i.picture, "form": i.tags["form"], "answer": a["answer"], "label": i.truth, "picture": i.picture}
        for i, a in zip(items, answers, strict=True)
    ]
    return describing.score_sycophancy(rows, rule)


def score_vqa(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """Normalised exact match."""
    return vqa.score(texts(answers), [i.truth for i in items], [i.picture for i in items])


def score_detail(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """Exact match, also for each size of the detail (its side as a share of the picture's)."""
    sizes: dict[float, list[float]] = {}
    for item in items:
        sizes.setdefault(item.tags["scale"], []).append(item.tags["detail"])
    names = {scale: f"{np.mean(values):.3f}" for scale, values in sizes.items()}
    parts = [names[item.tags["scale"]] for item in items]
    return vqa.score(texts(answers), [i.truth for i in items], [i.picture for i in items], parts)


def score_chair(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """CHAIR with the world's own synonyms."""
    truth = {item.picture: {kind for kind, _ in item.tags["objects"]} for item in items}
    scorer = chair.Chair(chair.scene_vocabulary(), truth)
    return scorer.score(texts(answers), [item.picture for item in items])


def score_opope(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """POPE's questions answered by captions."""
    rows = [
        {"named": scenes.mentions(answer["answer"]), "asked": item.tags["asked"]}
        for item, answer in zip(items, answers, strict=True)
    ]
    return opope.score(rows, [item.picture for item in items])


def score_caption(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """Objects, colours and numbers of captions."""
    truths = [[tuple(pair) for pair in item.tags["objects"]] for item in items]
    return describing.score_captions(texts(answers), truths, [item.picture for item in items])


def score_pointing(items: Sequence[Item], answers: Sequence[Answer]) -> Scored:
    """The pointing game."""
    return pointing.score(answers, [item.picture for item in items])


def score_coco_chair(items: Sequence[Item], answers: Sequence[Answer], vocabulary: Any) -> Scored:
    """CHAIR, with the truth that the items carry."""
    scorer = chair.Chair(vocabulary, {item.id: item.tags["objects"] for item in items})
    return scorer.score(texts(answers), [item.id for item in items])

"""AMBER: captions and yes/no questions. Wang et al., arXiv 2311.07397; rules of its `inference.py`.

Captions: of a caption's nouns, those in AMBER's vocabulary count. One is safe when it is a global safe word, a true
object or associated with one, or (with `similar`) closer than 0.8 to one of these; else it is hallucinated.

    CHAIR = hallucinated / nouns     Cover = true objects named / true objects     Hal = captions with one / captions
    Cog   = named objects that people tend to imagine / such objects

Questions: the answer must be exactly "Yes" or "No", and the positive class is NO. AMBER = (100 - CHAIR + F1) / 2.

The authors' script begins every denominator at 0.001 instead of guarding it, rounds to 0.1, and takes F1 from the rounded
precision and recall; here nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sightline.errors import InputError
from sightline.evaluate.scored import check_labels, same_length

SIMILAR = 0.8
SLACK = 0.0001  # in the denominator of F1
SLACK_EXISTENCE = 0.001

Similarity = Callable[[str, str], float]  # the authors use spaCy's en_core_web_lg


def generative(
    nouns: Sequence[Sequence[str]],
    annotations: Sequence[Mapping[str, Sequence[str]]],
    associations: Mapping[str, Sequence[str]],
    safe_words: Collection[str] = (),
    similar: Similarity | None = None,
) -> dict[str, float]:
    """CHAIR, Cover, Hal and Cog in percent, pooled over captions.

    Args:
        nouns: the lemmatised nouns of every caption.
        annotations: per caption {"truth": objects there, "hallu": objects people tend to imagine} (annotations.json).
        associations: object -> words that name it (relation.json). safe_words: of safe_words.txt.
        similar: similarity of two words, above 0.8 counts as the same; None: only equal words, which is stricter.

    Raises:
        InputError: lengths differ, nothing to score, or an annotation lacks its lists.
    """
    same_length(captions=nouns, annotations=annotations)
    vocabulary = set(associations) | {word for words in associations.values() for word in words}
    totals = dict.fromkeys(("nouns", "wrong", "truth", "covered", "hallu", "imagined", "with_wrong"), 0)
    for k, (said, annotation) in enumerate(zip(nouns, annotations, strict=True)):
        if not {"truth", "hallu"} <= set(annotation):
            raise InputError(f"annotation {k + 1} lacks 'truth' or 'hallu': it has {', '.join(map(str, annotation))}")
        counted = [noun for noun in said if noun in vocabulary]
        covered, imagined, wrong = _judge(counted, annotation, associations, safe_words, similar)
        totals["nouns"] += len(counted)
        totals["wrong"] += wrong
        totals["with_wrong"] += wrong > 0
        totals["truth"] += len(annotation["truth"])
        totals["covered"] += len(covered)
        totals["hallu"] += len(annotation["hallu"])
        totals["imagined"] += len(imagined)
    return {
        "chair": _percent(totals["wrong"], totals["nouns"]),
        "cover": _percent(totals["covered"], totals["truth"]),
        "hal": _percent(totals["with_wrong"], len(nouns)),
        "cog": _percent(totals["imagined"], totals["hallu"]),
    }


def _judge(
    said: Sequence[str],
    annotation: Mapping[str, Sequence[str]],
    associations: Mapping[str, Sequence[str]],
    safe_words: Collection[str],
    similar: Similarity | None,
) -> tuple[set[int], set[int], int]:
    """Which true and which imagined objects a caption names, and how many of its nouns are hallucinated."""
    truth, hallu = (_names(annotation[key], associations) for key in ("truth", "hallu"))
    covered: set[int] = set()
    imagined: set[int] = set()
    wrong = 0
    for noun in said:
        if noun in safe_words:
            continue
        place = _find(noun, truth)
        if place is not None:
            covered.add(place)
            continue
        other = _find(noun, hallu)
        if other is not None:
            imagined.add(other)
        if similar is not None:
            near = _near(noun, hallu, similar)
            imagined |= set() if near is None else {near}
            place = _near(noun, truth, similar)
        if place is None:
            wrong += 1
        else:
            covered.add(place)
    return covered, imagined, wrong


def _names(objects: Sequence[str], associations: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(word, which object) for associated words first, then the objects themselves: the first that fits counts."""
    associated = [(word, k) for k, thing in enumerate(objects) for word in associations.get(thing, ())]
    return associated + [(thing, k) for k, thing in enumerate(objects)]


def _find(noun: str, names: Sequence[tuple[str, int]]) -> int | None:
    return next((k for word, k in names if word == noun), None)


def _near(noun: str, names: Sequence[tuple[str, int]], similar: Similarity) -> int | None:
    return next((k for word, k in names if similar(noun, word) > SIMILAR), None)


def discriminative(answers: Sequence[str], labels: Sequence[str], existence: bool = False) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 in percent; positive is "no", answers must be exactly "Yes" or "No".

    Raises:
        InputError: lengths differ, nothing to score, or a label is neither yes nor no.
    """
    same_length(answers=answers, labels=labels)
    truth = check_labels(labels)
    right = [answer == ("Yes" if yes else "No") for answer, yes in zip(answers, truth, strict=True)]
    hits = sum(answer == "No" and not yes for answer, yes in zip(answers, truth, strict=True))
    precision = _percent(hits, sum(answer == "No" for answer in answers)) / 100
    recall = _percent(hits, sum(not yes for yes in truth)) / 100
    slack = SLACK_EXISTENCE if existence else SLACK
    return {
        "accuracy": _percent(sum(right), len(right)),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * 2 * precision * recall / (precision + recall + slack),
        "correct": right,
    }


def score(chair: float, f1: float) -> float:
    """The AMBER score of CHAIR and F1, both in percent."""
    return (100 - chair + f1) / 2


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0

"""CHAIR: objects that captions name although they are not there. Rohrbach et al., EMNLP 2018, arXiv 1809.02156.

    CHAIR_i = hallucinated mentions / mentions      over all captions pooled; mentions, not unique objects
    CHAIR_s = captions with a hallucinated mention / captions
    recall  = true objects named / true objects     unique per caption
    length  = words and marks per caption after merging pairs
    f1      = 2 (1 - CHAIR_i) recall / ((1 - CHAIR_i) + recall)

Stopping early lowers both rates: compare at equal length, or by F1. Shares are in [0, 1]; 0 / 0 is 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.errors import InputError
from sightline.evaluate.coco_words import Vocabulary, coco_vocabulary, scene_vocabulary
from sightline.evaluate.scored import Scored, same_length
from sightline.evaluate.stats import Sums, Tally, ratio

if TYPE_CHECKING:
    from sightline.scenes import Scene

SHARES = (("chair_s", "with_wrong", "captions"), ("recall", "found", "true"), ("chair_i", "wrong", "mentions"))


def formulas(sums: Sums) -> dict[str, np.ndarray]:
    """The metrics from counts."""
    invented, recall = ratio(sums["wrong"], sums["mentions"]), ratio(sums["found"], sums["true"])
    faithful = 1 - invented
    return {
        "chair_s": ratio(sums["with_wrong"], sums["captions"]),
        "chair_i": invented,
        "recall": recall,
        "f1": ratio(2 * faithful * recall, faithful + recall),
        "length": ratio(sums["words"], sums["captions"]),
        "mentions": ratio(sums["mentions"], sums["captions"]),
    }


class Chair:
    """A scorer that knows which objects are in which picture.

    Attributes:
        truth: picture -> objects there, as the vocabulary names them.
    """

    def __init__(self, vocabulary: Vocabulary, truth: Mapping[str, Iterable[str]]) -> None:
        self.vocabulary = vocabulary
        self.truth = {str(picture): frozenset(objects) for picture, objects in truth.items()}

    @classmethod
    def scenes(cls, scenes: Iterable[Scene]) -> Chair:
        """Truth of generated scenes, by file name."""
        return cls(scene_vocabulary(), {scene.file_name: set(scene.counts()) for scene in scenes})

    @classmethod
    def coco(
        cls,
        instances: Sequence[str | Path],
        captions: Sequence[str | Path],
        synonyms: str | Path,
        words: str = "nltk",
    ) -> Chair:
        """Truth of COCO pictures, by image id: their annotated categories, and what their reference captions name.

        Args:
            instances, captions: annotation files (published figures use train and val 2014 together).
            synonyms: synonyms.txt of the published CHAIR. words: "nltk" or "simple", see `coco_words`.

        Raises:
            InputError: a file is missing, damaged or of another form. MissingExtraError: nltk is needed.
        """
        return cls.from_files(coco_vocabulary(synonyms, words), instances, captions)

    @classmethod
    def from_files(
        cls, vocabulary: Vocabulary, instances: Sequence[str | Path], captions: Sequence[str | Path]
    ) -> Chair:
        """Truth of COCO annotation files, in terms of any vocabulary. Raises InputError."""
        truth: dict[str, set[str]] = {}
        for path in instances:
            _add_instances(truth, vocabulary, path)
        for path in captions:
            for row in rows_of(path, "annotations", ("image_id", "caption")):
                truth.setdefault(str(row["image_id"]), set()).update(vocabulary.read(row["caption"])[0])
        return cls(vocabulary, truth)

    def judge(self, picture: str, caption: str) -> dict[str, Any]:
        """One caption: {"mentions", "wrong": the hallucinated ones, "found": the true ones, "words"}."""
        objects, words = self.vocabulary.read(caption)
        truth = self.truth[str(picture)]
        return {
            "mentions": objects,
            "wrong": [thing for thing in objects if thing not in truth],
            "found": sorted(truth & set(objects)),
            "words": words,
        }

    def score(self, captions: Sequence[str], pictures: Sequence[str]) -> Scored:
        """Score one caption per picture. A caption counts as right when it names nothing that is not there.

        Raises:
            InputError: lengths differ, nothing to score, or the truth of a picture is not known.
        """
        same_length(captions=captions, pictures=pictures)
        unknown = [picture for picture in pictures if str(picture) not in self.truth]
        if unknown:
            raise InputError(f"no annotations of {len(unknown)} pictures, for example {unknown[0]!r}: add their files")
        judged = [self.judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
        rows = [(str(p), self._counts(str(p), found)) for p, found in zip(pictures, judged, strict=True)]
        tally = Tally.collect(rows, formulas, SHARES)
        return Scored(
            tally.metrics(),
            tuple(not found["wrong"] for found in judged),
            tally,
            "chair_i",
            higher_is_better=False,
            graded=True,
            rules={"words": self.vocabulary.rules},
            details=tuple(judged),
        )

    def _counts(self, picture: str, found: Mapping[str, Any]) -> dict[str, int]:
        return {
            "captions": 1,
            "with_wrong": bool(found["wrong"]),
            "mentions": len(found["mentions"]),
            "wrong": len(found["wrong"]),
            "found": len(found["found"]),
            "true": len(self.truth[picture]),
            "words": found["words"],
        }


def _add_instances(truth: dict[str, set[str]], vocabulary: Vocabulary, path: str | Path) -> None:
    names = {row["id"]: str(row["name"]).lower() for row in rows_of(path, "categories", ("id", "name"))}
    for row in rows_of(path, "images", ("id",)):
        truth.setdefault(str(row["id"]), set())
    for row in rows_of(path, "annotations", ("image_id", "category_id")):
        name = names.get(row["category_id"])
        if name is None:
            raise InputError(f"{str(path)!r}: category {row['category_id']!r} is used but not listed: file damaged?")
        if name not in vocabulary.node:
            raise InputError(f"{str(path)!r}: category {name!r} is not in the table of synonyms: add a row for it")
        truth.setdefault(str(row["image_id"]), set()).add(vocabulary.node[name])


def rows_of(path: str | Path, key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The list `key` of a COCO annotation file, each row with the `needed` fields."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {key!r} from the COCO file {str(path)!r}: {error!r}") from error
    wrong = next((k for k, row in enumerate(rows) if not isinstance(row, dict) or not set(needed) <= set(row)), None)
    if wrong is not None:
        raise InputError(f"{str(path)!r}: row {wrong + 1} of {key!r} lacks {' or '.join(needed)}: not a COCO file")
    return rows

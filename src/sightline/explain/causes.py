"""Where hallucinations come from: language, training data, style or vision. VDGD's classes, arXiv 2405.15683 (ICLR 2025).

Of every hallucinated phrase of an answer those words count that name objects. With r the rank of a word's first token in a
language model that reads the same words without the picture (`base_ranks`; 1 is the best), a word is unshifted when r <= 2 (the
published code: place 0 or 1 of the base model's list), else shifted. The shifted words are looked for in the training conversations of
the 25 pictures most like this one. A phrase with

    an unshifted word                                                          LANGUAGE
    shifted words, all of which one turn of such a conversation holds          IT       (instruction tuning or pre-training)
    other shifted words, where things are wrongly related but not invented     STYLE
    other shifted words                                                        VISION

counts as LANGUAGE and as one of the last three where both hold, and as none without a word that counts. Source: official code
Sreyan88/VDGD, hallucination_categorization. Against it: (1) a language model lists the hallucinated phrases there; here they are
given, and on generated scenes the truth tells (`wrong_phrases`). (2) Words and tokens are matched by their place in the text, not by
splitting words again. (3) Its nearest pictures came with its data; here they have the largest cosine of mean visual tokens, of the
model itself. As there, "holds" is a plain search for the letters: "cup" is in "cups", and capitals matter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sightline import scenes
from sightline.engine.attach import attach
from sightline.engine.system import Site, System
from sightline.errors import InputError, check_range
from sightline.explain.observing import prefill, prompts
from sightline.explain.ranks import ranks_unseen
from sightline.explain.scoring import answered
from sightline.scenes.naming import PLACES, place_of, synonyms

if TYPE_CHECKING:
    from PIL import Image

    from sightline.lvlm import LVLM

CLASSES = ("language", "it", "style", "vision")
UNSHIFTED = 2  # base ranks up to this one
NEAREST = 25  # pictures whose conversations are searched
_PLACE = "|".join(sorted((place for row in PLACES for place in row), key=len, reverse=True))


@dataclass(frozen=True)
class Phrase:
    """A hallucinated phrase of an answer. `relation`: it relates things wrongly that are there."""

    text: str
    relation: bool = False
    start: int | None = None  # its first character in the answer; None: where the text occurs first


@dataclass(frozen=True)
class Cause:
    """A phrase, its classes (none when no word counts), and the base rank of every word that counts."""

    phrase: Phrase
    classes: tuple[str, ...]
    words: tuple[tuple[str, int], ...]


def classify(words: Sequence[tuple[str, int]], relation: bool, turns: Sequence[str]) -> tuple[str, ...]:
    """The classes of one phrase.

    Args:
        words: its words that name objects, each with its base rank from 1 on.
        relation: a wrong relation of things that are there.
        turns: what was said in the conversations about the nearest training pictures.
    """
    shifted = [word for word, rank in words if rank > UNSHIFTED]
    found = ["language"] if len(shifted) < len(words) else []
    if shifted:
        seen = any(all(word in turn for word in shifted) for turn in turns)
        found.append("it" if seen else "style" if relation else "vision")
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training pictures as mean visual tokens of length 1, (n, D) float32, and what was said about each."""

    features: np.ndarray
    turns: tuple[tuple[str, ...], ...]

    def near(self, feature: np.ndarray, count: int = NEAREST) -> list[str]:
        """All turns about the `count` pictures most like a feature (D,), the most alike first."""
        order = np.argsort(-self.features @ feature, kind="stable")[:count]
        return [turn for k in order for turn in self.turns[k]]


class _Mean(System):
    """Keeps the mean visual token (B, D) of every row; changes nothing."""

    def visual_tokens(self, site: Site, embeddings: Tensor) -> None:
        visual = site.tokens.visual[:, site.start :, None].to(embeddings.dtype)  # (B, Q, 1)
        self.found = (embeddings * visual).sum(1) / visual.sum(1)


def picture_features(lvlm: LVLM, images: Sequence[Image.Image], *, batch: int = 8) -> np.ndarray:
    """(n, D) float32 mean visual token of every picture, as the decoder gets them, scaled to length 1."""
    found = []
    for a in range(0, len(images), batch):
        chosen = images[a : a + batch]
        seer = _Mean()
        with attach(lvlm.model, seer, host=lvlm.host):
            prefill(lvlm, prompts(lvlm, chosen, [scenes.PROMPTS["short"]] * len(chosen)))
        found.append(torch.nn.functional.normalize(seer.found.float(), dim=-1).cpu().numpy())
    return np.concatenate(found)


def world_corpus(lvlm: LVLM, n: int = 500, *, size: int = 112, batch: int = 8) -> Corpus:
    """`n` scenes of the training split, with the conversations that `sightline scenes export --format llava` writes."""
    check_range("n", n, 1, 100_000)
    drawn = [scenes.draw(seed, size=size) for seed in scenes.seeds("train", n)]
    turns = [[turn["value"] for turn in scenes.export.conversation(scene)["conversations"]] for scene in drawn]
    return Corpus(picture_features(lvlm, [scene.image for scene in drawn], batch=batch), tuple(map(tuple, turns)))


def file_corpus(
    lvlm: LVLM, data: str | Path, images: str | Path, n: int = 500, *, seed: int = 0, batch: int = 8
) -> Corpus:
    """At most `n` records with a picture of a LLaVA-format JSON file, drawn at random.

    Raises:
        InputError: unreadable or damaged file, a picture that is not there, or no record with a picture.
    """
    from sightline.evaluate.files import read_rows
    from sightline.images import open_image
    from sightline.learn.conversation import check

    check_range("n", n, 1, 100_000)
    rows = [row for row in read_rows(Path(data)) if "image" in row]
    if not rows:
        raise InputError(f"{str(data)!r} has no record with a picture: give the conversations the model was tuned on")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])
    rows = [rows[k] for k in chosen]
    turns = [tuple(text for pair in check(row, Path(images)) for text in pair) for row in rows]
    features = [
        picture_features(lvlm, [open_image(Path(images) / row["image"]) for row in rows[a : a + batch]], batch=batch)
        for a in range(0, len(rows), batch)
    ]
    return Corpus(np.concatenate(features), tuple(turns))


def hallucination_causes(
    lvlm: LVLM,
    image: Image.Image,
    question: str,
    answer: str,
    phrases: Sequence[Phrase],
    corpus: Corpus,
    *,
    objects: Collection[str] | None = None,
    nearest: int = NEAREST,
    base: Any = None,
) -> list[Cause]:
    """The classes of every hallucinated phrase of an answer.

    Args:
        answer: as the model gave it.
        phrases: what is wrong in it.
        corpus: training pictures and conversations.
        objects: words that name objects, as they are written; None: those of the generated world.
        nearest: training pictures whose conversations are searched, at most as many as there are.
        base: a causal language model of transformers with the same vocabulary; None: the model itself, without picture.

    Raises:
        InputError: the answer is empty, or a phrase is not in it.
    """
    check_range("nearest", nearest, 0, 100_000)
    spans = [_span(answer, phrase) for phrase in phrases]
    if not phrases:
        return []
    inputs = prompts(lvlm, [image], [question])
    ids = answered(lvlm, inputs, answer, 0)
    ranks = ranks_unseen(lvlm, inputs, ids, base)
    starts = _starts(lvlm.processor.tokenizer, ids, answer)
    turns = corpus.near(picture_features(lvlm, [image])[0], nearest) if nearest else []
    found = []
    for phrase, (first, end) in zip(phrases, spans, strict=True):
        words = [(m[0], first + m.start()) for m in re.finditer(r"\w+", answer[first:end])]
        counted = tuple(
            (word, int(ranks[np.searchsorted(starts, place, side="right") - 1]))
            for word, place in words
            if (word.lower() in synonyms() if objects is None else word in objects)
        )
        found.append(Cause(phrase, classify(counted, phrase.relation, turns), counted))
    return found


def _span(answer: str, phrase: Phrase) -> tuple[int, int]:
    first = answer.find(phrase.text, phrase.start or 0)
    if not phrase.text.strip() or first < 0 or (phrase.start is not None and first != phrase.start):
        raise InputError(f"the phrase {phrase.text!r} is not in the answer {answer[:60]!r}: give it as it stands there")
    return first, first + len(phrase.text)


def _starts(tokenizer: Any, ids: Sequence[int], answer: str) -> np.ndarray:
    """(T,) the first character of every token in `answer`; what a tokenizer puts before the answer counts as its start."""
    ends = [len(tokenizer.decode(list(ids[:k]), skip_special_tokens=True)) for k in range(len(ids) + 1)]
    return np.maximum(np.array(ends[:-1]) - (ends[-1] - len(answer)), 0)


def wrong_phrases(scene: scenes.Scene, text: str) -> list[Phrase]:
    """What a caption says wrongly of a scene: kinds that are not there, and places ("a cup at the top") where none is."""
    there = {kind: {place_of(o, scene.size) for o in scene.objects if o.kind == kind} for kind in scene.counts()}
    found = []
    for match in re.finditer(r"[A-Za-z]+", text):
        kind = synonyms().get(match[0].lower())
        placed = re.match(rf"(?: is)? ({_PLACE})\b", text[match.end() :])
        if kind is not None and kind not in there:
            found.append(Phrase(match[0], start=match.start()))
        elif kind is not None and placed and placed[1] not in there[kind]:
            found.append(Phrase(match[0] + placed[0], relation=True, start=match.start()))
    return found


def caption_causes(
    lvlm: LVLM,
    drawn: Sequence[scenes.Scene],
    corpus: Corpus,
    *,
    length: int = 160,
    nearest: int = NEAREST,
    base: Any = None,
    batch: int = 8,
    progress: bool = False,
) -> list[tuple[str, list[Cause]]]:
    """Have generated scenes described in detail (greedy, at most `length` tokens): per scene the caption and its causes."""
    question = scenes.PROMPTS["detailed"]
    found = []
    for a in track(range(0, len(drawn), batch), "captions", console=Console(stderr=True), disable=not progress):
        chosen = drawn[a : a + batch]
        captions = lvlm.ask([s.image for s in chosen], [question] * len(chosen), max_new_tokens=length)
        for scene, caption in zip(chosen, captions, strict=True):
            wrong = wrong_phrases(scene, caption)
            causes = hallucination_causes(
                lvlm, scene.image, question, caption, wrong, corpus, nearest=nearest, base=base
            )
            found.append((caption, causes))
    return found

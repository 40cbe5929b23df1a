"""The object words of a caption, as CHAIR reads COCO captions (github.com/LisaAnne/Hallucination, utils/chair.py).

Lower case, split, reduce to base forms, merge pairs that are one thing ("hot dog" is no dog), then look up in the table
of synonyms, whose rows ("person, girl, boy, ...") each stand for their first word. The table is a file of the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sightline.errors import InputError, MissingExtraError, UnknownNameError, nearest

PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
    "laptop computer", "home plate", "train track",
)  # fmt: skip
ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
MERGED = {
    **{pair: pair for pair in PAIRS},
    **{f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")},  # else "baby" counts as a person
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # what lemmatising makes of "glass"
}
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "geese": "goose", "mice": "mouse", "oxen": "ox",
    "knives": "knife", "loaves": "loaf", "calves": "calf", "wolves": "wolf", "shelves": "shelf",
}  # fmt: skip

Lemmas = Callable[[str], list[str]]  # a lower-case text -> its words in base form


def merge_pairs(words: Sequence[str], merged: Mapping[str, str] = MERGED) -> list[str]:
    """Join neighbours that are one thing, from left to right."""
    found, k = [], 0
    while k < len(words):
        pair = " ".join(words[k : k + 2])
        if k + 1 < len(words) and pair in merged:
            found.append(merged[pair])
            k += 2
        else:
            found.append(words[k])
            k += 1
    return found


def simple_lemmas(text: str, known: Iterable[str] = ()) -> list[str]:
    """Words and marks without any library: a plural becomes singular when the singular is a known word.

    It knows no parts of speech, so verbs keep their form; against the published rules a few mentions differ.
    """
    return [_singular(word, frozenset(known)) for word in re.findall(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]", text)]


def _singular(word: str, known: frozenset[str]) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    forms = [word]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("s"):
        forms.append(word[:-1])
    return next((form for form in forms if form in known), word)


def nltk_lemmas(text: str) -> list[str]:
    """The published rules: nltk's word_tokenize, pos_tag and WordNet lemmatiser (noun where the tag says nothing else).

    Raises:
        MissingExtraError: nltk or its data is not installed.
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer
    except ImportError as error:
        raise MissingExtraError(
            'CHAIR\'s published word rules need nltk: pip install "sightline[eval]", or choose words="simple"'
        ) from error
    lemmatise, parts = WordNetLemmatizer().lemmatize, {"J": "a", "V": "v", "N": "n", "R": "r"}
    try:
        return [lemmatise(word, pos=parts.get(tag[0], "n")) for word, tag in nltk.pos_tag(nltk.word_tokenize(text))]
    except LookupError as error:
        raise MissingExtraError(
            "nltk lacks its data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet, "
            'or choose words="simple"'
        ) from error


@dataclass(frozen=True)
class Vocabulary:
    """A table of synonyms with the rules that read a caption."""

    node: Mapping[str, str]  # word -> the object it names
    lemmas: Lemmas
    rules: str  # "nltk", "simple" or "scenes": stated in the result

    def read(self, caption: str) -> tuple[list[str], int]:
        """The objects a caption mentions (one entry per mention, in order), and its length in words and marks."""
        words = merge_pairs(self.lemmas(caption.lower()), MERGED if self.rules != "scenes" else {})
        kept = [word for word in words if not (word == "seat" and "toilet" in words)]
        return [self.node[word] for word in kept if word in self.node], len(words)


def read_synonyms(path: str | Path) -> dict[str, str]:
    """Word -> object from a table of rows "person, girl, boy, ..." (synonyms.txt of the published CHAIR).

    Rows are split at comma and space, and words stay as they are written, as in the published scorer: what the file writes
    with a further space or a capital (" motor bike", " cheesecake", "iPhone") is never met in a caption, and so not counted.

    Raises:
        InputError: the file cannot be read, or is no such table.
    """
    try:
        rows = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the synonyms {str(path)!r}: {error}; give CHAIR's synonyms.txt") from error
    table: dict[str, str] = {}
    for row in rows:
        words = [word for word in row.strip().split(", ") if word]
        table |= {word: words[0] for word in words}
    if len(table) < 2 or any(len(word) > 40 for word in table):
        raise InputError(f"{str(path)!r} is no table of synonyms: rows like 'person, girl, boy' are expected")
    return table


def coco_vocabulary(synonyms: str | Path, words: str = "nltk") -> Vocabulary:
    """The vocabulary of COCO captions. `words`: "nltk" (published rules) or "simple" (no library)."""
    node = read_synonyms(synonyms)
    if words == "nltk":
        nltk_lemmas("a dog")  # fail now, not in mid-run
        return Vocabulary(node, nltk_lemmas, "nltk")
    if words != "simple":
        raise UnknownNameError(f"no word rules {words!r}: {nearest(str(words), ['nltk', 'simple'])}")
    known = frozenset(node) | {part for pair in MERGED for part in pair.split()}
    return Vocabulary(node, lambda text: simple_lemmas(text, known), "simple")


def scene_vocabulary() -> Vocabulary:
    """The vocabulary of the generated world: every word form of its kinds, as in `scenes.mentions`."""
    from sightline.scenes.naming import synonyms

    return Vocabulary(synonyms(), lambda text: re.findall(r"[a-z]+", text), "scenes")

"""Tasks from published files that the user has: POPE, COCO annotations for CHAIR, MME; also copies that hold
their pictures (see `embedded`).

Nothing is downloaded. Pictures that are not there are named and counted; the caller decides whether to go on without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sightline.errors import InputError
from sightline.evaluate import chair, embedded, mme, scoring
from sightline.evaluate.coco_words import coco_vocabulary, scene_vocabulary
from sightline.evaluate.scored import check_labels
from sightline.evaluate.task import Item, Task, check_items, subset

QUESTION_KEYS = ("text", "question", "query", "prompt")
LABEL_KEYS = ("label", "answer", "gt_answer", "ground_truth")
IMAGE_KEYS = ("image", "image_source", "image_name", "file_name")
ID_KEYS = ("question_id", "id")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CHAIR_PROMPT, CHAIR_TOKENS = "Please describe this image in detail.", 512
MME_SUFFIX = " Please answer yes or no."
MME_TASKS = (*mme.PERCEPTION, *mme.COGNITION)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON array or of JSON lines. InputError names the file and the line that is damaged."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise InputError(f"{str(path)!r} is empty")
    rows = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    wrong = next((k for k, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise InputError(f"{str(path)!r}: entry {wrong + 1} is no JSON object but {str(rows[wrong])[:40]!r}")
    return rows


def _array(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{str(path)!r} is damaged or cut off: {error}; fetch it again") from error


def _lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{str(path)!r}, line {number} is no JSON ({error}): the file is damaged, cut off or of another kind"
            ) from error
    return rows


def _first(row: Mapping[str, Any], keys: Sequence[str], path: Path, number: int) -> Any:
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise InputError(f"{str(path)!r}, question {number} has no {keys[0]!r}: it has {', '.join(row) or 'nothing'}")


class Album:
    """Finds pictures by name in a folder: as named, without or with COCO's prefix, or with an extension added."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise InputError(f"the folder of pictures {str(folder)!r} is not there: give --images FOLDER")

    def find(self, name: str) -> Path | None:
        """The path of a picture; None when it is not there or empty."""
        bare = Path(name).name
        names = [name, bare, bare.removeprefix("COCO_val2014_"), f"COCO_val2014_{bare}"]
        if Path(name).suffix.lower() not in PICTURES:
            names += [f"{n}{ending}" for n in tuple(names) for ending in PICTURES]
        paths = (self.folder / n for n in names)
        return next((path for path in paths if path.is_file() and path.stat().st_size), None)

    def split(self, items: Sequence[Item]) -> tuple[list[Item], tuple[str, ...]]:
        """The items whose picture is there, and the names of the missing pictures."""
        there = {name: self.find(name) is not None for name in dict.fromkeys(item.picture for item in items)}
        return [i for i in items if there[i.picture]], tuple(name for name, found in there.items() if not found)

    def open(self, item: Item) -> Path:
        """Where an item's picture is."""
        found = self.find(item.picture)
        if found is None:
            raise InputError(f"picture {item.picture!r} is no longer in {str(self.folder)!r}: put it back, run again")
        return found


def pope(
    path: str | Path, images: str | Path | None = None, n: int | None = None, seed: int = 0, rule: str = "official"
) -> list[Task]:
    """POPE questions from any copy in circulation: JSON, JSON lines, VLMEvalKit's TSV, lmms-lab's Parquet.

    One task, or one per category where the file names them (random, popular, adversarial together). Texts are taken as
    they stand, with the "an ... in the imange?" lines that survive in several copies: correcting them would change
    published figures. `images` is needed where the file holds no pictures.

    Raises:
        InputError: unreadable, damaged or foreign file, duplicate question ids, or no folder of pictures.
        MissingExtraError: Parquet needs pyarrow.
    """
    path = Path(path)
    if path.suffix in embedded.ENDINGS:
        rows, album = embedded.read(path)
    else:
        rows, album = read_rows(path), Album(images or path.parent / "images")
    splits: dict[str, list[Item]] = {}
    rows = [one for number, row in enumerate(rows, 1) for one in _singles(row, path, number)]
    for number, row in enumerate(rows, 1):
        truth = _truth(row, path, number)
        given = next((row[key] for key in ID_KEYS if row.get(key) is not None), number)
        question = str(_first(row, QUESTION_KEYS, path, number)).replace("<image>", "").strip()
        image = str(_first(row, IMAGE_KEYS, path, number))
        splits.setdefault(str(row.get("category") or ""), []).append(Item(str(given), image, question, truth))
    return [_pope_task(path, split, items, album, n, seed, rule) for split, items in (splits or {"": []}).items()]


def _singles(row: Mapping[str, Any], path: Path, number: int) -> list[Mapping[str, Any]]:
    """The questions of a row, one by one: POPE-chat's files hold lists of a picture's questions and labels."""
    asked, labels = (next((row[k] for k in keys if k in row), None) for keys in (QUESTION_KEYS, LABEL_KEYS))
    if not isinstance(asked, list):
        return [row]
    if not isinstance(labels, list) or len(labels) != len(asked):
        raise InputError(f"{str(path)!r}, entry {number}: {len(asked)} questions need a list of as many labels")
    name = next((row[key] for key in ID_KEYS if row.get(key) is not None), number)
    whole = {key: value for key, value in row.items() if key not in QUESTION_KEYS + LABEL_KEYS}
    return [
        {**whole, "question_id": f"{name}-{k}", "text": text, "label": label}
        for k, (text, label) in enumerate(zip(asked, labels, strict=True), 1)
    ]


def _pope_task(
    path: Path, split: str, items: list[Item], album: Album | embedded.Pictures, n: int | None, seed: int, rule: str
) -> Task:
    name = f"{path.stem}_{split}" if split and split not in path.stem else path.stem
    chosen, missing = album.split(subset(check_items(name, items), n, seed))
    score = partial(scoring.score_pope, rule=rule)
    return Task(name, str(path), tuple(chosen), album.open, score, max_new_tokens=16, missing=missing)


def coco_chair(
    folder: str | Path,
    images: str | Path | None = None,
    synonyms: str | Path | None = None,
    words: str = "nltk",
    n: int | None = 500,
    seed: int = 0,
) -> Task:
    """CHAIR on COCO: `folder` holds instances*.json and captions*.json (in it or in annotations/).

    Captions are asked of the pictures of the val files where there are such, truth comes from all files. `synonyms`
    defaults to synonyms.txt beside them; an export of the generated world needs none.

    Raises:
        InputError: no annotations, damaged files, or no folder of pictures. MissingExtraError: nltk is needed.
    """
    folder = Path(folder).expanduser()
    instances, captions = (_annotation_files(folder, kind) for kind in ("instances", "captions"))
    album = Album(images or folder / "images")
    table = Path(synonyms) if synonyms else next(folder.rglob("synonyms.txt"), None)
    if table is None and not _is_world(instances):
        raise InputError(f"no synonyms.txt in {str(folder)!r}: give CHAIR's table with --synonyms FILE")
    vocabulary = scene_vocabulary() if table is None else coco_vocabulary(table, words)
    scorer = chair.Chair.from_files(vocabulary, instances, captions)
    asked = [path for path in instances if "val" in path.name] or instances
    rows = [row for path in asked for row in chair.rows_of(path, "images", ("id", "file_name"))]
    items = [
        Item(str(row["id"]), row["file_name"], CHAIR_PROMPT, "", {"objects": sorted(scorer.truth[str(row["id"])])})
        for row in rows
    ]
    chosen, missing = album.split(subset(check_items("chair", items), n, seed))
    score = partial(scoring.score_coco_chair, vocabulary=vocabulary)
    source = ", ".join(str(path) for path in (*instances, *captions, *([table] if table else ())))
    return Task("chair", source, tuple(chosen), album.open, score, max_new_tokens=CHAIR_TOKENS, missing=missing)


def _annotation_files(folder: Path, kind: str) -> list[Path]:
    found = sorted([*folder.glob(f"{kind}*.json"), *(folder / "annotations").glob(f"{kind}*.json")])
    if not found:
        raise InputError(f"no {kind}*.json in {str(folder)!r} or its annotations/: give COCO's annotation folder")
    return found


def _is_world(instances: Sequence[Path]) -> bool:
    from sightline.scenes import KINDS

    return all(row["name"] in KINDS for path in instances for row in chair.rows_of(path, "categories", ("name",)))


def mme_files(path: str | Path, n: int | None = None, seed: int = 0) -> Task:
    """MME as its authors give it out: a folder per subtask, with pictures and text files side by side or in `images/` and
    `questions_answers_YN/`; a text file holds two lines "question<tab>Yes" for the picture of the same name. Or a copy in
    one file: VLMEvalKit's TSV, lmms-lab's Parquet.

    Raises:
        InputError: no subtask, or a file of another form. MissingExtraError: Parquet needs pyarrow.
    """
    path = Path(path).expanduser()
    album: Album | embedded.Pictures
    if path.suffix in embedded.ENDINGS:
        rows, album = embedded.read(path)
        items = [_mme_item(path, k, row) for k, row in enumerate(rows)]
    else:
        album = Album(path)
        tasks = [task for task in MME_TASKS if (path / task).is_dir()]
        if not tasks:
            raise InputError(
                f"no subtask of MME in {str(path)!r}: folders named {', '.join(MME_TASKS[:4])}, ... are expected"
            )
        items = [item for task in tasks for item in _mme_items(path, task)]
    chosen, missing = album.split(subset(check_items("mme", items), n, seed))
    return Task("mme", str(path), tuple(chosen), album.open, scoring.score_mme, max_new_tokens=16, missing=missing)


def _mme_item(path: Path, number: int, row: Mapping[str, Any]) -> Item:
    task = str(_first(row, ("category",), path, number + 1))
    if task not in MME_TASKS:
        raise InputError(f"{str(path)!r}, question {number + 1}: {task!r} is no subtask of MME")
    label = _truth(row, path, number + 1)
    question = _mme_question(str(_first(row, QUESTION_KEYS, path, number + 1)))
    return Item(f"{task}/{number}", row["image"], question, label, {"task": task})


def _truth(row: Mapping[str, Any], path: Path, number: int) -> str:
    """The answer of question `number` of a file: "yes" or "no"."""
    label = str(_first(row, LABEL_KEYS, path, number))
    try:
        return "yes" if check_labels([label])[0] else "no"
    except InputError:
        raise InputError(f"{str(path)!r}, question {number}: label {label!r} is neither yes nor no") from None


def _mme_question(text: str) -> str:
    text = text.strip()
    return text if text.endswith(MME_SUFFIX.strip()) else text + MME_SUFFIX


def _mme_items(folder: Path, task: str) -> list[Item]:
    texts_in = folder / task / "questions_answers_YN"
    pictures = f"{task}/images" if texts_in.is_dir() else task
    items = []
    for path in sorted((texts_in if texts_in.is_dir() else folder / task).glob("*.txt")):
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {str(path)!r}: {error}") from error
        fields = [line.split("\t") for line in lines]
        if len(fields) != 2 or any(len(f) != 2 or f[1].strip().lower() not in ("yes", "no") for f in fields):
            raise InputError(f"{str(path)!r}: two lines 'question<tab>Yes' or 'No' are expected")
        for k, (question, label) in enumerate(fields):
            text = _mme_question(question)
            truth = label.strip().lower()
            items.append(Item(f"{task}/{path.stem}-{k}", f"{pictures}/{path.stem}", text, truth, {"task": task}))
    return items

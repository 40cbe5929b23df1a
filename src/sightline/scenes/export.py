"""Write scenes as data sets others can read: COCO instances and captions, LLaVA conversations, POPE questions.

COCO: cocodataset.org/#format-data. LLaVA: the fine-tuning JSON of Liu et al., NeurIPS 2023, arXiv 2304.08485.
POPE: one JSON object a line, as in github.com/RUCAIBox/POPE. Everything follows from the seeds alone: an export that
was interrupted is completed by running it again, and running it twice changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from sightline.images import SOFTWARE
from sightline.scenes.asking import questions
from sightline.scenes.asking_films import film_questions
from sightline.scenes.captions import PROMPTS, caption
from sightline.scenes.drawing import draw
from sightline.scenes.files import Folder
from sightline.scenes.film import Film
from sightline.scenes.kinds import KINDS
from sightline.scenes.moving import film as draw_film
from sightline.scenes.polling import POPE_SPLITS
from sightline.scenes.polling import pope as pope_rows
from sightline.scenes.scene import Scene

IMAGES = "images"


def rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a (H, W) bool mask: column-major, starting with the zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": [int(side) for side in mask.shape], "counts": [0, *runs] if flat[0] else runs}


def _drawn(source: Iterable[int | Scene], size: int) -> Iterator[Scene]:
    for item in source:
        yield item if isinstance(item, Scene) else draw(item, size=size)


def _generator(scene: Scene | Film, purpose: int) -> np.random.Generator:
    """Random numbers that depend on the scene's seed and on what they are for, not on the order of the export."""
    return np.random.Generator(np.random.PCG64([scene.seed, purpose]))


def _array(lines: Iterable[str]) -> Iterator[str]:
    """A JSON array, one row a line, as they come."""
    yield "["
    for k, line in enumerate(lines):
        yield ("," if k else "") + "\n" + line.rstrip("\n")
    yield "\n]\n"


def _annotations(scene: Scene, first_id: int) -> list[dict]:
    rows = []
    for k, thing in enumerate(scene.objects):
        x0, y0, x1, y1 = thing.box
        row = {
            "id": first_id + k,
            "image_id": scene.seed,
            "category_id": KINDS[thing.kind].category_id,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": thing.area,
            "segmentation": rle(thing.mask),
            "iscrowd": 0,
            "attributes": {"colour": thing.colour, "size": thing.size, "mark": thing.mark},
        }
        rows.append(row)
    return rows


class _Spool:
    """Rows kept on disk until they are needed, so that memory does not grow with the export."""

    def __init__(self) -> None:
        self._file = TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the object
        self.n = 0

    def add(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self.n += 1

    def array(self) -> Iterator[str]:
        """The rows as a JSON array."""
        self._file.seek(0)
        return _array(self._file)


def _coco(images: _Spool, annotations: _Spool, categories: list[dict] | None) -> Iterator[str]:
    info = {"description": "sightline generated world", "version": "1.0"}
    yield f'{{"info": {json.dumps(info)},\n"images": '
    yield from images.array()
    if categories is not None:
        yield f',"categories": {json.dumps(categories)}\n'
    yield ',"annotations": '
    yield from annotations.array()
    yield "}\n"


def coco(source: Iterable[int | Scene], out: str | Path, *, size: int = 112, captions: int = 5) -> list[Path]:
    """Write images/, annotations/instances.json and annotations/captions.json of seeds or scenes into `out`.

    Boxes are [x, y, width, height] in pixels of the visible part, `area` counts its pixels, `segmentation` is
    uncompressed RLE, `image_id` is the seed. `captions` per picture, the last one detailed. Raises InputError.
    """
    folder = Folder(out)
    names = ("annotations/instances.json", "annotations/captions.json")
    for name in names:
        folder.check(name)
    images, instances, texts = _Spool(), _Spool(), _Spool()
    for scene in _drawn(source, size):
        folder.picture(f"{IMAGES}/{scene.file_name}", scene.image)
        images.add({"id": scene.seed, "file_name": scene.file_name, "width": scene.size, "height": scene.size})
        for row in _annotations(scene, instances.n + 1):
            instances.add(row)
        rng = _generator(scene, 1)
        for k in range(captions):
            text = caption(scene, rng, "detailed" if k == captions - 1 else "short")
            texts.add({"id": texts.n + 1, "image_id": scene.seed, "caption": text})
    categories = [{"id": k.category_id, "name": k.name, "supercategory": k.supercategory} for k in KINDS.values()]
    return [
        folder.text(names[0], _coco(images, instances, categories)),
        folder.text(names[1], _coco(images, texts, None)),
    ]


def conversation(scene: Scene, turns: int = 6) -> dict:
    """A LLaVA-format record about a scene: a description and up to `turns` questions, in any order."""
    rng = _generator(scene, 2)
    style = list(PROMPTS)[int(rng.integers(len(PROMPTS)))]
    pairs = [(PROMPTS[style], caption(scene, rng, style))]
    pairs += [(question.text, question.answer) for question in questions(scene, rng, turns)]
    pairs = [pairs[int(k)] for k in rng.permutation(len(pairs))]
    talk: list[dict] = []
    for asked, answer in pairs:
        talk.append({"from": "human", "value": asked if talk else f"<image>\n{asked}"})
        talk.append({"from": "gpt", "value": answer})
    return {"id": str(scene.seed), "image": scene.file_name, "conversations": talk}


def llava(source: Iterable[int | Scene], out: str | Path, *, size: int = 112, turns: int = 6) -> list[Path]:
    """Write images/ and conversations.json: one conversation a picture, a description and up to `turns` questions.

    `image` is relative to images/ (LLaVA's --image_folder). Raises InputError.
    """
    folder = Folder(out)
    folder.check("conversations.json")

    def rows() -> Iterator[str]:
        for scene in _drawn(source, size):
            folder.picture(f"{IMAGES}/{scene.file_name}", scene.image)
            yield json.dumps(conversation(scene, turns))

    return [folder.text("conversations.json", _array(rows()))]


@dataclass(frozen=True)
class _Counted:
    """What POPE needs of a scene once its picture is written."""

    file_name: str
    present: dict[str, int]

    def counts(self) -> dict[str, int]:
        return self.present


def pope(
    source: Iterable[int | Scene],
    out: str | Path,
    *,
    size: int = 112,
    per_image: int = 6,
    splits: Sequence[str] = POPE_SPLITS,
    seed: int = 0,
) -> list[Path]:
    """Write images/ and scenes_pope_{random,popular,adversarial}.json, JSON lines as in the published files.

    All splits share their positive questions' law but are drawn independently from `seed`. Raises InputError.
    """
    folder = Folder(out)
    names = {split: f"scenes_pope_{split}.json" for split in splits}
    for name in names.values():
        folder.check(name)
    seen = []
    for scene in _drawn(source, size):
        folder.picture(f"{IMAGES}/{scene.file_name}", scene.image)
        seen.append(_Counted(scene.file_name, scene.counts()))
    paths = []
    for split, name in names.items():
        rng = np.random.Generator(np.random.PCG64(seed))
        lines = (json.dumps(row) + "\n" for row in pope_rows(seen, split, per_image, rng))
        paths.append(folder.text(name, lines))
    return paths


def film_truth(film: Film) -> dict:
    """All of a film but its pixels as plain JSON values: tracks with boxes and RLE masks per frame, and events."""
    truth = film.truth()
    for row, track in zip(truth["tracks"], film.tracks, strict=True):
        row["masks"] = [rle(mask) if box else None for mask, box in zip(track.masks, track.boxes, strict=True)]
    return truth


def gif(film: Film, seconds: float = 4.0) -> bytes:
    """The film as an animated GIF that runs for ever; colours are those of one palette of 256."""
    palette = film.frames[len(film) // 2].quantize(256)
    pages = [frame.quantize(palette=palette, dither=0) for frame in film.frames]
    buffer = BytesIO()
    pages[0].save(
        buffer, "GIF", save_all=True, append_images=pages[1:], duration=round(1000 * seconds / len(film)), loop=0,
        comment=SOFTWARE.encode(),
    )  # fmt: skip
    return buffer.getvalue()


def films(
    source: Iterable[int | Film], out: str | Path, *, size: int = 112, frames: int = 32, turns: int = 6
) -> list[Path]:
    """Write every film as `NAME/frame_000.png` ..., NAME.gif and NAME.json (its truth), and conversations.json.

    conversations.json has one row a film in LLaVA's form, with "video": NAME instead of "image", and up to `turns`
    questions; "moments" lists, per question, the frames that decide it. Raises InputError, ParameterError.
    """
    folder = Folder(out)
    folder.check("conversations.json")

    def rows() -> Iterator[str]:
        for item in source:
            film = item if isinstance(item, Film) else draw_film(item, size=size, frames=frames)
            write_film(folder, film)
            asked = film_questions(film, _generator(film, 3), turns)
            talk = [{"from": who, "value": text} for q in asked for who, text in (("human", q.text), ("gpt", q.answer))]
            if talk:
                talk[0]["value"] = f"<video>\n{talk[0]['value']}"
            moments = [list(q.frames) for q in asked]
            yield json.dumps({"id": str(film.seed), "video": film.name, "conversations": talk, "moments": moments})

    return [folder.text("conversations.json", _array(rows()))]


def write_film(folder: Folder, film: Film) -> Path:
    """Frames, GIF and truth of one film; returns the folder of its frames."""
    for k, frame in enumerate(film.frames):
        folder.picture(f"{film.name}/frame_{k:03d}.png", frame)
    folder.binary(f"{film.name}.gif", [gif(film)])
    folder.text(f"{film.name}.json", [json.dumps(film_truth(film)), "\n"])
    return folder.root / film.name

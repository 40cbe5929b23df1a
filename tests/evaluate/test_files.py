"""Published file formats: every copy of POPE, COCO for CHAIR, MME folders; damage, duplicates, missing pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
import sys
from pathlib import Path

import pytest
from PIL import Image

from sightline import scenes
from sightline.errors import InputError, MissingExtraError, ParameterError, UnknownNameError
from sightline.evaluate import files
from sightline.evaluate.finding import find
from sightline.evaluate.task import Item, subset
from sightline.images import open_image

ROWS = [
    {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000000001.jpg", "text": "Is there an elephant in the imange?", "label": "no"},
    {"question_id": 3, "image": "COCO_val2014_000000000002.jpg", "text": "Is there a cat in the image?", "label": "no"},
]  # fmt: skip
FORMS = {
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "lines with a byte order mark": lambda rows: "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n",
    "array": json.dumps,
    "other names": lambda rows: json.dumps(
        [{"id": r["question_id"], "image_source": r["image"][13:-4], "question": r["text"], "answer": r["label"].title()} for r in rows]
    ),
    "prompt with a placeholder": lambda rows: json.dumps([{**r, "text": "<image>\n" + r["text"]} for r in rows]),
}  # fmt: skip


def picture(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for k in (1, 2):
        picture(tmp_path / "images" / f"COCO_val2014_{k:012d}.jpg")
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_every_copy_of_pope(folder, form):
    path = folder / "coco_pope_random.json"
    path.write_text(FORMS[form](ROWS), encoding="utf-8")
    task = find(f"pope:{path}")[0]
    assert [(i.id, i.question, i.truth) for i in task.items] == [
        (str(r["question_id"]), r["text"], r["label"]) for r in ROWS
    ]
    assert task.open(task.items[0]).name == "COCO_val2014_000000000001.jpg"
    assert task.name == "coco_pope_random"
    found = task.score(task.items, [{"answer": a} for a in ("Yes", "Yes", "No")])
    assert found.correct == (True, False, True)


SPLITS = ("random", "popular", "adversarial")


def embedded_rows():
    """Two pictures, and the questions of ROWS under every split, with ids that repeat from split to split."""
    pictures = {}
    for k, name in enumerate(dict.fromkeys(row["image"] for row in ROWS)):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (200 * k, 0, 0)).save(buffer, "PNG")
        pictures[name] = buffer.getvalue()
    rows = [
        {"id": f"{100 * s + k}", "question_id": row["question_id"], "question": row["text"], "answer": row["label"],
         "image_source": row["image"][:-4], "image": pictures[row["image"]], "category": split}
        for s, split in enumerate(SPLITS) for k, row in enumerate(ROWS)
    ]  # fmt: skip
    return rows


def check_embedded(tasks, path):
    assert [task.name for task in tasks] == [f"{path.stem}_{split}" for split in SPLITS]
    for task in tasks:
        assert [(i.question, i.truth) for i in task.items] == [(r["text"], r["label"]) for r in ROWS]
        assert task.items[0].picture == task.items[1].picture != task.items[2].picture
        reds = [open_image(task.open(item)).getpixel((0, 0))[0] for item in task.items]
        assert reds == [0, 0, 200]
        assert pickle.loads(pickle.dumps(task)).open(task.items[2]).getpixel((0, 0))[0] == 200


def test_pope_in_a_tsv(tmp_path):
    """VLMEvalKit's form: base64, a picture that was shown before is named by the row's index; a quoted line break."""
    path, seen = tmp_path / "POPE.tsv", {}
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["index", "image", "question", "answer", "category", "note"])
        for k, row in enumerate(embedded_rows()):
            cell = seen.get(row["image_source"], base64.b64encode(row["image"]).decode())
            seen.setdefault(row["image_source"], k)
            table.writerow([k, cell, row["question"], row["answer"].title(), row["category"], 'two\n"lines"'])
    check_embedded(find(f"pope:{path}"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"adversarial")])
    with pytest.raises(InputError, match=r"line 10 has another number of columns.*cut off"):
        find(f"pope:{path}")
    path.write_bytes(whole.replace(b"\n1\t0\t", b"\n1\t77\t"))
    with pytest.raises(InputError, match="row '77', which is not above"):
        find(f"pope:{path}")
    path.write_bytes(whole.replace(b"\n1\t0\t", b"\n1\t\t"))
    with pytest.raises(InputError, match="row 2 has no picture"):
        find(f"pope:{path}")


def test_pope_in_a_parquet_file(tmp_path):
    """lmms-lab's form: bytes with a path, three splits in one file."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'sightline[eval]'")
    from pyarrow import parquet

    path = tmp_path / "test-00000.parquet"
    rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in embedded_rows()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    check_embedded(find(f"pope:{path}"), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="no Parquet file or is cut off"):
        find(f"pope:{path}")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"sightline\[eval\]"):
        find(f"pope:{tmp_path / 'x.parquet'}")


def test_mme_in_a_tsv(tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "MME.tsv"
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    lines = ["index\timage\tquestion\tanswer\tcategory\timage_path"]
    for k, (task, label) in enumerate((t, a) for t in ("OCR", "count") for a in ("Yes", "No")):
        lines.append(f"{k}\t{picture}\tIs it {label}?\t{label}\t{task}\t{task}/1.png")
    path.write_text("\n".join(lines) + "\n")
    task = find(f"mme:{path}")[0]
    assert {i.question for i in task.items} == {f"Is it {x}? Please answer yes or no." for x in ("Yes", "No")}
    assert task.open(task.items[0]).size == (8, 8)
    assert task.score(task.items, [{"answer": i.truth} for i in task.items])["score"] == 400
    path.write_text("\n".join(lines).replace("OCR\t", "OCD\t"))
    with pytest.raises(InputError, match="'OCD' is no subtask of MME"):
        find(f"mme:{path}")


def test_a_file_with_all_splits_is_three_tasks(folder):
    path = folder / "all.json"
    path.write_text(json.dumps([{**row, "category": split} for split in SPLITS for row in ROWS]))
    assert [(task.name, len(task.items)) for task in find(f"pope:{path}")] == [(f"all_{s}", 3) for s in SPLITS]


def test_without_the_prefix(folder):
    bare = folder / "bare"
    for k in (1, 2):
        picture(bare / f"{k:012d}.jpg")
    path = folder / "p.json"
    path.write_text(FORMS["lines"](ROWS))
    assert find(f"pope:{path}", images=bare)[0].open(Item("", ROWS[0]["image"], "")).name == "000000000001.jpg"


def test_our_own_export_is_read(tmp_path):
    drawn = [scenes.draw(k, size=56) for k in range(6)]
    path = scenes.export.pope(drawn, tmp_path, size=56)[2]
    task = find(f"pope:{path}")[0]
    assert len(task.items) % 6 == 0
    assert all(task.score(task.items, [{"answer": i.truth} for i in task.items]).correct)
    scenes.export.coco(drawn, tmp_path, size=56, captions=2)
    chair = find(f"chair:{tmp_path}", n=3)[0]
    said = [{"answer": " ".join(item.tags["objects"])} for item in chair.items]
    found = chair.score(chair.items, said)
    assert len(chair.items) == 3
    assert (found["chair_i"], found["recall"]) == (0, 1)
    table = tmp_path / "synonyms.txt"
    table.write_text("\n".join(scenes.KINDS))
    assert find(f"chair:{tmp_path}", words="simple")[0].score(chair.items, said)["recall"] == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ('{"question_id": 1, "image"', "line 1 is no JSON"),
        (FORMS["lines"](ROWS)[:-9], "line 3 is no JSON"),
        (json.dumps(ROWS)[:-9], "damaged or cut off"),
        ("[1, 2]", "entry 1 is no JSON object"),
        ('{"caption": "a dog"}', "question 1 has no 'label': it has caption"),
        (
            json.dumps([ROWS[0], {**ROWS[1], "label": "maybe"}]),
            r"p.json', question 2: label 'maybe' is neither yes nor no",
        ),
        (json.dumps([ROWS[0], ROWS[0]]), "1 ids occur more than once, for example '1'"),
        ("[]", "no questions"),
    ],
)
def test_damaged_and_foreign_files(folder, text, named):
    path = folder / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        find(f"pope:{path}")


def test_missing_pictures_are_named_and_counted(folder):
    path = folder / "p.json"
    path.write_text(FORMS["lines"](ROWS))
    (folder / "images" / "COCO_val2014_000000000002.jpg").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"1 of 2 pictures are missing \(COCO_val2014_000000000002.jpg\).*--skip-missing"
    ):
        find(f"pope:{path}")
    task = find(f"pope:{path}", skip_missing=True)[0]
    assert len(task.items) == 2
    assert task.facts()["missing_pictures"] == 1
    (folder / "images" / "COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(InputError, match="2 of 2 pictures"):
        find(f"pope:{path}", skip_missing=True)
    with pytest.raises(InputError, match="--images FOLDER"):
        find(f"pope:{path}", images=folder / "none")


@pytest.mark.parametrize("nested", [False, True])
def test_mme_folders(tmp_path, nested):
    for task, stem in (("existence", "0001"), ("OCR", "a.b")):
        where = tmp_path / task
        picture(where / ("images" if nested else ".") / f"{stem}.jpg")
        text = where / ("questions_answers_YN" if nested else ".") / f"{stem}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("Is it so? Please answer yes or no.\tYes\nIs it not so?\tNo\n")
    task = find(f"mme:{tmp_path}")[0]
    assert [item.truth for item in task.items] == ["yes", "no"] * 2
    assert {item.question for item in task.items} == {f"Is it {x}so? Please answer yes or no." for x in ("", "not ")}
    assert task.open(task.items[-1]).name == "a.b.jpg"
    assert task.score(task.items, [{"answer": i.truth} for i in task.items])["perception"] == 400
    text.write_text("Is it so?\tYes\n")
    with pytest.raises(InputError, match="two lines"):
        find(f"mme:{tmp_path}")
    with pytest.raises(InputError, match="no subtask of MME"):
        find(f"mme:{tmp_path / 'OCR'}")


def test_subsets_are_whole_pictures():
    items = [Item(f"{p}-{k}", str(p), "?") for p in range(10) for k in range(3)]
    chosen = subset(items, 7, seed=0)
    assert len(chosen) == 9
    assert len({i.picture for i in chosen}) == 3
    assert chosen == subset(items, 7, seed=0) != subset(items, 7, seed=1)
    assert subset(items, None, 0) == items
    with pytest.raises(ParameterError, match="n=0"):
        subset(items, 0, 0)


def test_other_refusals(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean scenes"):
        find("scene:pope")
    with pytest.raises(InputError, match="names no file"):
        find("mme")
    with pytest.raises(InputError, match=r"no instances\*\.json"):
        files.coco_chair(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        find(f"pope:{tmp_path / 'none.json'}", images=tmp_path)

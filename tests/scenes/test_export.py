"""Exported files against the scenes they came from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sightline import scenes
from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.scenes import export
from sightline.scenes.commands import app

SEEDS = scenes.seeds("val", 12)


def _unpack(code):
    """Mask of an uncompressed COCO RLE."""
    flat = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
    return flat.reshape(code["size"], order="F").astype(bool)


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("first", [False, True])
def test_rle_round_trip(first):
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    mask[0, 0] = first
    code = export.rle(mask)
    assert sum(code["counts"]) == 35
    np.testing.assert_array_equal(_unpack(code), mask)


def test_coco_matches_the_scenes(tmp_path):
    paths = export.coco(SEEDS, tmp_path)
    instances, captions = (json.loads(p.read_text()) for p in paths)
    by_image = {image["id"]: [] for image in instances["images"]}
    for row in instances["annotations"]:
        by_image[row["image_id"]].append(row)
    assert list(by_image) == list(SEEDS)
    names = {c["id"]: c["name"] for c in instances["categories"]}
    for image in instances["images"]:
        scene = scenes.draw(image["id"])
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(scene.image))
        for row, thing in zip(by_image[image["id"]], scene.objects, strict=True):
            assert names[row["category_id"]] == thing.kind
            np.testing.assert_array_equal(_unpack(row["segmentation"]), thing.mask)
            x, y, w, h = row["bbox"]
            assert (x, y, x + w, y + h) == thing.box
            assert row["area"] == thing.mask.sum()
    assert [row["id"] for row in instances["annotations"]] == list(range(1, len(instances["annotations"]) + 1))
    assert len(captions["annotations"]) == 5 * len(SEEDS)
    for row in captions["annotations"]:
        assert set(scenes.mentions(row["caption"])) == set(scenes.draw(row["image_id"]).counts())


def test_pycocotools_reads_it(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    data = coco.COCO(str(export.coco(SEEDS, tmp_path)[0]))
    for annotation in data.loadAnns(data.getAnnIds()):
        assert data.annToMask(annotation).sum() == annotation["area"]


def test_llava_conversations(tmp_path):
    (path,) = export.llava(SEEDS, tmp_path, turns=5)
    rows = json.loads(path.read_text())
    assert [row["id"] for row in rows] == [str(seed) for seed in SEEDS]
    for row in rows:
        assert (tmp_path / "images" / row["image"]).is_file()
        talk = row["conversations"]
        assert [turn["from"] for turn in talk] == ["human", "gpt"] * (len(talk) // 2)
        assert 8 <= len(talk) <= 12
        assert talk[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in talk) == 1
        assert all(turn["value"] for turn in talk)


def test_pope_files(tmp_path):
    paths = export.pope(SEEDS, tmp_path)
    drawn = [scenes.draw(seed) for seed in SEEDS]
    for path, split in zip(paths, ("random", "popular", "adversarial"), strict=True):
        assert path.name == f"scenes_pope_{split}.json"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows == scenes.pope(drawn, split)


@pytest.mark.parametrize("form", ["coco", "llava", "pope"])
def test_interrupted_exports_resume_to_the_same_bytes(tmp_path, form):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def stopping():
        yield from SEEDS[:5]
        raise KeyboardInterrupt

    write = getattr(export, form)
    write(SEEDS, whole)
    with pytest.raises(KeyboardInterrupt):
        write(stopping(), broken)
    left = _content(broken)
    assert len(left) == 5
    assert all(name.endswith(".png") for name in left)
    kept = {p: p.stat().st_mtime_ns for p in (broken / "images").iterdir()}
    write(SEEDS, broken)
    assert _content(broken) == _content(whole)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())


def test_all_formats_share_a_folder_and_repeat_without_change(tmp_path):
    for _ in range(2):
        for form in ("coco", "llava", "pope"):
            getattr(export, form)(SEEDS[:4], tmp_path)
        first = _content(tmp_path)
    export.coco(SEEDS[:6], tmp_path)
    assert len(json.loads((tmp_path / "annotations/instances.json").read_text())["images"]) == 6
    assert _content(tmp_path)["conversations.json"] == first["conversations.json"]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("coco", "annotations/captions.json"),
        ("llava", "conversations.json"),
        ("pope", "scenes_pope_popular.json"),
        ("coco", "images/scene_002147483648.png"),
        ("llava", "sightline-scenes.json"),
    ],
)
def test_foreign_files_are_never_overwritten(tmp_path, form, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="another folder"):
        getattr(export, form)(SEEDS[:3], tmp_path)
    assert _content(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("text", ["{}", "[]", '{"made_by": "another", "files": {}}', '{"made_by": "sightline.scenes"}'])
def test_manifest_of_another_program(tmp_path, text):
    (tmp_path / "sightline-scenes.json").write_text(text)
    with pytest.raises(InputError, match="another folder"):
        export.llava(SEEDS[:1], tmp_path)
    assert (tmp_path / "sightline-scenes.json").read_text() == text


def test_own_files_changed_by_hand_are_kept(tmp_path):
    (path,) = export.llava(SEEDS[:2], tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="not written by"):
        export.llava(SEEDS[:2], tmp_path)
    assert path.read_text() == "[]"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a folder"):
        export.coco(SEEDS[:1], tmp_path / "file")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="choose a folder"):
            export.coco(SEEDS[:1], tmp_path / "closed")


def _run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_draw(tmp_path):
    result = _run("draw", 3, 4, "--out", tmp_path, "--context", "farm")
    assert result.exit_code == 0, result.output
    scene = scenes.draw(4, context="farm")
    truth = json.loads((tmp_path / "scene_000000000004.json").read_text())
    assert truth == scene.truth()
    assert [o["kind"] for o in truth["objects"]] == [o.kind for o in scene.objects]
    with Image.open(tmp_path / "scene_000000000004.png") as picture:
        assert picture.tobytes() == scene.image.tobytes()


def test_command_sheet(tmp_path):
    assert _run("sheet", "--n", 6, "--columns", 3, "--out", tmp_path / "s.png").exit_code == 0
    with Image.open(tmp_path / "s.png") as page:
        assert page.size == (352, 236)
    assert isinstance(_run("sheet", "--out", tmp_path / "s.jpg").exception, InputError)
    assert isinstance(_run("sheet", "--n", 0, "--out", tmp_path / "s.png").exception, ParameterError)


def test_command_export(tmp_path):
    assert _run("export", "--n", 3, "--split", "test", "--format", "llava", "--out", tmp_path / "a").exit_code == 0
    export.llava(scenes.seeds("test", 3), tmp_path / "b")
    assert _content(tmp_path / "a") == _content(tmp_path / "b")
    assert isinstance(_run("export", "--format", "yolo", "--out", tmp_path).exception, UnknownNameError)
    assert isinstance(_run("export", "--split", "dev", "--out", tmp_path).exception, UnknownNameError)


def test_a_picture_says_that_it_comes_from_the_generated_world(tmp_path: Path) -> None:
    from sightline.images import SOFTWARE, open_image

    scene = scenes.draw(3)
    assert open_image(scene.image).info == {"Software": SOFTWARE}
    export.coco([scene], tmp_path)
    (path,) = tmp_path.rglob("*.png")
    assert open_image(path).info == {"Software": SOFTWARE}
    (tmp_path / "film.gif").write_bytes(export.gif(scenes.film(3, frames=3, size=56)))
    for frame in (1, 3):
        assert open_image(tmp_path / "film.gif", frame=frame).info == {"Software": SOFTWARE}
    scene.image.convert("L").convert("RGB").save(tmp_path / "photo.png")
    assert open_image(tmp_path / "photo.png").info == {}

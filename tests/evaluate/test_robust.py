"""Corruptions, RobustVQA's questions, how answers are read, and the published file."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from sightline import evaluate, scenes
from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.evaluate import robust, world
from sightline.evaluate.corrupt import SEVERITIES, STRENGTHS, corrupt
from sightline.evaluate.robust import confusing_pair, is_right, published_reading

SEED = scenes.seeds("val", 3)[-1]


# -- corruptions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture():
    return scenes.draw(SEED, size=112).image


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_corruption_grows_with_its_severity_and_repeats_itself(picture, name):
    plain = np.asarray(picture, float)
    away = []
    for severity in SEVERITIES:
        changed = corrupt(picture, name, severity, seed=5)
        assert (changed.size, changed.mode) == (picture.size, "RGB")
        assert changed.tobytes() == corrupt(picture, name, severity, seed=5).tobytes()
        away.append(np.abs(np.asarray(changed, float) - plain).mean())
    assert all(b > a > 0.5 for a, b in pairwise(away))


def test_corruptions_are_what_they_say(picture):
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = np.asarray(corrupt(grey, "noise", 1), float) / 255
    assert abs(noise.std() - 0.08) < 0.005
    assert abs(noise.mean() - 0.5) < 0.01
    impulse = np.asarray(corrupt(grey, "impulse", 3))
    assert abs((impulse != 128).mean() - 0.09) < 0.02
    assert set(np.unique(impulse)) == {0, 128, 255}
    plain, flat = (np.asarray(p, float) for p in (picture, corrupt(picture, "contrast", 5)))
    assert np.allclose(flat.mean((0, 1)), plain.mean((0, 1)), atol=0.6)
    assert abs(flat.std((0, 1)) / plain.std((0, 1)) - 0.05).max() < 0.02
    bright = np.asarray(corrupt(Image.new("RGB", (4, 4), (100, 50, 0)), "brightness", 2))
    assert bright[0, 0].tolist() == [151, 76, 0]  # value + 0.2, hue and saturation as before
    blocks = np.asarray(corrupt(picture, "pixelate", 5)).reshape(28, 4, 28, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert corrupt(grey, "noise", 1, seed=1).tobytes() != corrupt(grey, "noise", 1, seed=2).tobytes()


def test_unknown_corruptions_are_refused(picture):
    with pytest.raises(UnknownNameError, match="blur"):
        corrupt(picture, "blurr", 1)
    with pytest.raises(ParameterError, match="severity=0"):
        corrupt(picture, "blur", 0)


# -- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "truth", "options", "right"),
    [
        ("The main object is a sea lion.", "sea lion", ["sea lion", "seal"], True),
        ("Seal", "sea lion", ["sea lion", "seal"], False),
        ("sea lion or seal", "sea lion", ["sea lion", "seal"], False),
        ("A school bus.", "school bus", ["bus", "school bus"], True),  # the longer name holds the shorter
        ("A bus.", "school bus", ["bus", "school bus"], False),
        ("A bus.", "bus", ["bus", "school bus"], True),
        ("something else", "bus", ["bus", "car"], False),
        ("Yes, it is.", "yes", [], True),
        ("No", "yes", [], False),
        ("a picture of a farm", "no", [], False),  # says neither
    ],
)
def test_reading(answer, truth, options, right):
    assert is_right(answer, truth, options) == right


def test_the_published_reading():
    assert published_reading('The answer is "dog".') == "dog"
    assert published_reading("[dog, cat]") == "dog"
    assert published_reading("Yes, it is the main object.") == "yes"
    assert published_reading("sea lion") == "lion"  # and so never right


# -- questions on scenes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    return {form: world.build(f"robust:{form}", n=100)[0] for form in robust.FORMS}


def test_the_main_object_and_its_distractor(tasks):
    for seed in sorted({item.tags["scene"] for item in tasks["choice"].items}):
        scene = scenes.draw(seed, size=112)
        main, distractor, confused = confusing_pair(scene)
        areas = {thing.kind: thing.area for thing in reversed(scene.objects)}
        assert max(thing.area for thing in scene.objects) in [t.area for t in scene.objects if t.kind == main]
        assert distractor not in areas
        found = robust.chances(scene.image)
        assert found[distractor] == max(found[kind] for kind in found if kind not in areas)
        assert confused == (found[distractor] > found[main])


def test_every_scene_is_asked_clean_and_corrupted(tasks):
    each = 1 + len(STRENGTHS) * len(robust.SEVERITIES)
    for form, task in tasks.items():
        assert task.name == f"scenes_robust_{form}"
        assert len(task.items) % each == 0
        assert len(task.items) >= 100
        states = {(item.tags["corruption"], item.tags["severity"]) for item in task.items}
        assert len(states) == each
        by_scene = {}
        for item in task.items:
            by_scene.setdefault(item.tags["scene"], set()).add((item.question, item.truth))
        assert all(len(asked) == (1 if form == "choice" else 2) for asked in by_scene.values())
    choice, main, there = (tasks[form].items for form in robust.FORMS)
    assert choice[0].question == (
        "What is the main object in this image? Choose from the following list:[{}, {}]".format(
            *choice[0].tags["options"]
        )
    )
    assert main[0].question.endswith(" the main object in this image? Please anwser yes or no")
    assert there[0].question.startswith("Is there a")
    assert [item.truth for item in main[:2]] == ["yes", "no"]
    assert {item.truth for item in choice} <= set(scenes.KINDS)
    assert len({item.tags["options"].index(item.truth) for item in choice}) == 2  # the truth stands first or second


def test_pictures_are_corrupted_as_tagged(tasks):
    items = {(i.tags["corruption"], i.tags["severity"]): i for i in tasks["choice"].items[:22]}
    plain = tasks["choice"].open(items["clean", 0])
    assert plain.tobytes() == scenes.draw(items["clean", 0].tags["scene"], size=112).image.tobytes()
    noisy = tasks["choice"].open(items["noise", 3])
    assert noisy.tobytes() == corrupt(plain, "noise", 3, seed=items["clean", 0].tags["scene"]).tobytes()
    assert world.build("robust:choice", n=100)[0].facts() == tasks["choice"].facts()


def test_scores(tasks):
    task = tasks["there"]
    answers = [{"answer": i.truth if i.tags["corruption"] != "blur" else "no", "tokens": 1} for i in task.items]
    found = task.score(task.items, answers)
    assert found["accuracy_clean"] == found["accuracy_jpeg"] == 1
    assert found["accuracy_blur"] == 0.5
    assert found["accuracy_corrupted"] == pytest.approx(1 - 0.5 / len(STRENGTHS))
    assert found["accuracy_severity_5"] == found["accuracy_corrupted"]
    assert found["exact"] == found["accuracy"]
    assert found.tally.intervals()["accuracy"][2] == "bootstrap"


# -- the published file -------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    for name in ("imagenet-a/n1/a.jpg", "imagenet-d/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    sets = {
        "imagenet_a": [
            {"file_name": "datasets/robustvqa/imagenet-a/n1/a.jpg", "gt_caption": "sea_lion", "error_caption": "otter"},
            {"file_name": "datasets/robustvqa/imagenet-a/n1/gone.jpg", "gt_caption": "bee", "error_caption": "fly"},
        ],
        "imagenet_r": [],
        "imagenet_d": [{"file_name": "imagenet-d/b.jpg", "gt_caption": "broom", "error_caption": "swab"}],
    }
    path = tmp_path / "robustvqa_test.json"
    path.write_text(json.dumps(sets))
    return path


def test_the_published_file(published):
    with pytest.raises(InputError, match=r"1 of 2 pictures are missing"):
        evaluate.find(f"robustvqa:{published}")
    first, second = evaluate.find(f"robustvqa:{published}", skip_missing=True)
    assert (first.name, second.name) == ("robustvqa_imagenet_a", "robustvqa_imagenet_d")
    assert [(i.question, i.truth) for i in first.items] == [
        ("Is sea_lion the main object in this image? Please anwser yes or no", "yes"),
        ("Is otter the main object in this image? Please anwser yes or no", "no"),
    ]
    assert first.open(first.items[0]).name == "a.jpg"
    assert second.items[0].truth == "broom"
    assert set(second.items[0].tags["options"]) == {"broom", "swab"}
    found = first.score(first.items, [{"answer": "Yes.", "tokens": 2}] * 2)
    assert found["accuracy"] == found["accuracy_imagenet_a"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "holds a list"), ("{", "cannot read"), ('{"imagenet_x": []}', "imagenet_x"),
     ('{"imagenet_a": [{"file_name": "a"}]}', "entry 1 has no 'gt_caption'"), ("{}", "nothing"),
     ('{"imagenet_a": []}', "no questions")],
)  # fmt: skip
def test_foreign_files_are_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        evaluate.find(f"robustvqa:{path}", images=tmp_path)

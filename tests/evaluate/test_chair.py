"""CHAIR by hand on scenes and on COCO files, its word rules, and refusals."""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import scenes
from sightline.errors import InputError, MissingExtraError, UnknownNameError
from sightline.evaluate.chair import Chair
from sightline.evaluate.coco_words import MERGED, coco_vocabulary, merge_pairs, scene_vocabulary

TABLE = "person, girl, boy, man, woman, baby\ndog, puppy\nbear\nteddy bear, teddybear\nhot dog\nchair, seat\ntoilet\ntrain\ntie\ncup, mug\nwine glass\nknife\n"  # fmt: skip
WORDS = st.lists(
    st.sampled_from(["hot", "dog", "a", "baby", "bear", "teddy", "train", "track", "seat", "toilet", "cup"])
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE)
    return path


@pytest.fixture
def read(table):
    vocabulary = coco_vocabulary(table, words="simple")
    return lambda caption: vocabulary.read(caption)[0]


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men and a hot dog.", ["person", "hot dog"]),
        ("A baby bear beside a dog; puppies!", ["bear", "dog", "dog"]),
        ("The teddy bear on a train track", ["teddy bear"]),
        ("a passenger train", ["train"]),
        ("The seat of the toilet", ["toilet"]),
        ("A seat near the train", ["chair", "train"]),
        ("toilet seats, toilet seat", ["toilet", "toilet"]),
        ("a man in a bow tie with wine glasses", ["person", "tie", "wine glass"]),
        ("knives and mugs", ["knife", "cup"]),
        ("dogma, seated, cupboard", []),
    ],
)
def test_words_of_coco(read, caption, objects):
    assert read(caption) == objects


def test_the_table_is_read_as_published(tmp_path):
    """Entries behind two spaces and those with a capital never match a caption."""
    path = tmp_path / "synonyms.txt"
    path.write_text("\nmotorcycle, scooter,  motor bike, motorbike\ncell phone, phone, iPhone\n")
    read = coco_vocabulary(path, words="simple").read
    assert read("A motor bike, a motorbike, an iPhone and a phone")[0] == ["motorcycle", "cell phone"]


def test_pairs_of_the_published_rules():
    assert len(MERGED) == 25 + 24 + 5  # pairs that stay, ages of twelve animals, five that become another word
    assert merge_pairs(["hot", "dog", "dog"]) == ["hot dog", "dog"]
    assert merge_pairs(["teddy"]) == ["teddy"]


@given(WORDS)
def test_merging_loses_nothing_else(words):
    merged = merge_pairs(words)
    kept = [part for word in merged for part in word.split()]
    assert merge_pairs(merged) == merged or any(f"{a} {b}" in MERGED for a, b in pairwise(merged))
    assert [w for w in words if w in kept or w in ("baby", "adult", "passenger", "bow", "seat")] == words
    assert sum(len(m.split()) for m in merged) <= len(words)


def coco_files(tmp_path):
    instances = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 47, "name": "cup"}, {"id": 1, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 47}],
    }  # fmt: skip
    captions = {"annotations": [{"image_id": 2, "caption": "A girl drinks."}, {"image_id": 3, "caption": "Nothing."}]}
    paths = tmp_path / "instances.json", tmp_path / "captions.json"
    for path, content in zip(paths, (instances, captions), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_coco_by_hand(tmp_path, table):
    instances, captions = coco_files(tmp_path)
    chair = Chair.coco([instances], [captions], table, words="simple")
    assert chair.truth == {"1": {"dog"}, "2": {"cup", "person"}, "3": set()}
    said = ["A dog, a puppy and a cup.", "A woman with a mug and another mug", "Sky."]
    found = chair.score(said, [1, 2, 3])
    assert found["chair_i"] == pytest.approx(1 / 6)  # six mentions, one (the first cup) is wrong
    assert found["chair_s"] == pytest.approx(1 / 3)
    assert found["recall"] == 1
    assert found["f1"] == pytest.approx(2 * (5 / 6) / (11 / 6))
    assert found["length"] == pytest.approx((9 + 8 + 2) / 3)
    assert found.correct == (False, True, True)
    assert found.details[0]["wrong"] == ["cup"]
    assert not found.higher_is_better
    assert found.rules == {"words": "simple"}
    with pytest.raises(InputError, match="no annotations of 1 pictures, for example 9"):
        chair.score(["x"], [9])


def test_no_mentions_at_all(tmp_path, table):
    instances, captions = coco_files(tmp_path)
    found = Chair.coco([instances], [captions], table, words="simple").score(["Sky.", ""], [1, 2])
    assert found["chair_i"] == found["chair_s"] == found["recall"] == found["f1"] == 0


def test_true_captions_of_scenes_have_no_hallucination():
    drawn = [scenes.draw(seed, size=56) for seed in range(12)]
    chair = Chair.scenes(drawn)
    texts = [scenes.caption(scene, np.random.default_rng(0), "detailed") for scene in drawn]
    names = [scene.file_name for scene in drawn]
    true = chair.score(texts, names)
    assert true["chair_i"] == 0
    assert true["recall"] == 1
    assert [found["mentions"] for found in true.details] == [scenes.mentions(text) for text in texts]
    shifted = chair.score(texts[1:] + texts[:1], names)
    assert shifted["chair_s"] > 0.5


def test_truth_and_figures_against_pycocotools(tmp_path):
    """An exported world read by pycocotools alone, and CHAIR counted by its definition: the same truth and figures."""
    pycoco = pytest.importorskip("pycocotools.coco")
    from sightline.evaluate.finding import find
    from sightline.scenes import export

    drawn = [scenes.draw(seed, size=56) for seed in range(20, 32)]
    export.coco(drawn, tmp_path, size=56, captions=2)
    task = find(f"chair:{tmp_path}")[0]
    instances = pycoco.COCO(str(tmp_path / "annotations" / "instances.json"))
    captions = pycoco.COCO(str(tmp_path / "annotations" / "captions.json"))
    truth = {}
    for image in instances.getImgIds():
        found = {instances.cats[row["category_id"]]["name"] for row in instances.imgToAnns[image]}
        for row in captions.imgToAnns[image]:
            found |= set(scenes.mentions(row["caption"]))
        truth[str(image)] = found
    assert {item.id: set(item.tags["objects"]) for item in task.items} == truth
    assert {item.id: item.picture for item in task.items} == {str(i): r["file_name"] for i, r in instances.imgs.items()}
    said = [scenes.caption(drawn[k - 1], np.random.default_rng(k), "detailed") for k in range(len(drawn))]  # of another
    named = [scenes.mentions(text) for text in said]
    wrong = [
        [kind for kind in kinds if kind not in truth[item.id]] for item, kinds in zip(task.items, named, strict=True)
    ]
    covered = [set(kinds) & truth[item.id] for item, kinds in zip(task.items, named, strict=True)]
    score = task.score(task.items, [{"answer": text} for text in said])
    assert score["chair_i"] == pytest.approx(sum(map(len, wrong)) / sum(map(len, named)))
    assert score["chair_s"] == pytest.approx(sum(map(bool, wrong)) / len(said))
    assert score["recall"] == pytest.approx(sum(map(len, covered)) / sum(map(len, truth.values())))
    assert 0 < score["chair_i"] < 1


def test_scene_words_agree_with_the_world():
    assert scene_vocabulary().read("Kittens, a Mug and hot dog")[0] == ["cat", "cup", "dog"]


def test_published_rules_with_nltk(monkeypatch, table):
    """A stand-in for nltk: what the rules ask of it, and the message when its data is missing."""

    def tag(words):
        return [(w, {"glasses": "NNS", "running": "VBG", "big": "JJ"}.get(w, "DT")) for w in words]

    class Lemmatizer:
        def lemmatize(self, word, pos):
            return {("glasses", "n"): "glass", ("running", "v"): "run", ("dogs", "n"): "dog"}.get((word, pos), word)

    fake = types.ModuleType("nltk")
    fake.word_tokenize, fake.pos_tag = str.split, tag
    stem = types.ModuleType("nltk.stem")
    stem.WordNetLemmatizer = Lemmatizer
    monkeypatch.setitem(sys.modules, "nltk", fake)
    monkeypatch.setitem(sys.modules, "nltk.stem", stem)
    vocabulary = coco_vocabulary(table)
    assert vocabulary.rules == "nltk"
    assert vocabulary.read("Dogs running wine glasses")[0] == ["dog", "wine glass"]

    def missing(words):
        raise LookupError("punkt_tab")

    fake.word_tokenize = missing
    with pytest.raises(MissingExtraError, match=r"nltk\.downloader"):
        coco_vocabulary(table)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(MissingExtraError, match=r"sightline\[eval\]"):
        coco_vocabulary(table)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("categories"), "'categories'"),
        (lambda d: d["annotations"].append({"id": 3}), "row 4 of 'annotations' lacks image_id"),
        (lambda d: d["annotations"].append({"image_id": 1, "category_id": 99}), "category 99"),
        (lambda d: d["categories"][0].update(name="unicorn"), "'unicorn' is not in the table"),
    ],
)
def test_foreign_coco_files(tmp_path, table, change, named):
    instances, captions = coco_files(tmp_path)
    content = json.loads(instances.read_text())
    change(content)
    instances.write_text(json.dumps(content))
    with pytest.raises(InputError, match=named):
        Chair.coco([instances], [captions], table, words="simple")


def test_other_refusals(tmp_path, table):
    with pytest.raises(InputError, match="cannot read the synonyms"):
        coco_vocabulary(tmp_path / "none.txt", "simple")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="no table of synonyms"):
        coco_vocabulary(tmp_path / "empty.txt", "simple")
    with pytest.raises(UnknownNameError, match="did you mean simple"):
        coco_vocabulary(table, "simpel")
    truncated = tmp_path / "cut.json"
    truncated.write_text('{"images": [')
    with pytest.raises(InputError, match=r"cut\.json"):
        Chair.coco([truncated], [], table, words="simple")

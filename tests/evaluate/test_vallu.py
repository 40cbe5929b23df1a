"""VaLLu's files and ratings."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sightline.errors import InputError
from sightline.evaluate.finding import find
from sightline.evaluate.vallu import by_words, score, task

ROWS = [
    {"id": 7, "image": "a/b/one.png", "conversations": [
        {"from": "human", "value": "<image>\nHow many years?"}, {"from": "gpt", "value": "Two years."}]},
    {"id": 8, "image": "two.png", "conversations": [
        {"from": "human", "value": "What must happen? <image>"}, {"from": "gpt", "value": "The divisor falls."}]},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("one.png", "two.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    path = tmp_path / "vallu.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def test_files(folder) -> None:
    (found,) = find(f"vallu:{folder}")
    assert [item.question for item in found.items] == ["How many years?", "What must happen?"]
    assert [item.id for item in found.items] == ["7", "8"]
    assert found.open(found.items[0]).name == "one.png"
    assert found.max_new_tokens == 512
    (folder.parent / "images" / "two.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 pictures are missing \(two.png\)"):
        find(f"vallu:{folder}")


def test_ratings(folder) -> None:
    items = task(folder).items
    answers = [{"answer": "It takes 2 years"}, {"answer": "Nothing falls."}]
    found = score(items, answers)
    assert by_words(*("", "Two years.", "It takes 2 years", "")) == {"correctness": 5}
    assert found["correctness"] == pytest.approx((5 + 3) / 2)
    assert found.correct == (True, False)
    assert found.rules == {"judge": "share of the expert's words"}

    def judge(question, wanted, given, picture):
        return {"correctness": 4 if "years" in question else 2, "depth": 1, "anything": 9}

    found = task(folder, judge=judge).score(items, answers)
    assert found.metrics == {"correctness": 3, "depth": 1}
    assert found.rules == {"judge": "given"}


def test_what_is_refused(folder) -> None:
    items = task(folder).items
    with pytest.raises(InputError, match="1 to 5"):
        score(items, [{"answer": ""}] * 2, lambda *_: {"correctness": 7})
    with pytest.raises(InputError, match="1 to 5"):
        score(items, [{"answer": ""}] * 2, lambda *_: {"depth": 3})
    dummy = json.loads(json.dumps(ROWS))
    dummy[0]["conversations"][1]["value"] = "Dummy output"
    folder.write_text("\n".join(json.dumps(row) for row in dummy))
    with pytest.raises(InputError, match="no expert's answer"):
        score(task(folder).items, [{"answer": ""}] * 2)
    folder.write_text(json.dumps({"id": 1, "image": "one.png"}))
    with pytest.raises(InputError, match="item 1 has no question"):
        task(folder)

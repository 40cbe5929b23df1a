"""POPE in dialogues: what the model is shown turn by turn, scores by hand, files, and a run."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sightline.errors import InputError
from sightline.evaluate import comparing, pope_chat, world
from sightline.evaluate.finding import find
from sightline.evaluate.runner import Decoding, generate
from sightline.evaluate.task import Item
from sightline.evaluate.workers import Here
from tests.evaluate.conftest import SIZE


def item(*labels: str, picture: str = "a") -> Item:
    turns = [f"Is there number {k}?" for k in range(len(labels))]
    return Item(picture, picture, turns[0], "", {"turns": turns, "labels": list(labels)})


def test_scores_by_hand() -> None:
    items = [item("yes", "no", "yes"), item("no", "yes", picture="b")]
    found = pope_chat.score(items, [{"answer": "Yes.\nYes.\nNo, it is not."}, {"answer": "No\nYes"}])
    assert (found["tp"], found["fp"], found["tn"], found["fn"]) == (2, 1, 1, 1)
    assert found["accuracy"] == 3 / 5
    assert [found[f"turn_{k}"] for k in (1, 2, 3)] == [1, 0.5, 0]
    assert found.correct == (False, True)
    assert found.details[0] == {"read": ["yes", "yes", "no"]}
    official = pope_chat.score([item("no")], [{"answer": "There isn't one."}])
    vista = pope_chat.score([item("no")], [{"answer": "There isn't one."}], "vista")
    assert (official["accuracy"], vista["accuracy"]) == (0, 1)
    with pytest.raises(InputError, match="2 answers to 1 questions"):
        pope_chat.score([item("no")], [{"answer": "No\nNo"}])


def test_the_world_asks_popes_questions() -> None:
    plain, chats = world.build("pope:adversarial", n=24, size=SIZE)[0], world.build("pope-chat", n=24, size=SIZE)
    assert [task.name for task in chats] == [f"scenes_pope_chat_{s}" for s in world.POPE_SPLITS]
    asked = [text for one in chats[2].items for text in one.tags["turns"]]
    assert asked == [one.question for one in plain.items]
    assert [len(one.tags["turns"]) for one in chats[2].items] == [6] * 4
    truthful = [{"answer": "\n".join(one.tags["labels"])} for one in chats[2].items]
    assert chats[2].score(chats[2].items, truthful)["f1"] == 1


def test_every_turn_is_behind_what_was_said(lvlm, monkeypatch) -> None:
    """The prompts, as the processor gets them: own answers between the questions, one picture, shorter dialogues end earlier."""
    model = lvlm()
    shown, real = [], type(model).encode

    def encode(self, conversations, facts=None):
        shown.append(conversations)
        return real(self, conversations, facts)

    monkeypatch.setattr(type(model), "encode", encode)
    task = pope_chat.chat(world.build("pope:random", n=12, size=SIZE)[0], "chat", "official")
    first, second = task.items
    second.tags["turns"].pop()
    inputs, answers = generate(model, task, [first, second], Decoding())
    assert [len(batch) for batch in shown] == [2, 2, 2, 2, 2, 1]
    assert len(inputs["input_ids"]) == 1
    for row, one in enumerate((first, second)):
        last = [batch[row] for batch in shown if row < len(batch)][-1]
        texts = [[part["text"] for part in turn["content"] if part["type"] == "text"] for turn in last]
        said = answers[row]["answer"].split("\n")
        assert [t[0] for t in texts[::2]] == one.tags["turns"]
        assert [" ".join(t[0].split()) for t in texts[1::2]] == said[:-1]
        assert len(said) == len(one.tags["turns"])
        assert [turn["role"] for turn in last] == ["user", "assistant"] * (len(last) // 2) + ["user"]
        pictures = [sum(part["type"] == "image" for part in turn["content"]) for turn in last]
        assert pictures == [1] + [0] * (len(last) - 1)


def test_a_dialogue_of_one_question_is_the_question(lvlm) -> None:
    model = lvlm()
    plain = world.build("pope:random", n=6, size=SIZE)[0]
    task = pope_chat.chat(plain, "chat", "official")
    one = Item("a", plain.items[0].picture, "", "", {**plain.items[0].tags, "turns": [plain.items[0].question],
                                                     "labels": ["yes"]})  # fmt: skip
    alone = generate(model, plain, plain.items[:1], Decoding())[1]
    assert " ".join(alone[0]["answer"].split()) == generate(model, task, [one], Decoding())[1][0]["answer"]


def test_files(tmp_path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    rows = [{"question_id": 7, "image": "x.png", "text": ["Is a?", "Is b?"], "label": ["yes", "no"]}]
    lists, lines = tmp_path / "chat_random.json", tmp_path / "plain_random.json"
    lists.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    singles = [{"question_id": k, "image": "x.png", "text": rows[0]["text"][k], "label": rows[0]["label"][k]}
               for k in range(2)]  # fmt: skip
    lines.write_text("\n".join(map(json.dumps, singles)), encoding="utf-8")
    for path in (lists, lines):
        (task,) = find(f"pope-chat:{path}", images=tmp_path)
        assert task.name == f"{path.stem}_chat"
        (one,) = task.items
        assert (one.tags["turns"], one.tags["labels"]) == (["Is a?", "Is b?"], ["yes", "no"])
    assert [i.question for i in find(f"pope:{lists}", images=tmp_path)[0].items] == ["Is a?", "Is b?"]
    lists.write_text(json.dumps({**rows[0], "label": ["yes"]}), encoding="utf-8")
    with pytest.raises(InputError, match="entry 1: 2 questions need a list of as many labels"):
        find(f"pope-chat:{lists}", images=tmp_path)


def test_a_run_with_a_system(lvlm, var, tmp_path, console) -> None:
    task = world.build("pope-chat:random", n=12, size=SIZE)[0]
    with Here(lvlm()) as workers:
        found = comparing.compare(workers, [task], [[var]], tmp_path / "run", cost=False, console=console)
    row = found.row("scenes_pope_chat_random", "none")
    assert {"f1", "turn_1", "turn_6"} <= set(row.scored.metrics)

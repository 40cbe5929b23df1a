"""POPE-chat: the questions about one picture asked in one dialogue, each behind the questions and answers before it.

As PAI measures it (Liu et al., ECCV 2024, arXiv 2407.21771; github.com/LALBJ/PAI, `pope_chat_eval.py`): the model's own answers
are the history, with their end token; only the first question brings the picture; no suffix. Metrics are POPE's over all questions,
and the accuracy of every turn. PAI reads answers by the rule "vista" (see `pope`). Its question files hold one picture a line:
{"image": name, "text": [six questions], "label": [six]}; any copy of POPE's own files gives the same by grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.errors import InputError
from sightline.evaluate import files, pope
from sightline.evaluate.scored import Scored, check_labels, same_length
from sightline.evaluate.stats import Sums, Tally, ratio
from sightline.evaluate.task import Answer, Item, Task

if TYPE_CHECKING:
    from sightline.lvlm import LVLM

NEW_TOKENS = 16
Reply = Callable[[Mapping[str, Any]], list[dict[str, Any]]]  # inputs of a batch -> {"answer", "tokens"} per row


def dialogues(items: Sequence[Item]) -> list[Item]:
    """One item per picture, whose tags `turns` and `labels` hold its questions in their order."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.picture, []).append(item)
    return [
        Item(rows[0].id, picture, rows[0].question, "",
             {**rows[0].tags, "turns": [i.question for i in rows], "labels": [i.truth for i in rows]})
        for picture, rows in groups.items()
    ]  # fmt: skip


def talk(lvlm: LVLM, task: Task, batch: Sequence[Item], reply: Reply) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """(inputs of the last turn, per item {"answer": one line per turn, "tokens": of all}). Shorter dialogues end earlier."""
    from sightline.images import open_image

    shown = [{"type": "image", "image": open_image(task.open(item))} for item in batch]
    said: list[list[str]] = [[] for _ in batch]
    tokens, inputs = [0] * len(batch), {}
    for turn in range(max(len(item.tags["turns"]) for item in batch)):
        now = [k for k, item in enumerate(batch) if turn < len(item.tags["turns"])]
        asked = [[q + task.suffix for q in batch[k].tags["turns"][: turn + 1]] for k in now]
        inputs = lvlm.encode([_conversation(shown[k], q, said[k]) for k, q in zip(now, asked, strict=True)])
        for k, given in zip(now, reply(inputs), strict=True):
            said[k].append(given["answer"])
            tokens[k] += given["tokens"]
    lines = ["\n".join(" ".join(text.split()) for text in row) for row in said]
    return inputs, [{"answer": text, "tokens": n} for text, n in zip(lines, tokens, strict=True)]


def _conversation(picture: dict[str, Any], asked: Sequence[str], said: Sequence[str]) -> list[dict[str, Any]]:
    talk = []
    for k, question in enumerate(asked):
        talk.append({"role": "user", "content": [picture] * (k == 0) + [{"type": "text", "text": question}]})
        talk += [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in said[k : k + 1]]
    return talk


def formulas(sums: Sums, turns: int) -> dict[str, np.ndarray]:
    """POPE's metrics over all questions, and the accuracy of every turn."""
    return pope.formulas(sums) | {f"turn_{k}": ratio(sums[f"right:{k}"], sums[f"n:{k}"]) for k in range(1, turns + 1)}


def score(items: Sequence[Item], answers: Sequence[Answer], rule: str = "official") -> Scored:
    """Score dialogues; one counts as right when all its answers are.

    Raises:
        InputError: nothing to score, a label that is neither yes nor no, or another number of answers than questions.
    """
    same_length(items=items, answers=answers)
    rows, correct, details, unclear = [], [], [], 0
    for item, answer in zip(items, answers, strict=True):
        truth, lines = check_labels(item.tags["labels"]), answer["answer"].split("\n")
        if len(lines) != len(truth):
            raise InputError(f"dialogue {item.id}: {len(lines)} answers to {len(truth)} questions")
        said = [pope.says_yes(line, rule, label) for line, label in zip(lines, truth, strict=True)]
        for k, (yes, label) in enumerate(zip(said, truth, strict=True), 1):
            rows.append((item.picture, {**pope.confusion(yes, label), f"n:{k}": 1, f"right:{k}": yes == label}))
        correct.append(said == truth)
        details.append({"read": ["yes" if yes else "no" for yes in said]})
        unclear += sum(map(pope.is_unclear, lines))
    turns = max(len(item.tags["labels"]) for item in items)
    shares = [*pope.SHARES, *((f"turn_{k}", f"right:{k}", f"n:{k}") for k in range(1, turns + 1))]
    tally = Tally.collect(rows, partial(formulas, turns=turns), shares)
    counts = {name: int(tally.counts[name].sum()) for name in ("tp", "fp", "tn", "fn")}
    return Scored(
        {**tally.metrics(), **counts, "unclear": unclear}, tuple(correct), tally, "f1", graded=True,
        rules={"answer_rule": rule, "history": "own answers"}, details=tuple(details),
    )  # fmt: skip


def chat(task: Task, name: str, rule: str) -> Task:
    """A POPE task whose questions about one picture become one dialogue."""
    return Task(
        name, task.source, tuple(dialogues(task.items)), task.open, partial(score, rule=rule), task.max_new_tokens,
        task.suffix, task.missing, talk=talk,
    )  # fmt: skip


def read(
    path: str | Path, images: str | Path | None = None, n: int | None = None, seed: int = 0, rule: str = "official"
) -> list[Task]:
    """Dialogues from PAI's files (lists of questions per line) or from any copy of POPE's own; at least `n` questions.

    Raises:
        InputError: as `files.pope`; or a picture has not as many labels as questions.
    """
    return [chat(task, f"{task.name}_chat", rule) for task in files.pope(path, images, n, seed, rule)]

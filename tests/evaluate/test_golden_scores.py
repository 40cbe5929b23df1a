"""Scores against those of the published scorers, where their arrays are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sightline.evaluate import mme, pope
from tests.steer.goldens import cases


@cases("eval-lvlm", "case_1")
def test_pope(path: Path) -> None:
    with np.load(path) as case:
        answers, labels = case["answers"].tolist(), case["labels"].tolist()
        for rule, name in (("official", "first_sentence"), ("vista", "any_negative_word")):
            read = [pope.says_yes(answer, rule) for answer in answers]
            assert read == case[f"pred_{name}_rule"].astype(bool).tolist()
        found, keys = pope.score(answers, labels), ("tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1")
        wanted = case["metrics_first_sentence_rule"].tolist()
        assert [found[key] for key in (*keys, "yes_ratio")] == pytest.approx(wanted, abs=1e-12)
        found, keys = pope.score(answers, labels, "vcd"), ("precision", "recall", "f1", "accuracy", "yes_ratio")
        assert [found[key] for key in keys] == pytest.approx(case["metrics_substring_rule"].tolist(), abs=1e-12)


@cases("eval-lvlm", "case_2")
def test_mme(path: Path) -> None:
    """Two lines in a row belong to a picture, whatever name they give."""
    with np.load(path) as case:
        tasks = case["tasks"].tolist()
        rows = []
        for task, lines in zip(tasks, case["rows"].tolist(), strict=True):
            for k, line in enumerate(lines):
                label, answer = line.rstrip("\n").split("\t")[2:]
                rows.append({"task": task, "image": str(k // 2), "label": label, "answer": answer})
        found = mme.score(rows)
        assert [found[f"{task}_score"] for task in tasks] == pytest.approx(case["task_score"].tolist(), abs=1e-9)
        for name in ("perception", "cognition"):
            assert found[name] == pytest.approx(float(case[f"{name}_total"]), abs=1e-9)

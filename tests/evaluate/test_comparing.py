"""The whole path on a tiny model: resuming, determinism, verdicts, tables, cost, sweeps, tuning."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing as mp
import os
import sys

import numpy as np
import pytest
import torch

from sightline.catalog import entry, parse
from sightline.engine.attach import attach
from sightline.engine.record import record
from sightline.errors import AttachError, InputError, ParameterError, UnknownNameError
from sightline.evaluate import comparing, describing, results, tables, world
from sightline.evaluate.folder import ANSWERS, RunFolder
from sightline.evaluate.runner import Decoding, Work, answer, generate, run, with_baseline
from sightline.evaluate.scored import Scored
from sightline.evaluate.sweep import default_grid, expand, parse_all
from sightline.evaluate.workers import Here

SIZE = 56
ONE = Decoding(batch_size=5)


def short(task, tokens=2):
    return dataclasses.replace(task, max_new_tokens=tokens)


def go(lvlm, tasks, systems, out, console, **options):
    return comparing.compare(lvlm, tasks, systems, out, console=console, **{"decoding": ONE, "cost": False, **options})


def test_answers_are_those_of_ask(lvlm, relation, console, tmp_path, var):
    """Every answer is what the model says when asked alone; the systems act only in their own rows."""
    model, task = lvlm(), short(relation)
    found = go(model, [task], [[var]], tmp_path, console)
    assert [row.label for row in found.rows] == ["none", next(k for k in found.config["systems"] if k != "none")]
    kept = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert len(kept) == 2 * len(task.items)
    for row in kept[:3] + kept[-3:]:
        item = next(i for i in task.items if i.id == row["id"])
        systems = [] if row["with"] == "none" else [var]
        assert row["answer"] == model.ask(task.open(item), task.prompt(item), systems=systems, max_new_tokens=2)
        assert row["tokens"] == 2
    assert {row["answer"] for row in kept[:12]} != {row["answer"] for row in kept[12:]}


@pytest.mark.parametrize("lines", [0, 7, 17])
def test_a_stopped_run_goes_on(lvlm, relation, console, tmp_path, var, lines, monkeypatch):
    """Stopped after any number of answers, also in the middle of a batch and of a line: the same results, nothing twice."""
    model, task = lvlm(), short(relation)
    go(model, [task], [[var]], tmp_path / "whole", console)
    go(model, [task], [[var]], tmp_path / "part", console)
    path = tmp_path / "part" / ANSWERS
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:lines]) + kept[lines][:9])
    (tmp_path / "part" / "results.json").unlink()
    asked = []
    original = answer.__globals__["generate"]
    monkeypatch.setitem(answer.__globals__, "generate", lambda *a: asked.append(len(a[2])) or original(*a))
    go(model, [task], [[var]], tmp_path / "part", console)
    left = 24 - lines
    assert left <= sum(asked) <= left + 4  # whole batches of five or two
    for name in ("results.json", "table.md", "table.tex", "config.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines_of = [sorted((tmp_path / run / ANSWERS).read_text().splitlines()) for run in ("whole", "part")]
    assert lines_of[0] == lines_of[1]
    go(model, [task], [[var]], tmp_path / "part", console)  # a finished run asks nothing
    assert sum(asked) <= left + 4


def test_kill_minus_nine(lvlm, console, tmp_path, var):
    """A process of its own, killed ten times at random moments; then finished here: the same answers, each once.

    Every other time it may write something first, so that a slow machine has answers too.
    """
    model, task, slow = lvlm(), short(world.build("relation", n=60, size=SIZE)[0]), Decoding(batch_size=2)
    path, random = tmp_path / "run" / ANSWERS, np.random.default_rng(5)
    written = [0]

    def size() -> int:
        return path.stat().st_size if path.exists() else 0

    for k, delay in enumerate(random.uniform(0.0, 0.1, 10)):
        other = mp.get_context("fork").Process(
            target=go, args=(model, [task], [[var]], tmp_path / "run", console), kwargs={"decoding": slow}
        )
        other.start()
        while k % 2 and size() == written[-1] and other.is_alive():
            other.join(0.002)
        other.join(delay / 10 if k % 2 else delay)
        other.kill()
        other.join()
        written.append(size())
    for out in ("run", "whole"):
        go(model, [task], [[var]], tmp_path / out, console, decoding=slow)
    assert written == sorted(written)
    assert 0 < written[-1] < path.stat().st_size  # some answers were there, some were missing
    assert path.read_bytes() == (tmp_path / "whole" / ANSWERS).read_bytes()
    assert (tmp_path / "run" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
def test_a_full_disk_in_mid_run(lvlm, relation, console, tmp_path, var, monkeypatch):
    """Every file of a run in turn cannot be written: one clear error, and the next run ends as an unbroken one."""
    model, task = lvlm(), short(relation)
    go(model, [task], [[var]], tmp_path / "whole", console, cost=True, rounds=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cost.json").write_bytes((tmp_path / "whole" / "cost.json").read_bytes())
    (tmp_path / "run" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    real = os.write
    seen = []

    def full(file, data):
        name = os.readlink(f"/proc/self/fd/{file}")
        if name.startswith(str(tmp_path / "run")) and len(seen) == 0 and b'"with": "var' in bytes(data):
            seen.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match=r"the disk is full\): 12 answers are safe"):
        go(model, [task], [[var]], tmp_path / "run", console, cost=True, rounds=1)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: _fail() if str(b).endswith(".png") else replace(a, b))
    with pytest.raises(InputError, match=r"pareto\.png.*No space left on device"):
        go(model, [task], [[var]], tmp_path / "run", console, cost=True, rounds=1)
    monkeypatch.undo()
    go(model, [task], [[var]], tmp_path / "run", console, cost=True, rounds=1)
    for name in (ANSWERS, "results.json", "table.md"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "run" / "pareto.png").stat().st_size > 5000


def _fail():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_sampling_is_repeatable(lvlm, relation):
    model, task = lvlm(), short(relation)
    hot = Decoding(temperature=5.0, batch_size=4, seed=1)
    first, again = (generate(model, task, task.items[:4], hot)[1] for _ in range(2))
    other = generate(model, task, task.items[:4], dataclasses.replace(hot, seed=2))[1]
    assert first == again != other


def test_pointing_records_rows_of_a_padded_batch(lvlm, console, tmp_path, var):
    """What is recorded in a batch is what a single question shows; the systems change it."""
    task = world.build("pointing", n=5, size=SIZE)[0]
    found = {}
    for size in (1, 5):
        folder = RunFolder(tmp_path / str(size), {"size": size})
        with folder:
            work = Work({task.name: task}, with_baseline([[var]]), Decoding(batch_size=size))
            run(Here(lvlm()), work, folder, console)
        found[size] = folder.answers
    for key, row in found[1].items():
        assert row["share"] == pytest.approx(found[5][key]["share"], rel=0.02)
        assert 0 < row["area"] < 1
    shares = [[found[1][task.name, label, i.id]["share"] for i in task.items] for label in with_baseline([[var]])]
    assert shares[0] != shares[1]


def test_pointing_at_tokens_that_a_reducer_left(lvlm, console, tmp_path):
    """Attention on the tokens that are left is drawn where they were; keeping all changes nothing."""
    task = world.build("pointing", n=5, size=SIZE)[0]
    half = dataclasses.replace(entry("random").cls(), ratio=0.5)
    inside = parse("pyramiddrop")
    with RunFolder(tmp_path / "run", {"size": 5}) as folder:
        work = Work({task.name: task}, with_baseline([[half], inside]), Decoding(batch_size=5))
        run(Here(lvlm()), work, folder, console)
    kept = set()
    for (_, label, _), row in folder.answers.items():
        if label.startswith("random"):
            kept.add(tuple(row["at"]))
            assert 0 <= row["share"] <= 1
    assert len(kept) > 1
    model = lvlm()
    inputs = model.inputs([task.open(task.items[0])], [task.prompt(task.items[0])])
    seen = {}
    for label, systems in (("none", []), ("half", [half])):
        observer = record(image_rows=True, sinks=False)
        with attach(model.model, *systems, observer, host=model.host), torch.inference_mode():
            model.model(**inputs)
        seen[label] = observer.seen
    count = seen["none"].places.shape[1]
    assert seen["none"].places[0].tolist() == list(range(count))
    assert seen["half"].places.shape[1] < count
    assert seen["half"].places[0].tolist() == sorted(set(seen["half"].places[0].tolist()))
    assert seen["half"].places[0].tolist() != list(range(seen["half"].places.shape[1]))


def fake(correct):
    from sightline.evaluate import pope

    return pope.score(["Yes" if right else "No" for right in correct], ["yes"] * len(correct))


def rows_of(*systems: list[bool]) -> list[results.Row]:
    task = world.build("pope:random", n=6, size=SIZE)[0]
    found: dict[str, tuple[Scored, float]] = {
        name: (fake(c), 1.0) for name, c in zip(("none", "a", "b"), systems, strict=False)
    }
    return results._rows(task, found, draws=200)


def test_noise_is_called_noise():
    """a: four questions newly right and one wrong, p = 0.375; b: twelve newly right, p = 0.0005, twice that by Holm."""
    base = [True] * 20 + [False] * 20
    a = [False] + [True] * 19 + [True] * 4 + [False] * 16
    b = [True] * 32 + [False] * 8
    none, first, second = rows_of(base, a, b)
    assert none.against is None
    assert first.against["verdict"] == "noise"
    assert (first.against["newly_wrong"], first.against["newly_right"]) == (1, 4)
    assert first.against["p"] == pytest.approx(0.375)
    assert second.against["verdict"] == "better"
    assert second.against["p_holm"] == pytest.approx(2 * 2 / 2**12)
    assert "noise (p = 0.38)" in tables.change(first)
    assert "better (p < 0.001)" in tables.change(second)
    worse, same = rows_of(b, base, b)[1:]
    assert worse.against["verdict"] == "worse"
    assert tables.change(same) == "same"


def test_captions_are_compared_by_what_they_say_not_by_right_and_wrong():
    """Every caption names one kind of two less: none was right before, none is after, and yet it is worse."""
    truth = [("cup", "red"), ("dog", "black"), ("cat", "white")]
    pictures = [str(k) for k in range(40)]
    score = lambda said: describing.score_captions([said] * 40, [truth] * 40, pictures)  # noqa: E731
    task = world.build("caption", n=6, size=SIZE)[0]
    texts = ("A red cup and a black dog.", "A red cup.", "A red cup and a black dog.")
    found = {name: (score(text), 1.0) for name, text in zip(("none", "a", "b"), texts, strict=True)}
    worse, same = results._rows(task, found, draws=200)[1:]
    assert worse.against["newly_wrong"] == worse.against["newly_right"] == 0
    assert worse.against["verdict"] == "worse"
    assert worse.against["p_holm"] == pytest.approx(2 * 2 / 201)
    assert same.against["verdict"] == "same"


def test_results_and_tables(lvlm, relation, console, tmp_path, var):
    found = go(lvlm(), [short(relation)], [[var]], tmp_path, console, cost=True, rounds=1)
    content = json.loads((tmp_path / "results.json").read_text())
    label = found.rows[1].label
    entry = content["results"][f"scenes_relation@{label}"]
    assert 0 <= entry["accuracy_low,none"] <= entry["accuracy,none"] <= entry["accuracy_high,none"] <= 1
    assert entry["against_baseline"]["verdict"] in ("same", "noise", "better", "worse")
    assert content["config"]["tasks"][0]["questions"] == 12
    assert content["config"]["systems"][label][0]["p"] == 0.1
    cost = content["cost"]
    assert cost[label]["prefill_gflops"] > cost["none"]["prefill_gflops"] > 0
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n| scenes_relation |") == 2
    assert "baseline" in text
    assert "no suffix, at most 2 tokens" in text
    assert "greedy, batch 5, seed 0" in text
    tex = (tmp_path / "table.tex").read_text()
    assert tex.count(r"\\") == 3
    assert r"scenes\_relation & none & 12" in tex
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    again = go(lvlm(), [short(relation)], [[var]], tmp_path, console, cost=True, rounds=1)
    assert again.cost == found.cost  # measured once
    assert found.row("scenes_relation", "none").questions == 12
    with pytest.raises(InputError, match="no row"):
        found.row("scenes_relation", "vra")


def test_tuning_reports_on_other_pictures(lvlm, console, tmp_path, var):
    splits = [[short(t) for t in world.build("relation", n=6, size=SIZE, split=s)] for s in ("val", "test")]
    tuned = comparing.tune(lvlm(), *splits, [[var]], [dataclasses.replace(var, p=0.9)], tmp_path, console=console)
    assert tuned.best in {row.label for row in tuned.search.rows}
    assert {row.label for row in tuned.held_out.rows} >= {"none", tuned.best}
    assert json.loads((tmp_path / "tuned.json").read_text()) == {"best": tuned.best}
    with pytest.raises(InputError, match="are in both splits"):
        comparing.tune(lvlm(), splits[0], splits[0], [[var]], [var], tmp_path / "b", console=console)


def test_the_best_is_the_best():
    rows = rows_of([True, False, False], [True, True, False], [True, True, False])
    assert comparing.best_label(rows) == "a"
    assert comparing.best_label(rows_of([True] * 3, [True] * 3)) == "none"
    lower = [dataclasses.replace(row, scored=dataclasses.replace(row.scored, higher_is_better=False)) for row in rows]
    assert comparing.best_label(lower) == "none"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("var", ["var"]),
        ("var:p=0.2..1.0/5", [f"var:p={v}" for v in ("0.2", "0.4", "0.6", "0.8", "1")]),
        ("a:k=16..64/4+b", ["a:k=16+b", "a:k=32+b", "a:k=48+b", "a:k=64+b"]),
        ("var:p=0..1/2,summ=0.1..0.3/2", ["var:p=0,summ=0.1", "var:p=0,summ=0.3", "var:p=1,summ=0.1", "var:p=1,summ=0.3"]),
        ("var:p=0.0..1.0", [f"var:p={v}" for v in ("0", "0.25", "0.5", "0.75", "1")]),
        ("x:t=-1..1/3,u=a/b", ["x:t=-1,u=a/b", "x:t=0,u=a/b", "x:t=1,u=a/b"]),
        ("a:k=4|2|none+b:r=3", ["a:k=4+b:r=3", "a:k=2+b:r=3", "a:k=none+b:r=3"]),
        ("a:t=0.5/0.2|0.3/0.1,k=0..4/2", ["a:t=0.5/0.2,k=0", "a:t=0.5/0.2,k=4", "a:t=0.3/0.1,k=0", "a:t=0.3/0.1,k=4"]),
        ("a:file=../x.safetensors", ["a:file=../x.safetensors"]),
    ],
)  # fmt: skip
def test_sweeps(spec, expected):
    assert expand(spec) == expected


def test_sweep_refusals():
    for spec, named in {
        "var:p=0.2..x/5": "cannot read the range",
        "var:p=1..0/3": "LOW must be below HIGH",
        "var:p=0..1/1": "STEPS in",
        "var:p=0..1/1.5": "cannot read 0..1/1.5",
        "var:p=0.2|": "empty choice",
        "var:p=0..1/100,summ=0..1/100": "10000 combinations",
    }.items():
        with pytest.raises(ParameterError, match=named):
            expand(spec)
    assert [s.p for (s,) in parse_all(["var:p=0.2..0.4/2", "var"])] == [0.2, 0.4, 0.6]
    with pytest.raises(UnknownNameError):
        parse_all(["vra"])


def test_default_grid():
    from sightline.catalog import entry

    assert expand(default_grid(entry("var"))) == [f"var:p={v}" for v in ("0", "0.25", "0.5", "0.75", "1")]


def test_refusals(lvlm, relation, console, tmp_path, var):
    with pytest.raises(AttachError, match="cannot run together"):
        go(lvlm(), [relation], [[var, var]], tmp_path / "a", console)
    with pytest.raises(InputError, match="asked for twice"):
        go(lvlm(), [relation, relation], [], tmp_path / "a", console)
    with pytest.raises(InputError, match="no task"):
        go(lvlm(), [], [], tmp_path / "a", console)
    with pytest.raises(ParameterError, match="batch_size=0"):
        Decoding(batch_size=0)
    with pytest.raises(ParameterError, match="temperature=-1"):
        Decoding(temperature=-1)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("tasks", "combinations", "said"),
    [
        ("scenes:pope", [], "evaluate.find"),
        (["scenes:pope"], [], "evaluate.find"),
        (None, ["var"], "give lists of systems"),
        (None, [entry("var").cls()], "give lists of systems"),
    ],
)
def test_what_people_try_first(lvlm, relation, console, tmp_path, tasks, combinations, said):
    with pytest.raises(ParameterError, match=said):
        comparing.compare(lvlm, [relation] if tasks is None else tasks, combinations, tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()

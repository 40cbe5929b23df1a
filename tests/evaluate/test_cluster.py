"""Real Ray workers on this machine: the same results as one process, also when a worker is killed in mid-run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from functools import partial

import pytest

from sightline.errors import InputError, MissingExtraError, ModelError, ParameterError
from sightline.evaluate import comparing, world
from sightline.evaluate.folder import ANSWERS
from sightline.evaluate.runner import Decoding, Work, with_baseline
from tests.evaluate.conftest import SIZE, load_tiny

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'sightline[cluster]'")

from sightline.evaluate import cluster  # noqa: E402

ONE = Decoding(batch_size=2)


@pytest.fixture(scope="module")
def tasks():
    relation, pointing = (world.build(name, n=24, size=SIZE)[0] for name in ("relation", "pointing"))
    return [dataclasses.replace(relation, max_new_tokens=3), pointing]


@pytest.fixture(scope="module")
def started():
    """One small Ray for all tests of the module."""
    ray.init(num_cpus=2, object_store_memory=cluster.STORE, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def go(workers, tasks, var, out, console, **options):
    return comparing.compare(workers, tasks, [[var]], out, decoding=ONE, console=console, **{"cost": False, **options})


def results_of(folder):
    return (folder / "results.json").read_bytes()


@pytest.mark.slow
def test_two_workers_one_killed(started, tasks, var, tmp_path, console):
    """A worker is killed with -9 after the fifth shard; every answer is there once, and results.json is the same bytes."""
    go(load_tiny("llava"), tasks, var, tmp_path / "one", console)
    with cluster.Cluster(partial(load_tiny, "llava"), workers=2) as workers:
        before, answered = workers.processes(), []
        original = workers.answers

        def killing(work, todo):
            for rows in original(work, todo):
                answered.append(rows)
                if len(answered) == 5:
                    os.kill(before[0], signal.SIGKILL)
                yield rows

        workers.answers = killing
        go(workers, tasks, var, tmp_path / "two", console)
        after = workers.processes()
    assert len(before) == len(set(before)) == 2
    assert before[0] not in after
    assert before[1] in after
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")
    lines = [(tmp_path / name / ANSWERS).read_text().splitlines() for name in ("one", "two")]
    assert sorted(lines[0]) == sorted(lines[1])
    assert len(answered) == len(list(Work({t.name: t for t in tasks}, with_baseline([[var]]), ONE)))


@pytest.mark.slow
def test_cost_and_resuming(started, tasks, var, tmp_path, console):
    """Begun in one process, finished on Ray, cost measured there; times stand under "cost" alone."""
    with pytest.raises(KeyboardInterrupt):
        go(Stopping(load_tiny("llava"), 3), tasks, var, tmp_path / "a", console)
    go(load_tiny("llava"), tasks, var, tmp_path / "b", console, cost=True, rounds=1)
    with cluster.Cluster(partial(load_tiny, "llava"), workers=1) as workers:
        go(workers, tasks, var, tmp_path / "a", console, cost=True, rounds=1)
    here, there = (json.loads(results_of(tmp_path / name)) for name in "ba")
    for label, figures in there.pop("cost").items():
        assert figures["prefill_gflops"] == here["cost"][label]["prefill_gflops"]
        assert figures["prefill_ms"] > 0
    here.pop("cost")
    assert here == there


class Stopping(comparing.Here):
    """Interrupted after a number of shards."""

    def __init__(self, lvlm, shards):
        super().__init__(lvlm)
        self.shards = shards

    def answers(self, work, todo):
        yield from super().answers(work, todo[: self.shards])
        raise KeyboardInterrupt


def die(item):
    os._exit(1)


def die_loading(name):
    os._exit(1)


def missing(name):
    raise ModelError(f"no model {name!r}")


@pytest.mark.slow
def test_a_shard_that_always_kills_is_given_up(started, tasks, var, tmp_path, console):
    deadly = dataclasses.replace(tasks[0], open=die)
    with (
        cluster.Cluster(partial(load_tiny, "llava"), workers=1) as workers,
        pytest.raises(ModelError, match=r"died 3 times at scenes_relation under 'none', question \S+ .*batch-size"),
    ):
        go(workers, [deadly], var, tmp_path / "a", console)


@pytest.mark.slow
def test_a_model_that_does_not_fit(started):
    with (
        pytest.raises(ModelError, match="died while it loaded the model"),
        cluster.Cluster(partial(die_loading, "llava"), workers=1),
    ):
        pass


@pytest.mark.slow
def test_errors_of_workers_are_raised_as_they_are(started, tasks, var, tmp_path, console):
    with pytest.raises(ModelError, match="no model 'llava'"), cluster.Cluster(partial(missing, "llava"), workers=1):
        pass
    lost = dataclasses.replace(tasks[0], open=partial(_lost, "a.png"))
    with (
        cluster.Cluster(partial(load_tiny, "llava"), workers=1) as workers,
        pytest.raises(InputError, match=r"picture 'a\.png' is no longer there"),
    ):
        go(workers, [lost], var, tmp_path / "b", console)


def _lost(name, item):
    raise InputError(f"picture {name!r} is no longer there")


def test_refusals(monkeypatch):
    with pytest.raises(ParameterError, match="workers=0"):
        cluster.Cluster(load_tiny, workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"sightline\[cluster\]"):
        cluster.Cluster(load_tiny)


def test_workers_that_differ_are_refused():
    workers = cluster.Cluster(load_tiny)
    workers._facts = {"model": {"name": "a"}, "versions": {"torch": "2.6"}}
    workers._check({"model": {"name": "a"}, "versions": {"torch": "2.6"}})
    with pytest.raises(ModelError, match=r"versions\.torch is '2\.6' on one and '2\.7' on another"):
        workers._check({"model": {"name": "a"}, "versions": {"torch": "2.7"}})

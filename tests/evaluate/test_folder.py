"""The run folder: append-only answers, locks, damage, a full disk."""

from __future__ import annotations

import json
import multiprocessing as mp
import resource
import signal
import time

import pytest

from sightline.errors import InputError
from sightline.evaluate.folder import ANSWERS, CONFIG, RunFolder, differences

CONFIGURATION = {"model": {"name": "tiny"}, "tasks": [{"task": "t"}], "seed": 0}


def row(k, answer="Yes é\u2028", task="t", label="none"):
    return {"task": task, "with": label, "id": str(k), "answer": answer}


def test_answers_come_back(tmp_path):
    out = tmp_path / "a" / "run"
    with RunFolder(out, CONFIGURATION) as folder:
        folder.add([row(0), row(1)])
        folder.add([])
        folder.add([row(2, "lone \ud800")])
    with RunFolder(out, CONFIGURATION) as folder:
        assert [key[2] for key in folder.answers] == ["0", "1", "2"]
        assert folder.answers["t", "none", "0"] == row(0)
        assert folder.recovered == 0
    assert len((out / ANSWERS).read_bytes().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_half_written_line_is_cut_off(tmp_path, cut):
    with RunFolder(tmp_path, CONFIGURATION) as folder:
        folder.add([row(0), row(1)])
    path = tmp_path / ANSWERS
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with RunFolder(tmp_path, CONFIGURATION) as folder:
        assert [key[2] for key in folder.answers] == ["0"]
        assert folder.recovered == len(whole) // 2 - cut
        folder.add([row(1)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": 1}\n', "line 1 was not written by this program"),
        ("hello\n", "line 1"),
        (json.dumps(row(0)) + "\n[]\n", "line 2"),
        (json.dumps(row(0)) + "\n" + json.dumps(row(0, "No")) + "\n", "'0' of t under 'none' was answered differently"),
    ],
)
def test_foreign_answers(tmp_path, text, named):
    with RunFolder(tmp_path, CONFIGURATION):
        pass
    (tmp_path / ANSWERS).write_text(text)
    with pytest.raises(InputError, match=named):
        RunFolder(tmp_path, CONFIGURATION).__enter__()
    assert (tmp_path / ANSWERS).read_text() == text


def test_a_repeated_line_is_one_answer(tmp_path):
    with RunFolder(tmp_path, CONFIGURATION) as folder:
        folder.add([row(0)])
    path = tmp_path / ANSWERS
    path.write_bytes(path.read_bytes() * 2)
    with RunFolder(tmp_path, CONFIGURATION) as folder:
        assert len(folder.answers) == 1


def test_another_configuration_is_refused(tmp_path):
    with RunFolder(tmp_path, CONFIGURATION):
        pass
    with pytest.raises(InputError, match=r'holds a run with model\.name="tiny", now it is "big"'):
        RunFolder(tmp_path, {**CONFIGURATION, "model": {"name": "big"}}).__enter__()
    with pytest.raises(InputError, match="holds a run with seed=0, now it is 1"):
        RunFolder(tmp_path, {**CONFIGURATION, "seed": 1}).__enter__()
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        RunFolder(tmp_path, CONFIGURATION).__enter__()
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(InputError, match="not of a run of this program"):
        RunFolder(tmp_path, CONFIGURATION).__enter__()


def test_differences():
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}], "c": 4}) == [("a[1].b", 2, 3), ("c", None, 4)]
    assert differences([1], [1, 2]) == [("", [1], [1, 2])]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(InputError, match=r"thesis\.doc"):
        RunFolder(tmp_path, CONFIGURATION).__enter__()
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "thesis.doc", CONFIGURATION).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]


def _hold(path, ready):
    with RunFolder(path, CONFIGURATION):
        ready.set()
        time.sleep(60)


def test_two_runs_into_one_folder(tmp_path):
    context = mp.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(20)
    with pytest.raises(InputError, match=f"another run \\(process {other.pid}\\) is writing"):
        RunFolder(tmp_path, CONFIGURATION).__enter__()
    other.kill()  # a killed run leaves its lock file behind, but not the lock
    other.join()
    with RunFolder(tmp_path, CONFIGURATION) as folder:
        folder.add([row(0)])


def test_a_full_disk_loses_nothing(tmp_path):
    """A real limit on the file's size: writing fails half-way through a batch."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with RunFolder(tmp_path, CONFIGURATION) as folder:
            folder.add([row(0)])
            size = (tmp_path / ANSWERS).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
            with pytest.raises(InputError, match=r"the disk is full.*1 answers are safe"):
                folder.add([row(1), row(2)])
            assert (tmp_path / ANSWERS).stat().st_size == size
            with pytest.raises(InputError, match="cannot write"):
                folder.write("results.json", "x" * 5000)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            folder.add([row(1)])
            folder.write("results.json", "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with RunFolder(tmp_path, CONFIGURATION) as folder:
        assert [key[2] for key in folder.answers] == ["0", "1"]
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))

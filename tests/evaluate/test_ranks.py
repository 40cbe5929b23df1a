"""Two processes started by accelerate on the CPU: the same bytes as one process; errors end all of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'sightline[accelerate]'")

from sightline.errors import ParameterError
from sightline.evaluate import ranks
from sightline.evaluate.folder import ANSWERS

LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend",
          "no", "--mixed_precision", "no", "--main_process_port", "0", "-m", "sightline")  # fmt: skip
ASKED = ("compare", "--on", "scenes:pointing", "--on", "scenes:relation", "--with", "var:tau=1.5", "--n", "5",
         "--batch-size", "2", "--max-new-tokens", "2", "--no-cost")  # fmt: skip


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_two_processes(tmp_path):
    one = start("-m", "sightline", *ASKED, "--out", tmp_path / "one")
    two = start(*LAUNCH, *ASKED, "--out", tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for name in ("results.json", "config.json", ANSWERS):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert two.stdout.count("scenes_pointing, ") == 1  # one process prints
    # Half of it lost: what is missing is asked again, by both.
    path = tmp_path / "two" / ANSWERS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]))
    again = start(*LAUNCH, *ASKED, "--out", tmp_path / "two")
    assert again.returncode == 0, again.stderr
    assert path.read_bytes() == (tmp_path / "one" / ANSWERS).read_bytes()
    # Another question for the same folder: the first process refuses, nobody waits.
    refused = start(*LAUNCH, *ASKED, "--seed", "1", "--out", tmp_path / "two")
    assert refused.returncode != 0
    assert "choose another --out" in refused.stderr


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not ranks.launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.launched()


def test_the_launcher_chooses_the_device(monkeypatch):
    class State:
        device = "cuda:1"

    monkeypatch.setattr(ranks, "_state", State)
    assert ranks.device() == ranks.device("cuda") == "cuda:1"
    with pytest.raises(ParameterError, match=r"accelerate gave this one 'cuda:1'.*--cpu"):
        ranks.device("cpu")

"""The doctor reports faults as faults, notes as notes, and never falls ill itself."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from sightline import cli, doctor, sources
from sightline.doctor import Check
from sightline.hosts import REGISTRY, Host
from tests.tiny_hosts import TINY


def named(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def bundled(tmp_path, monkeypatch) -> Path:
    """A tiny random model in the place of the bundled one."""
    host = TINY["llava"]()
    host.model.save_pretrained(tmp_path)
    host.processor.save_pretrained(tmp_path)
    monkeypatch.setitem(sources.BUNDLED, "tiny", tmp_path)
    return tmp_path


def test_a_sound_machine(bundled, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks = named(doctor.examine())
    assert not [check for check in checks.values() if check.status == "fault"]
    assert checks["torch"].found == metadata.version("torch")
    assert checks["transformers"].status == "ok"
    assert "GiB free" in checks["cpu"].found
    assert {host.name for host in REGISTRY.values()} == set(checks["hosts"].found.split(", "))
    assert "var" in checks["systems"].found.split(", ")
    assert checks["model tiny"].found.startswith("Please describe this image in detail.")
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in told} == set(checks)
    assert set(told[0]) == {"name", "status", "found", "mend"}


def test_the_table(capsys, monkeypatch):
    ill = [
        Check("torch", "fault", "1.0, but >=2.6 is needed", "pip install 'torch>=2.6'"),
        Check("cpu", "ok", "2 cores"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: ill)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines][:2] == [
        ["fault", "torch", "1.0,", "but", ">=2.6", "is", "needed"],
        ["pip", "install", "'torch>=2.6'"],
    ]
    monkeypatch.setattr(doctor, "examine", lambda: ill[1:])
    assert cli.main(["doctor"]) == 0


def test_a_missing_bundled_model(monkeypatch, tmp_path):
    monkeypatch.setitem(sources.BUNDLED, "tiny", tmp_path / "gone")
    (check,) = doctor._guarded(doctor._bundled)
    assert check.status == "fault"
    assert "gone" in check.found


def test_a_damaged_bundled_model(bundled):
    (bundled / "model.safetensors").write_bytes(b"nothing")
    (check,) = doctor._guarded(doctor._bundled)
    assert check.status == "fault"
    assert "damaged" in check.found


@pytest.mark.parametrize(
    ("installed", "extra", "status", "mend"),
    [
        ("2.6.1", "", "ok", ""),
        ("2.5", "", "fault", "pip install 'torch>=2.6'"),
        (None, "", "fault", "pip install 'torch>=2.6'"),
        (None, "quant", "note", "pip install 'sightline[quant]'"),
        ("2.5", "quant", "note", "pip install 'sightline[quant]'"),
    ],
)
def test_packages(monkeypatch, installed, extra, status, mend):
    def version(name):
        if installed is None:
            raise metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(metadata, "version", version)
    check = doctor._package("torch", SpecifierSet(">=2.6"), extra)
    assert (check.status, check.mend) == (status, mend)


def test_only_what_a_user_needs_is_looked_for(monkeypatch):
    needs = ["torch>=2.6", "timm>=1; extra == 'timm'", 'ruff>=0.9; extra == "dev"', "timm>=1; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    assert list(named(doctor._packages())) == ["torch", "timm"]


def test_a_family_that_transformers_lacks(monkeypatch):
    monkeypatch.setitem(REGISTRY, "NoSuchModel", Host(name="novel", classes=("NoSuchModel",)))
    checks = named(doctor._hosts())
    assert checks["hosts missing"].status == "note"
    assert checks["hosts missing"].found == "novel"
    assert "novel" not in checks["hosts"].found


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H9000")
    monkeypatch.setattr(doctor, "free_memory", lambda device: 3 * 2**30)
    checks = named(doctor._devices())
    assert checks["cuda:0"].found == "H9000, 3.0 GiB free"
    assert "gpu" not in checks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "mps" in named(doctor._devices())


def test_a_check_that_breaks_is_a_fault(monkeypatch):
    def _systems():
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(doctor, "_systems", _systems)
    monkeypatch.setattr(doctor, "_bundled", lambda: [])
    assert named(doctor.examine())["systems"] == Check(
        "systems", "fault", "by zero", "mend what the message says, or reinstall sightline"
    )


def test_the_browser(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._browser()[0].status == "note"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    assert doctor._browser()[0].found == "/bin/google-chrome"

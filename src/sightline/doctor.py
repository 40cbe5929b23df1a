"""`sightline doctor`: what is installed, what the machine has, and whether the bundled model answers."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING

from sightline.memory import GIB, free_memory
from sightline.sources import BUNDLED

if TYPE_CHECKING:
    from rich.console import Console

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: str  # "ok", "note" (something optional is absent) or "fault" (sightline cannot work as it should)
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """All checks. A check that fails unexpectedly becomes a fault of its own."""
    checks: list[Check] = []
    for part in (_python, _packages, _devices, _hosts, _systems, _bundled, _hub, _browser):
        checks += _guarded(part)
    return checks


def _guarded(part: Callable[[], list[Check]]) -> list[Check]:
    try:
        return part()
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        return [Check(part.__name__.strip("_"), "fault", said, "mend what the message says, or reinstall sightline")]


def show(checks: list[Check], console: Console) -> None:
    """Print the checks as a table, then what to mend."""
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "note": "yellow", "fault": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for check in checks:
        mend = Text(f"\n{check.mend}", "dim") if check.mend else Text()
        table.add_row(Text(check.status, style[check.status]), Text(check.name), Text(check.found) + mend)
    console.print(table)


def _python() -> list[Check]:
    return [Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}, {sys.executable}")]


def _packages() -> list[Check]:
    """What pyproject.toml asks for, against what is installed; packages of extras are optional."""
    from packaging.requirements import Requirement

    checks: dict[str, Check] = {}
    for text in metadata.requires("sightline") or []:
        need = Requirement(text)
        extra = str(need.marker).partition("extra == ")[2].strip("\"'") if need.marker else ""
        if extra == "dev" or need.name in checks:
            continue
        checks[need.name] = _package(need.name, need.specifier, extra)
    return list(checks.values())


def _package(name: str, wanted: object, extra: str) -> Check:
    mend = f"pip install 'sightline[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "note" if extra else "fault", "not installed", mend)
    if version not in wanted:
        return Check(name, "note" if extra else "fault", f"{version}, but {wanted} is needed", mend)
    return Check(name, "ok", version)


def _devices() -> list[Check]:
    import torch

    free = free_memory("cpu")
    memory = f"{free / GIB:.1f} GiB free" if free is not None else "free memory unknown"
    checks = [Check("cpu", "ok", f"{os.cpu_count()} cores, {memory}")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, left = torch.cuda.get_device_name(index), free_memory(f"cuda:{index}") or 0
        checks.append(Check(f"cuda:{index}", "ok", f"{name}, {left / GIB:.1f} GiB free"))
    if torch.backends.mps.is_available():
        checks.append(Check("mps", "ok", "Apple GPU"))
    if len(checks) == 1:
        checks.append(Check("gpu", "note", "none: models run on the CPU"))
    return checks


def _hosts() -> list[Check]:
    """Which model families this transformers and timm have."""
    import transformers

    from sightline import hosts

    hosts.load_all()
    usable: dict[str, bool] = {}
    for name, host in hosts.REGISTRY.items():
        timm = getattr(host, "fused", False)
        present = util.find_spec("timm") is not None if timm else hasattr(transformers, name)
        usable[host.name] = usable.get(host.name, False) or present
    missing = sorted(name for name, present in usable.items() if not present)
    found = ", ".join(sorted(name for name, present in usable.items() if present))
    checks = [Check("hosts", "ok", found)]
    if missing:
        checks.append(Check("hosts missing", "note", ", ".join(missing), "upgrade transformers, or install timm"))
    return checks


def _systems() -> list[Check]:
    from sightline.catalog import load_all

    return [Check("systems", "ok", ", ".join(load_all()))]


def _bundled() -> list[Check]:
    """Load the bundled model and ask it the bundled question."""
    from sightline.loading import load
    from sightline.looking import example

    if not (BUNDLED["tiny"] / "config.json").is_file():
        return [Check("model tiny", "fault", f"not in {BUNDLED['tiny']}", "reinstall sightline")]
    begin = time.perf_counter()
    image, question = example()
    answer = load("tiny", device="cpu").ask(image, question, max_new_tokens=16)
    seconds = time.perf_counter() - begin
    return [Check("model tiny", "ok" if answer else "fault", f"{question} {answer} ({seconds:.1f} s)")]


def _hub() -> list[Check]:
    from huggingface_hub import constants

    folder = constants.HF_HUB_CACHE
    existing = folder
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free / GIB
    mode = "offline (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "online"
    return [Check("hub", "ok", f"{mode}; downloads go to {folder}, {free:.0f} GiB free")]


def _browser() -> list[Check]:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found:
        return [Check("chromium", "ok", found)]
    return [Check("chromium", "note", "not found: only the browser tests need it", "install chromium to run them")]

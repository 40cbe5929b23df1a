"""A tiny model as a loaded `LVLM`, small tasks, and a quiet console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sightline.evaluate import world
from sightline.hosts import find
from sightline.lvlm import LVLM
from sightline.steer.var import VAR
from tests.tiny_hosts import TINY

SIZE = 56


def load_tiny(name: str = "llava") -> LVLM:
    """A tiny random model, the same in every process."""
    host = TINY[name]()
    return LVLM(host.model.eval(), host.processor, find(host.model), name)


@pytest.fixture
def lvlm(tiny):
    def make(name: str = "llava") -> LVLM:
        host = tiny(name)
        return LVLM(host.model, host.processor, find(host.model), name)

    return make


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def var():
    return VAR(p=0.1, tau=1.5, min_nonsink_ratio=0.0, summ=0.0)


@pytest.fixture(scope="session")
def relation():
    """Twelve questions about six pictures."""
    return world.build("relation", n=12, size=SIZE)[0]

"""What every test shares: one thread, no network, and tiny models that are built once per process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from hypothesis import settings

from tests.tiny_hosts import TINY, TINY_VITS, TinyHost, TinyViT
from tests.traces import differences, trace

torch.set_num_threads(1)
settings.register_profile("sightline", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("sightline")


@cache
def build(name: str) -> TinyHost:
    return TINY[name]()


@cache
def build_vit(name: str) -> TinyViT:
    return TINY_VITS[name]()


@pytest.fixture
def tiny() -> Iterator[Callable[[str], TinyHost]]:
    """The tiny host of a name, shared by all tests of the process; a test that leaves a trace on it fails."""
    yield from _lend(build)


@pytest.fixture
def tiny_vit() -> Iterator[Callable[[str], TinyViT]]:
    """The tiny plain vision transformer of a name, shared like `tiny`."""
    yield from _lend(build_vit)


def _lend(make: Callable) -> Iterator[Callable]:
    lent = {}

    def lend(name: str):
        host = make(name)
        lent.setdefault(name, (host, trace(host.model)))
        return host

    yield lend
    left = {name: differences(before, trace(host.model)) for name, (host, before) in lent.items()}
    left = {name: found for name, found in left.items() if found}
    if left:
        make.cache_clear()  # the next test gets clean ones
        pytest.fail(f"the test left traces on shared models: {left}")

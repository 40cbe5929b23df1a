"""What every test shares: one thread, no network, and tiny models that are built once per process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature

import pytest
import torch
from hypothesis import settings

from tests.tiny_hosts import TINY, TINY_VITS, TinyHost, TinyViT, picture
from tests.traces import differences, trace

torch.set_num_threads(1)
settings.register_profile("sightline", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("sightline")


@cache
def build(name: str) -> TinyHost:
    host = TINY[name]()
    inputs = host.inputs(["?"])
    with torch.no_grad():  # transformers itself leaves hooks and notes behind the first time
        host.model(**inputs, output_hidden_states=True)
        host.model.generate(**inputs, max_new_tokens=1, cache_implementation="static")
        host.model.model.get_image_features(**_pictures(host), output_hidden_states=True)
    return host


@cache
def build_vit(name: str) -> TinyViT:
    vit = TINY_VITS[name]()
    if hasattr(vit.model, "config"):
        with torch.no_grad():
            vit.model(**vit.inputs([picture()]), output_hidden_states=True)
    return vit


def _pictures(host: TinyHost) -> dict:
    wanted = signature(host.model.model.get_image_features).parameters
    return {k: v for k, v in host.inputs(["?"], [[picture()]]).items() if k in wanted}


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

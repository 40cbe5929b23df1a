"""The tiny random hosts as loaded models, with sinks forced by a low threshold, and the naive truth beside them."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from sightline.engine.attach import attach
from sightline.engine.record import Seen, record
from sightline.engine.tokens import Role
from sightline.explain.observing import prefill
from sightline.explain.questions import Item, held_out
from sightline.hosts import find
from sightline.lvlm import LVLM
from tests.tiny_hosts import TINY

TAU, DIMS = 1.8, (3, 7)
SINKS = {"tau": TAU, "sink_dims": DIMS}


@lru_cache
def lvlm(name: str = "llava") -> LVLM:
    made = TINY[name]()
    return LVLM(made.model, made.processor, find(made.model), name)


@lru_cache
def items() -> tuple[Item, ...]:
    return tuple(held_out(3, size=56))


def batch(count: int = 3) -> SimpleNamespace:
    """Questions of different lengths about different pictures, so that rows are padded."""
    chosen = [items()[0], items()[-1], items()[5]][:count]
    return SimpleNamespace(
        items=chosen,
        images=[i.scene.image for i in chosen],
        questions=[i.text for i in chosen],
        answers=[i.answer for i in chosen],
    )


def whole(model: LVLM, images: list, questions: list, *systems: Any) -> Seen:
    """The full maps of the prompt, `.maps[0][layer]` (B, H, N, N), and phi, under some systems."""
    recorder = record(maps=True, **SINKS)
    with attach(model.model, *systems, recorder, host=model.host):
        prefill(model, model.inputs(images, questions))
    return recorder.seen


def text_rows(seen: Seen, b: int) -> torch.Tensor:
    """(N,) bool: text after the picture."""
    return seen.tokens.role[b] == int(Role.AFTER)


def sinks_of(seen: Seen, layer: int, b: int) -> torch.Tensor:
    """(N,) bool: the visual sinks of a layer."""
    return seen.tokens.visual[b] & (seen.phi[layer][b] > TAU)

"""A loaded-model stand-in over the tiny random hosts, with sinks forced by a low threshold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from sightline.explain.questions import held_out
from sightline.hosts import find
from tests.tiny_hosts import TINY

TAU, DIMS = 1.6, (3, 7)
SINKS = {"tau": TAU, "sink_dims": DIMS}


@dataclass
class TinyLVLM:
    """Has what `sightline.load` returns."""

    name: str
    made: Any

    def __post_init__(self) -> None:
        self.model, self.processor = self.made.model, self.made.processor
        self.host = find(self.model)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def inputs(self, images: list, questions: list) -> Any:
        return self.made.inputs(questions, [[image] for image in images])


@lru_cache
def lvlm(name: str = "llava") -> TinyLVLM:
    return TinyLVLM(name, TINY[name]())


@lru_cache
def items(n: int = 3) -> list:
    return held_out(n, size=56)


def parts(count: int) -> SimpleNamespace:
    chosen = items()[:: max(1, len(items()) // count)][:count]
    return SimpleNamespace(items=chosen, images=[i.scene.image for i in chosen], questions=[i.text for i in chosen],
                           answers=[i.answer for i in chosen])  # fmt: skip

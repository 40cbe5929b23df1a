"""Samples from the generated world, each a function of its index: a resumed run sees the same stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sightline import scenes
from sightline.learn.recipe import Plan

STREAMS = {
    "tower": 0,
    "read": 1 << 24,
    "settle": 2 << 24,
    "instruct": 3 << 24,
    "tokenizer": 4 << 24,
    "name": 5 << 24,
    "classifier": 6 << 24,
    "diffusion": 7 << 24,
}


class Indexed(Dataset):
    """A data set whose sample k is `make(k)`."""

    def __init__(self, make: Callable[[int], Any], size: int):
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class _From(Sampler):
    def __init__(self, first: int, end: int):
        self.span = range(first, end)

    def __iter__(self) -> Iterator[int]:
        return iter(self.span)

    def __len__(self) -> int:
        return len(self.span)


def stream(make: Callable[[int], Any], collate: Callable, plan: Plan, workers: int) -> Callable[[int], Iterator[Any]]:
    """Batches of `make(0), make(1), ...` for `Trainer.run`: `stream(...)(k)` starts at step k."""

    def batches(step: int) -> Iterator[Any]:
        total = plan.steps * plan.batch
        return iter(DataLoader(
            Indexed(make, total), plan.batch, sampler=_From(step * plan.batch, total), collate_fn=collate,
            num_workers=workers, prefetch_factor=4 if workers else None,
            generator=torch.Generator().manual_seed(0),  # without it the loader draws from the run's own random state
        ))  # fmt: skip

    return batches


def scene_of(stage: str, index: int, seed: int, size: int) -> tuple[scenes.Scene, np.random.Generator]:
    """The training scene of sample `index` of a stage, and the generator for everything else the sample draws."""
    number = STREAMS[stage] + index + seed * (1 << 27)
    return scenes.draw(scenes.seeds("train", number % (1 << 31) + 1)[-1], size=size), np.random.default_rng(number)

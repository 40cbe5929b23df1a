"""Time and peak memory of a module's forward and of forward with backward, and exponents fitted over lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sightline.evaluate.peak import peak_bytes


@dataclass(frozen=True)
class Measured:
    """Seconds (median over repeats) and peak bytes (weights included) of one module on one input."""

    forward_s: float
    train_s: float | None
    forward_bytes: int
    train_bytes: int | None


def measure(module: nn.Module, x: Tensor, *, repeats: int = 5, seconds: float = 2.0, train: bool = True) -> Measured:
    """Measure `module(x)`, and with `train` forward and backward to x and all weights.

    repeats: at most so many runs, and none begins after `seconds`; one run before them is not counted.
    """

    def forward() -> None:
        with torch.inference_mode():
            module(x)

    leaf = x.detach().clone().requires_grad_(x.is_floating_point())

    def both() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        module(leaf).float().square().mean().backward()

    return Measured(
        timed(forward, x.device, repeats, seconds),
        timed(both, x.device, repeats, seconds) if train else None,
        peak_bytes(module, forward),
        peak_bytes(module, both) if train else None,
    )


def timed(work: Callable[[], Any], device: torch.device, repeats: int, seconds: float) -> float:
    """Median seconds of `work`, after one run that is not counted (unless that took longer than `seconds` by itself)."""
    taken = [_once(work, device)]
    if taken[0] > seconds:
        return taken[0]
    taken, start = [], time.perf_counter()
    while not taken or (len(taken) < repeats and time.perf_counter() - start < seconds):
        taken.append(_once(work, device))
    return median(taken)


def _once(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def exponent(lengths: Sequence[int], values: Sequence[float], *, least: int = 4096) -> float | None:
    """The power p of the best fit value = c length^p over lengths >= `least`; None with fewer than two of them."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if n >= least and v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread

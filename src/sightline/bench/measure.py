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
    """Seconds and peak bytes (weights included) of one module on one input; medians over repeats.

    `cpu` seconds are the processor's own, of all threads together: what else the machine does at the time does not count.
    """

    forward_s: float
    forward_cpu_s: float | None  # None on other devices
    train_s: float | None
    train_cpu_s: float | None
    forward_bytes: int
    train_bytes: int | None


def measure(module: nn.Module, x: Tensor, *, repeats: int = 5, seconds: float = 2.0, train: bool = True) -> Measured:
    """Measure `module(x)`, and with `train` forward and backward to x and all weights.

    repeats: at most so many runs, and none begins after `seconds`; one run before them is not counted.
    """

    def forward() -> None:
        with torch.no_grad():  # not inference_mode: there the memory inside composite operations would not be counted
            module(x)

    leaf = x.detach().clone().requires_grad_(x.is_floating_point())

    def both() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        module(leaf).float().square().mean().backward()

    return Measured(
        *timed(forward, x.device, repeats, seconds),
        *(timed(both, x.device, repeats, seconds) if train else (None, None)),
        peak_bytes(module, forward),
        peak_bytes(module, both) if train else None,
    )


def timed(work: Callable[[], Any], device: torch.device, repeats: int, seconds: float) -> tuple[float, float | None]:
    """Median seconds of `work` and of the processor (None on other devices), after one run that is not counted.

    That first run counts when it took longer than `seconds` by itself.
    """
    taken = [_once(work, device)]
    if taken[0][0] <= seconds:
        taken, start = [], time.perf_counter()
        while not taken or (len(taken) < repeats and time.perf_counter() - start < seconds):
            taken.append(_once(work, device))
    wall, cpu = zip(*taken, strict=True)
    return median(wall), median(cpu) if device.type == "cpu" else None


def _once(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(wall, processor) seconds of one run."""
    _wait(device)
    start, busy = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return time.perf_counter() - start, time.process_time() - busy


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exponent(lengths: Sequence[int], values: Sequence[float], *, least: int = 4096) -> float | None:
    """The power p of the best fit value = c length^p over lengths >= `least`; None with fewer than two of them."""
    points = [(math.log(n), math.log(v)) for n, v in zip(lengths, values, strict=True) if n >= least and v > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread

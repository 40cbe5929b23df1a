"""Test-time adaptation by a loss that needs no labels: tune, answer, put everything back.

DEEM's variant (arXiv 2405.15232, off by default there): AdamW on encoder and visual tokens by the feedback loss of the picture
that is asked about, at time steps in even distances. Against its code: exactly `samples` time steps (its list has one more
when it begins at 0), and only the tuned parameters are kept and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sightline.errors import ParameterError


def stratified_timesteps(samples: int, start: int, total: int = 1000) -> Tensor:
    """(samples,) time steps at even distances of total // samples, from `start` < total // samples on."""
    return start + total // samples * torch.arange(samples)


@contextmanager
def adapted(module: nn.Module, loss_of: Callable[[Tensor], Tensor], *, steps: int = 10, samples: int = 9,
            lr: float = 4e-6, total: int = 1000) -> Iterator[list[float]]:  # fmt: skip
    """Test-time adaptation: inside, `module` is tuned to the picture at hand; afterwards it is as before, bit for bit.

    Args:
        module: what is tuned (encoder and visual tokens). loss_of: time steps (samples,) -> feedback loss of the picture.

    Yields:
        The losses of the steps.

    Raises:
        ParameterError: no parameter of the module requires a gradient.
    """
    tuned = [p for p in module.parameters() if p.requires_grad]
    if not tuned:
        raise ParameterError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to adapt")
    before = [p.detach().clone() for p in tuned]
    losses = []
    try:
        optimizer = torch.optim.AdamW(tuned, lr=lr)
        with torch.enable_grad():
            for _ in range(steps):
                start = int(torch.randint(0, total // samples, ()))
                loss = loss_of(stratified_timesteps(samples, start, total))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        yield losses
    finally:
        with torch.no_grad():
            for parameter, value in zip(tuned, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None

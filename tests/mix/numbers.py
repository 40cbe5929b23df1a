"""What tests of mixers share: golden arrays, relative errors, and outputs with all gradients side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.goldens import GOLDEN


def cases(slug: str, names: str = "*") -> pytest.MarkDecorator:
    """Parametrises `path` over a system's golden arrays; skips where they are not at hand."""
    paths = sorted((GOLDEN / slug).glob(f"case_{names}.npz"))
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no golden arrays {slug}/{names}"))
    return pytest.mark.parametrize("path", paths or [absent], ids=lambda p: p.stem[5:] if p else "absent")


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(arrays as tensors, scalars as Python values), and the weights `w.*` by name."""
    with np.load(path) as arrays:
        found = {k: torch.from_numpy(arrays[k]) if arrays[k].ndim else arrays[k].item() for k in arrays.files}
    weights = {k[2:]: torch.as_tensor(v) for k, v in found.items() if k.startswith("w.")}
    return {k: v for k, v in found.items() if not k.startswith("w.")}, weights


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; shapes must be equal."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return (found.double() - wanted.double()).abs().max().item() if found.numel() else 0.0


def ratio(found: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of what is wanted."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    difference = (found.double() - wanted.double()).square().mean().sqrt()
    return (difference / wanted.double().square().mean().sqrt().clamp(min=1e-9)).item()


def assert_same_gradients(
    fast: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Sequence[Tensor], limit: float = 1e-5
) -> None:
    """Outputs and every gradient of two functions of the same tensors, by relative RMS."""
    results = []
    for function in (fast, naive):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        grads = torch.autograd.grad((out * weights).sum(), leaves)
        results.append((out, *grads))
    for i, (found, wanted) in enumerate(zip(*results, strict=True)):
        assert found.dtype == wanted.dtype
        assert ratio(found, wanted) <= limit, (
            "output" if i == 0 else f"gradient of input {i - 1}",
            ratio(found, wanted),
        )


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """The module in eval mode with normal weights, so that no part of it is idle at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()

"""Comparing floating point results, and watching how large the tensors get on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# relative RMS that rounding explains, by dtype: a few units in the last place of a sum of some sixty terms
RATIO = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, root mean square."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).square().mean().sqrt() / (wanted.square().mean().sqrt() + 1e-12))


def assert_close(name: str, found: Tensor, wanted: Tensor, ratio: float = 1e-5) -> None:
    """Equal shapes, no NaN, and a relative RMS error of at most `ratio`."""
    assert found.shape == wanted.shape, f"{name}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    assert found.isfinite().all(), f"{name}: not finite"
    error = relative_rms(found, wanted)
    assert error <= ratio, f"{name}: relative RMS error {error:.2e} > {ratio:.0e}"


class Questions(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read, sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_value = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.NAMES or by_value:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made: `with Largest() as seen: ...; seen.numel`."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.where = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.numel:
                self.numel, self.where = leaf.numel(), f"{func} -> {tuple(leaf.shape)}"
        return result

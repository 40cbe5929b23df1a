"""The base of every mixer: a dataclass that is a torch module, so that its parameters are known to the registry.

Written `@system(...) @dataclass(eq=False, repr=False) class Name(Mixer)`: fields are the paper's parameters, made with
`catalog.param`; modules are built in `build`. Tensors are heads-last, (B, *grid, H, D), in every function of a mixer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sightline.catalog import check_parameters, param
from sightline.errors import InputError, ParameterError


@dataclass(frozen=True)
class Cost:
    """Price of one forward for one sample."""

    flops: int  # a multiplication and an addition are two
    bytes: int  # fp32 activations beyond input and output that the fast path holds at once
    dense_flops: int  # of softmax attention over the whole grid, with the same projections

    @property
    def saving(self) -> float:
        """How many times fewer operations than dense attention."""
        return self.dense_flops / self.flops


@dataclass(eq=False, repr=False)
class Mixer(nn.Module):
    """A token mixer: (B, *grid, C) -> (B, *grid, C)."""

    dim: int = param(MISSING, "channels C", low=1)
    heads: int = param(MISSING, "attention heads", low=1)

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Mixer:
        instance = super().__new__(cls)
        nn.Module.__init__(instance)  # before the dataclass sets its fields
        return instance

    def __post_init__(self) -> None:
        check_integers(self)
        check_parameters(self)
        self.check()
        self.build()

    def check(self) -> None:
        """Raise ParameterError for parameters that do not fit together."""
        check_division(self, "dim", self.dim, "heads", self.heads)

    def build(self) -> None:
        """Make the modules."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """What the query at `index` of the grid attends to: (B, H, *grid), the exact row of the map.

        Args:
            x: (B, *grid, C), the input of a forward. index: one position per axis.
        """
        raise InputError(f"{type(self).__name__} has no attention row")

    def cost(self, grid: Sequence[int]) -> Cost:
        """Operations and memory of one forward over `grid`."""
        return self.priced(grid, mixing=4 * prod(grid) ** 2 * self.dim, held=3 * prod(grid) * self.dim)

    def priced(self, grid: Sequence[int], *, mixing: float, held: float, projections: float | None = None) -> Cost:
        """`Cost` from operations of the mixing alone and numbers held; four C x C projections unless given."""
        n = prod(grid)
        projections = 8 * n * self.dim**2 if projections is None else projections
        return Cost(int(mixing + projections), int(4 * held), int(8 * n * self.dim**2 + 4 * n * n * self.dim))

    def extra_repr(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))


def check_integers(instance: Any) -> None:
    """Raise ParameterError for the first field declared int whose value (or a member of it) is not an integer."""
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        if not str(f.type).startswith("int") or value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int):
                raise ParameterError(f"{type(instance).__name__}: {f.name}={value!r} must be whole numbers")


def check_division(instance: Any, name: str, value: int, by: str, divisor: int) -> None:
    """Raise ParameterError unless `divisor` divides `value`."""
    if divisor < 1 or value % divisor:
        raise ParameterError(f"{type(instance).__name__}: {name}={value} must be a multiple of {by}={divisor}")


def check_grid(mixer: Mixer, x: Tensor, axes: Sequence[int] = (1, 2, 3)) -> tuple[int, ...]:
    """The grid of x (B, *grid, C); InputError when its number of axes or channels does not suit."""
    if x.ndim - 2 not in axes or x.shape[-1] != mixer.dim or x.numel() == 0:
        wanted = " or ".join(f"(B, {', '.join('XYZ'[:n])}, {mixer.dim})" for n in axes)
        raise InputError(f"{type(mixer).__name__} takes {wanted}, not empty, got {tuple(x.shape)}")
    return tuple(x.shape[1:-1])


def per_axis(name: str, value: Any, axes: int) -> tuple:
    """One value per axis from one value for all, or from as many as there are axes."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise ParameterError(f"{name}={value!r} has {len(values)} values for {axes} axes")
    return values


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(..., parts * H * D) -> `parts` tensors (..., H, D)."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


def as_it_is(device: torch.device) -> AbstractContextManager:
    """Inside, autocast does not lower the precision of sums."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def flat_index(index: Sequence[int], grid: Sequence[int]) -> int:
    """Row-major number of a grid position (negative counts from the end); InputError outside the grid."""
    if len(index) != len(grid) or not all(-n <= i < n for i, n in zip(index, grid, strict=True)):
        raise InputError(f"index {tuple(index)} is not a position of the grid {tuple(grid)}")
    flat = 0
    for i, n in zip(index, grid, strict=True):
        flat = flat * n + i % n
    return flat


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Naive softmax attention over flattened grids: q (B, N, H, D), k and v (B, M, H, ...) -> (B, N, H, Dv).

    `mask`: broadcastable to (B, H, N, M), bool (True = attend) or added to the scores. Softmax is in fp32 at least.
    """
    return torch.einsum("bhnm,bmhd->bnhd", dense_weights(q, k, scale, mask).to(v.dtype), v)


def dense_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The map of `dense_attention`: (B, H, N, M), fp32 or fp64."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)

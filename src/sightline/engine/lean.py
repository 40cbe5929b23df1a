"""Looking at attention rows for less than the layer's projections: queries of the tokens that ask, and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from sightline.hosts import Host


@contextmanager
def lean(attention: nn.Module, host: Host, asking: Tensor) -> Iterator[None]:
    """Inside, the queries of an attention module are right for `asking` (B, R) positions only, and its values are zero.

    Projections under other names, or with a forward of their own (as accelerate's hooks set), run as always.
    """
    query, value = (getattr(attention, name, None) for name in (host.query, host.key_value[1]))
    put = [
        (module, make(module, module.forward))
        for module, make in ((query, lambda m, forward: _only(m, forward, asking)), (value, _none))
        if isinstance(module, nn.Linear) and "forward" not in module.__dict__
    ]
    for module, forward in put:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in put:
            module.__dict__.pop("forward", None)


def _only(module: nn.Linear, forward: Callable[[Tensor], Tensor], asking: Tensor) -> Callable[[Tensor], Tensor]:
    def some(x: Tensor) -> Tensor:  # (B, Q, D)
        index = asking.to(x.device).clamp(min=0)[..., None]  # -1: nobody asks
        rows = forward(x.gather(1, index.expand(-1, -1, x.shape[2])))  # (B, R, out)
        return rows.new_zeros(*x.shape[:2], rows.shape[2]).scatter(1, index.expand_as(rows), rows)

    return some


def _none(module: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(*x.shape[:-1], module.out_features)

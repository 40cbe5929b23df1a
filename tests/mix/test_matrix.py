"""What every mixer must do, over the whole registry: a new mixer only adds its line to `SMALL`."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from sightline import catalog, mix
from sightline.errors import InputError, ParameterError
from sightline.mix.parts.base import Mixer
from tests.mix.numbers import error, randn, ratio, seeded

SMALL: dict[type, tuple[dict, tuple[int, ...]]] = {  # parameters, an odd grid
    mix.GNA: ({"window": (3, 4), "stride": 2, "causal": (False, True)}, (7, 5)),
    mix.FNA: ({"window": 3, "dilation": 2}, (7, 9)),
    mix.Flow: ({}, (5, 7)),
    mix.Agent: ({"agents": 4, "window": (5, 4)}, (5, 3)),
    mix.BRA: ({"regions": 2, "topk": 2}, (5, 3)),
    mix.BRAConv: ({"regions": 2, "topk": 2}, (5, 3)),
    mix.Halo: ({"block": 3, "halo": 1}, (5, 7)),
    mix.ChannelAttention: ({}, (5, 3)),
    mix.WindowAttention: ({"window": 3}, (5, 7)),
    mix.HiLo: ({"window": 2, "alpha": 0.5}, (5, 3)),
    mix.MoH: ({"shared": 0, "routed": 1}, (5, 3)),
    mix.Routing: ({"clusters": 3, "window": 7, "causal": True}, (5, 3)),
    mix.SinkAttention: ({"sinks": 2}, (13,)),
    mix.SHSA: ({"part": 3, "qk_dim": 4, "heads": 1}, (5, 3)),
    mix.Outlook: ({}, (5, 7)),
    mix.InLine: ({}, (5, 3)),
}
REGISTERED = [e.cls for e in catalog.load_all().values() if e.kind == "mix"]
every = pytest.mark.parametrize("cls", list(SMALL), ids=lambda c: c.__name__)


def make(cls: type, seed: int = 0) -> tuple[Mixer, torch.Tensor]:
    """A small module in eval mode with random weights, and an input of odd size."""
    settings, grid = SMALL[cls]
    return seeded(cls(8, **{"heads": 2, **settings}), seed), randn(2, *grid, 8, seed=seed + 1)


def test_every_mixer_is_in_the_matrix() -> None:
    assert set(REGISTERED) <= set(SMALL)
    assert all(issubclass(cls, Mixer) for cls in REGISTERED)


@every
def test_shape_determinism_and_batches(cls) -> None:
    module, x = make(cls)
    with torch.no_grad():
        out = module(x)
        assert out.shape == x.shape
        assert out.isfinite().all()
        assert out.std() > 1e-3
        assert torch.equal(module(x), out)
        assert error(module(x[1:]), out[1:]) <= 1e-5
        assert error(module(x.flip(0)), out.flip(0)) <= 1e-5
        spread = x.repeat_interleave(2, -1)[..., ::2]  # not contiguous
        assert error(module(spread), out) <= 1e-6


@every
def test_double_and_half(cls) -> None:
    module, x = make(cls)
    with torch.no_grad():
        out = module(x)
        assert ratio(out, deepcopy(module).double()(x.double())) <= 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = module(x)
        assert half.isfinite().all()
        assert ratio(half.float(), out) <= 0.05
        assert deepcopy(module).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@every
def test_gradients_reach_everything(cls) -> None:
    module, x = make(cls)
    module.train()
    x.requires_grad_()
    out = module(x)
    (out * randn(*out.shape, seed=3)).sum().backward()
    for name, tensor in [("x", x), *module.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x).float().sum().backward()


@every
def test_state_and_copies(cls) -> None:
    module, x = make(cls)
    other, _ = make(cls, seed=5)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert error(other(x), module(x)) == 0
        assert error(deepcopy(module)(x), module(x)) == 0
    moved = nn.Sequential(module).to(torch.float64)
    assert all(t.dtype in (torch.float64, torch.int64, torch.bool) for t in moved.state_dict().values())


@every
def test_errors_and_cost(cls) -> None:
    settings, grid = SMALL[cls]
    module, x = make(cls)
    with pytest.raises(ParameterError):
        cls(8, **{**settings, "heads": 0})
    with pytest.raises(ParameterError):
        cls(8.0, **{"heads": 2, **settings})
    with pytest.raises(ParameterError):
        cls(9, **{**settings, "heads": 2})
    with pytest.raises(InputError, match="takes"):
        module(x[..., :-1])
    with pytest.raises(InputError, match="takes"):
        module(x[:0])
    with pytest.raises(InputError, match="position"):
        module.attention_of(x, (99,) * len(grid))
    cost = module.cost(grid)
    assert cost.flops > 0
    assert cost.bytes > 0


@every
@pytest.mark.slow
def test_compiles_whole(cls) -> None:
    module, x = make(cls)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    out = compiled(x)
    assert ratio(out, module(x)) <= 1e-5
    out.sum().backward()

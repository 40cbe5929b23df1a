"""Single-head attention on a part of the channels: golden arrays and laws."""

from __future__ import annotations

import pytest
import torch

from sightline.errors import ParameterError
from sightline.mix.shvit import SHSA, naive_single_head_attention, single_head_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("shvit", "shsa*")
def test_golden(path) -> None:
    case, weights = load(path)
    module = SHSA(case["x"].shape[1], part=case["pdim"], qk_dim=case["qk_dim"])
    module.load_state_dict(weights)
    assert error(module.eval()(case["x"].movedim(1, -1)).movedim(-1, 1), case["out"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    inputs = [randn(2, 13, d, seed=d, dtype=dtype) for d in (3, 3, 5)]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(single_head_attention, naive_single_head_attention, inputs, limit)


def test_laws() -> None:
    module = seeded(SHSA(14, part=3, qk_dim=4))
    x = randn(2, 5, 7, 14)
    row = module.attention_of(x, (4, 0))
    assert error(row.sum((-1, -2)), torch.ones(2, 1)) <= 1e-5
    other = x.clone()
    other[..., 3:] += 1
    assert error(module.attention_of(other, (4, 0)), row) == 0  # only the first channels attend
    assert error(module(other), module(x)) > 1e-3
    order = torch.randperm(35)
    moved = x.flatten(1, 2)[:, order].view_as(x)
    assert error(module(moved).flatten(1, 2), module(x).flatten(1, 2)[:, order]) <= 1e-5
    assert (SHSA(14)(x) == 0).all()  # new: the residual branch is silent
    assert SHSA(224).attending == 47
    _, _, v = module._project(x)
    constant = torch.full_like(v, 2.0)
    assert error(single_head_attention(v, v, constant), constant) <= 1e-5
    with pytest.raises(ParameterError, match="exceeds dim"):
        SHSA(8, part=9)
    with pytest.raises(ParameterError, match="heads=2"):
        SHSA(8, 2)

"""Bi-level routing attention: golden arrays, gathered regions against masks, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.biformer import (
    BRA,
    AttentionLePE,
    BRAConv,
    from_regions,
    naive_routed_attention,
    route,
    routed_attention,
    routing_mask,
    to_regions,
)
from sightline.mix.parts.base import dense_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("biformer", "bra_legacy*")
def test_golden(path) -> None:
    case, weights = load(path)
    plain = (2, 9) if "alltopk" in path.stem else (3, 2)
    module = BRA(case["x"].shape[-1], **options(case, weights, *plain))
    module.load_state_dict(weights)
    assert error(module.eval()(case["x"]), case["out"]) <= 1e-5
    if "route_idx" in case:
        *_, index, weight = module.routing(case["x"])
        assert torch.equal(index, case["route_idx"])
        assert error(weight, case["route_weight"]) <= 1e-5


def options(case: dict, weights: dict, heads: int, topk: int) -> dict[str, int]:
    """Parameters from the file; where it does not say them, the given ones and 3 regions per side."""
    kernel = weights["lepe.weight"].shape[-1] if "lepe.weight" in weights else 0
    said = {"heads": case.get("num_heads", heads), "topk": case.get("topk", topk), "regions": case.get("n_win", 3)}
    return said | {"kernel": kernel}


@cases("biformer", "bra_nchw*")
def test_golden_conv(path) -> None:
    case, weights = load(path)
    module = BRAConv(case["x"].shape[1], **options(case, weights, 2, 3))
    module.load_state_dict(weights)
    assert error(module.eval()(case["x"].movedim(1, -1)).movedim(-1, 1), case["out"]) <= 1e-5


@cases("biformer", "attention_lepe*")
def test_golden_last_stage(path) -> None:
    case, weights = load(path)
    module = AttentionLePE(case["x"].shape[-1], case["num_heads"], kernel=weights["lepe.weight"].shape[-1])
    module.load_state_dict(weights)
    assert error(module(case["x"]), case["out"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    index = torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(6)]) for _ in range(2)])
    inputs = [randn(2, 6, 9, 2, 5, seed=i, dtype=dtype) for i in range(3)]
    limit = 1e-5 if dtype == torch.float32 else 2e-2

    def run(function):
        return lambda q, k, v: function(q, k, v, (3, 3), index, 0.3)

    assert_same_gradients(run(routed_attention), run(naive_routed_attention), inputs, limit)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_all_regions_are_full_attention(rows, columns, h, w, seed) -> None:
    regions = rows * columns
    q, k, v = (randn(1, rows * h, columns * w, 2, 4, seed=seed + i) for i in range(3))
    assert torch.equal(from_regions(to_regions(q, (h, w)), (h, w), tuple(q.shape[1:3])), q)
    order = torch.stack([torch.randperm(regions) for _ in range(regions)])[None]
    full = dense_attention(*(x.flatten(1, 2) for x in (q, k, v)), 0.4).reshape(q.shape)
    assert error(routed_attention(q, k, v, (h, w), order, 0.4), full) <= 1e-5
    own = torch.arange(regions)[None, :, None]  # every region itself: window attention
    alone = dense_attention(*(to_regions(x, (h, w))[0] for x in (q, k, v)), 0.4)[None]
    assert error(routed_attention(q, k, v, (h, w), own, 0.4), from_regions(alone, (h, w), tuple(q.shape[1:3]))) <= 1e-5
    assert (routing_mask(order[..., :1], (h, w), tuple(q.shape[1:3])).sum(-1) == h * w).all()


def test_routing() -> None:
    scores = torch.eye(4)[None]
    index, weights = route(scores, scores, 3)
    assert index[0].tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1]]  # ties: lower region first
    assert error(weights.sum(-1), torch.ones(1, 4)) <= 1e-6
    module = seeded(BRA(8, 2, regions=2, topk=1, kernel=0))
    x = randn(1, 4, 6, 8)
    blocks = [x[:, :2], x[:, 2:]]
    swapped = torch.cat(blocks[::-1], 1)
    out = module(x)
    assert error(module(swapped), torch.cat([out[:, 2:], out[:, :2]], 1)) <= 1e-5  # regions may be permuted
    row = module.attention_of(x, (3, -1))
    assert error(row.sum((-1, -2)), torch.ones(1, 2)) <= 1e-5
    assert ((row > 0).sum((-1, -2)) == 6).all()
    with pytest.raises(ParameterError, match="topk=5 exceeds"):
        BRA(8, 2, regions=2, topk=5)
    with pytest.raises(ParameterError, match="must be odd"):
        BRA(8, 2, kernel=4)
    with pytest.raises(ParameterError, match="at least that"):
        BRAConv(8, 2, regions=5)(x)

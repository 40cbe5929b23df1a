"""Mixture of heads: golden arrays, gates, balance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.moh import MoH, balance_loss, gated_attention, head_gates, naive_gated_attention, norm_gates, pick
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded

LOSSES = {"dit_s2_r3": 2.9843087, "dit_s0_r2": 2.0354440}  # official training branch on the golden inputs


@cases("moh")
def test_golden(path) -> None:
    case, weights = load(path)
    module = MoH(case["x"].shape[-1], case["num_heads"], shared=case["shared_head"], routed=case["routed_head"])
    module.load_state_dict(weights)
    out, loss = module.eval()(case["x"], with_loss=True)
    assert error(out, case["out"]) <= 1e-5
    wanted = case.get("loss", LOSSES.get(path.stem[5:]))
    if wanted is not None:
        assert loss.item() == pytest.approx(wanted, abs=1e-5)
    assert (loss == 0) == (case["routed_head"] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    inputs = [randn(2, 7, 3, d, seed=i, dtype=dtype) for i, d in enumerate((4, 4, 5))] + [
        randn(2, 7, 3, seed=9).to(dtype)
    ]
    assert_same_gradients(gated_attention, naive_gated_attention, inputs, 1e-5 if dtype == torch.float32 else 2e-2)


@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 9), st.integers(0, 99))
def test_gates(shared, others, extra, seed) -> None:
    picks = min(others, 1 + extra)
    routed = randn(2, 6, others, seed=seed)
    balance = randn(2, 6, 2, seed=seed + 1) if shared else None
    gates = head_gates(routed, balance, randn(2, 6, shared, seed=seed + 2) if shared > 1 else None, picks)
    assert gates.shape == (2, 6, shared + others)
    assert ((gates > 0).sum(-1) == shared + picks).all()
    weights = torch.ones(2, 6, 2) if balance is None else 2 * balance.softmax(-1)
    assert error(gates[..., shared:].sum(-1), weights[..., 1] * picks) <= 1e-5
    assert error(gates[..., :shared].sum(-1), weights[..., 0] * shared) <= 1e-5
    level = torch.zeros(2, 6, shared) if shared > 1 else None
    zero = head_gates(0 * routed, None if balance is None else 0 * balance, level, picks)
    wanted = torch.cat([torch.ones(2, 6, shared + picks), torch.zeros(2, 6, others - picks)], -1)
    assert error(zero, wanted) <= 1e-6  # uniform routers: plain attention over the active heads, ties to the lower head
    assert balance_loss(routed, picks) >= 0
    assert balance_loss(0 * routed, picks).item() == pytest.approx(picks, rel=1e-5)


@settings(max_examples=15)
@given(st.sampled_from([(0, 0), (1, 2), (2, 1), (4, 0), (0, 4)]), st.integers(0, 99))
def test_module(split, seed) -> None:
    shared, routed = split
    module = seeded(MoH(8, 4, shared=shared, routed=routed), seed)
    x = randn(1, 5, 3, 8, seed=seed)
    out, gates = module(x), module.gates(x)
    order = torch.randperm(15)
    assert error(module(x.flatten(1, 2)[:, order]), out.flatten(1, 2)[:, order]) <= 1e-5
    row = module.attention_of(x, (4, 1))
    assert error(row.sum((-1, -2)), gates[:, 4, 1]) <= 1e-5
    silent = gates[0, 4, 1] == 0  # heads that this token did not pick do not matter to it
    with torch.no_grad():
        module.proj.weight[:, silent.repeat_interleave(2)] = 0
    assert error(module(x)[:, 4, 1], out[:, 4, 1]) <= 1e-6


def test_uniform_router_is_plain_attention() -> None:
    plain, routed = MoH(8, 4), MoH(8, 4, shared=2, routed=2)
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if not k.startswith("wg")})
    with torch.no_grad():
        for name in ("wg", "wg_0", "wg_1"):
            getattr(routed, name).weight.zero_()
    x = randn(2, 7, 8)
    assert error(routed(x), plain(x)) <= 1e-6
    assert MoH(12, 5, head_size=4, shared=5)(randn(1, 3, 12)).shape == (1, 3, 12)
    q = randn(2, 3, 8, 4)
    gates = norm_gates(q, 4, 1)
    assert torch.equal(gates[..., :4], torch.ones(2, 3, 4))
    assert torch.equal(gates[..., 4:].argmax(-1), q.norm(dim=-1)[..., 4:].argmax(-1))
    assert pick(torch.zeros(3), 2).tolist() == [1, 1, 0]
    for wrong in ({"shared": 2}, {"shared": 3, "routed": 2}, {"routed": 5}):
        with pytest.raises(ParameterError, match="do not fit heads=4"):
            MoH(8, 4, **wrong)

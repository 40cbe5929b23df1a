"""Shifted sparse attention: golden arrays, groups against masks, no look at the future; H2O's choice of keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import InputError, ParameterError
from sightline.mix.parts.base import dense_attention, dense_weights
from sightline.mix.sinklora import (
    SinkAttention,
    attention_mass,
    heavy_hitters,
    naive_shifted_attention,
    shifted_attention,
    shifted_mask,
)
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("sinklora")
def test_golden(path) -> None:
    case, _ = load(path)
    dim = case["x"].shape[-1]
    module = SinkAttention(dim, case["heads"], heads_kv=case.get("kv_heads"), sinks=0, wrap=True)
    module.load_state_dict({f"{n}_proj.weight": case[f"w{n}"] for n in "qkvo"})
    assert module.group(case["x"].shape[1]) == case["group_size"]
    assert error(module(case["x"]), case["out"]) <= 1e-5


CASES = [
    {"group": 4, "wrap": True},
    {"group": 4, "sinks": 3},
    {"group": 6, "sinks": 2, "restore": 0.5},
    {"group": 4, "sinks": 1, "restore": 0.5, "restore_by": "groups"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients(options, dtype) -> None:
    tokens = 16 if options.get("wrap") else 17
    inputs = [randn(2, tokens, h, 5, seed=h, dtype=dtype) for h in (4, 2, 2)]

    def run(function):
        return lambda *tensors: function(*tensors, **options)

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(run(shifted_attention), run(naive_shifted_attention), inputs, limit)


@settings(max_examples=30)
@given(
    st.integers(1, 19),
    st.sampled_from([2, 4, 6]),
    st.integers(0, 22),
    st.floats(0, 1),
    st.sampled_from(["heads", "groups"]),
)
def test_laws(tokens, group, sinks, restore, by) -> None:
    options = {"sinks": sinks, "restore": restore, "restore_by": by}
    mask = shifted_mask(tokens, 4, group, **options)
    assert not mask.triu(1).any()  # nobody sees the future
    assert mask.diagonal(dim1=1, dim2=2).all()
    at = torch.arange(tokens)
    assert (mask | ~(at < sinks) | (at > at[:, None])).all()  # everybody sees the sinks before it
    plain = (at[:, None] // group == at // group) | (at < sinks)
    assert torch.equal(mask[:2], (plain & (at[:, None] >= at)).expand(2, -1, -1))
    if restore == 1:
        assert torch.equal(mask[2:], mask[:2])
    if restore * 2 < 1 and by == "heads":
        moved = ((at[:, None] + group // 2) // group == (at + group // 2) // group) | (at < sinks)
        assert torch.equal(mask[2:], (moved & (at[:, None] >= at)).expand(2, -1, -1))
    q, k, v = (randn(1, tokens, 4, 3, seed=i) for i in range(3))
    found = shifted_attention(q, k, v, group, **options)
    assert error(found, naive_shifted_attention(q, k, v, group, **options)) <= 1e-5
    if sinks >= tokens:
        causal = at[:, None] >= at
        assert error(found, dense_attention(q, k, v, 3**-0.5, causal)) <= 1e-5


def test_wrap_leaks_and_one_group_is_causal() -> None:
    assert shifted_mask(16, 2, 4, wrap=True)[1, 0, 15]  # the official code: token 0 sees the last one
    assert not shifted_mask(16, 2, 4)[1, 0, 1:].any()
    q, k, v = (randn(1, 8, 1, 3, seed=i) for i in range(3))
    assert (
        error(
            shifted_attention(q, k, v, 8, restore=1.0), dense_attention(q, k, v, 3**-0.5, torch.ones(8, 8).tril() > 0)
        )
        <= 1e-5
    )
    module = seeded(SinkAttention(8, 2, sinks=1))
    row = module.attention_of(randn(1, 13, 8), (9,))
    assert error(row.sum(-1), torch.ones(1, 2)) <= 1e-5
    assert (row > 0).sum(-1).tolist() == [[3, 5]]  # group of 4: {8, 9} and {6 .. 9}, and the sink
    for wrong in ({"wrap": True}, {"restore_by": "tokens"}, {"heads_kv": 3}):
        with pytest.raises(ParameterError):
            SinkAttention(8, 4, **wrong)
    with pytest.raises(ParameterError, match="must be even"):
        shifted_attention(q, k, v, 3)


@settings(max_examples=20)
@given(st.integers(1, 17), st.integers(0, 6), st.integers(0, 6), st.integers(1, 5), st.integers(0, 99))
def test_heavy_hitters(tokens, heavy, recent, chunk, seed) -> None:
    q, k = randn(1, tokens, 4, 3, seed=seed), randn(1, tokens, 2, 3, seed=seed + 1)
    mass = attention_mass(q, k, chunk=chunk)
    at = torch.arange(tokens)
    whole = dense_weights(q, k.repeat_interleave(2, 2), 3**-0.5, at[:, None] >= at)
    assert error(mass, whole.sum(2).unflatten(1, (2, 2)).sum(2)) <= 1e-5
    assert error(mass.sum(-1), torch.full((1, 2), 2.0 * tokens)) <= 1e-4  # one per query and head
    if heavy + recent == 0:
        with pytest.raises(ParameterError, match="not both 0"):
            heavy_hitters(mass, 0, 0)
        return
    kept = heavy_hitters(mass, heavy, recent)
    assert kept.shape[-1] == min(tokens, heavy + recent)
    assert (kept.diff(dim=-1) > 0).all()
    newest = min(recent, tokens)
    assert torch.equal(kept[..., kept.shape[-1] - newest :], at[tokens - newest :].expand(1, 2, -1))
    left = F.one_hot(kept, tokens).sum(-2) == 0
    older = mass[..., : tokens - newest]
    for h in range(2):
        gone, stay = older[0, h][left[0, h, : older.shape[-1]]], older[0, h][~left[0, h, : older.shape[-1]]]
        assert not len(gone) or not len(stay) or gone.max() <= stay.min()
    assert heavy_hitters(torch.zeros(1, 1, 9), 2, 3).tolist() == [[[0, 1, 6, 7, 8]]]  # ties: the earlier key
    with pytest.raises(InputError, match="cannot be the last"):
        attention_mass(randn(1, tokens + 1, 2, 3), k)

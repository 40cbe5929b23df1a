"""Flow-attention: golden arrays, linear time against whole weights, conservation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import InputError, ParameterError
from sightline.mix.flowformer import Flow, FlowProjections, flow_attention, flow_weights, naive_flow_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("flowformer", "[sc][era][lou]*")  # self, cross, causal
def test_golden(path) -> None:
    case, weights = load(path)
    d_model, d_input = weights["query_projection.weight"].shape
    sizes = d_input, d_model, len(weights["out_projection.weight"]), case.get("n_heads", 4)
    module = FlowProjections(*sizes, causal="causal" in path.stem)
    module.load_state_dict(weights)
    inputs = (case["q_in"], case["kv_in"]) if "q_in" in case else (case["x"],)
    assert error(module.eval()(*inputs), case["out"]) <= 1e-5


@cases("flowformer", "cv_attention*")
def test_golden_vision(path) -> None:
    case, weights = load(path)
    module = Flow(case["x"].shape[-1], case.get("num_heads", 12))
    module.load_state_dict(weights)
    assert error(module(case["x"]), case["out"]) <= 1e-5


def inputs(queries: int, keys: int, dtype=torch.float32, seed: int = 0) -> list[torch.Tensor]:
    shapes = (2, queries, 3, 5), (2, keys, 3, 5), (2, keys, 3, 4)
    return [randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(9, 13, False), (7, 7, True), (131, 131, True)])
def test_gradients(queries, keys, causal, dtype) -> None:
    def run(function):
        return lambda q, k, v: function(q, k, v, causal=causal, clamp=1.2, extra=1e-6)

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(run(flow_attention), run(naive_flow_attention), inputs(queries, keys, dtype), limit)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from([None, 1.0, 0.5]))
def test_conservation(queries, keys, seed, clamp) -> None:
    q, k, v = inputs(queries, keys, torch.float64, seed)
    weights = flow_weights(q, k, clamp=clamp)
    assert (weights >= 0).all()
    out = flow_attention(q, k, v, clamp=clamp)
    order, queue = torch.randperm(keys), torch.randperm(queries)
    assert error(flow_attention(q, k[:, order], v[:, order], clamp=clamp), out) <= 1e-9
    assert error(flow_attention(q[:, queue], k, v, clamp=clamp), out[:, queue]) <= 1e-9
    assert error(flow_attention(q, k, 2 * v, clamp=clamp), 2 * out) <= 1e-9
    same = k[:, :1].expand_as(k)  # equal keys: no competition, so a row sums to its gate, a sigmoid
    rows = flow_weights(q, same, clamp=clamp).sum(-1)
    flow_in = (q.sigmoid() * same.sigmoid().sum(1, keepdim=True)).sum(-1)
    outgoing = keys / (same.sigmoid() * q.sigmoid().sum(1, keepdim=True)).sum(-1)[:, :1]
    gate = (flow_in / keys * outgoing * queries / keys).sigmoid()
    assert error(rows, gate.transpose(1, 2)) <= 1e-4


@settings(max_examples=15)
@given(st.integers(2, 140), st.integers(0, 99))
def test_causal_sees_the_past_only(tokens, seed) -> None:
    q, k, v = inputs(tokens, tokens, torch.float64, seed)
    out = flow_attention(q, k, v, causal=True)
    cut = tokens // 2
    assert error(flow_attention(q[:, :cut], k[:, :cut], v[:, :cut], causal=True), out[:, :cut]) <= 1e-9
    changed = [torch.cat([t[:, :cut], t[:, cut:] + 5], 1) for t in (q, k, v)]
    assert error(flow_attention(*changed, causal=True)[:, :cut], out[:, :cut]) <= 1e-9


def test_rows_and_big_logits() -> None:
    module = seeded(Flow(8, 2, causal=True), std=0.5)
    x = randn(1, 4, 5, 8)
    q, k, v = (t.flatten(1, 2) for t in module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3))
    rows = module.attention_of(x, (2, 1)).flatten(2)  # (B, H, N)
    assert (rows[..., 12:] == 0).all()
    assert error(torch.einsum("bhn,bnhd->bhd", rows, v), flow_attention(q, k, v, causal=True)[:, 11]) <= 1e-5
    assert flow_attention(q * 1e4, k * 1e4, v, clamp=None, causal=True).isfinite().all()
    with pytest.raises(InputError, match="as many queries as keys"):
        flow_attention(q, k[:, 1:], v[:, 1:], causal=True)
    with pytest.raises(ParameterError, match="clamp"):
        Flow(8, 2, clamp=-1.0)

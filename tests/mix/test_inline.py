"""InLine: golden arrays, linear form against whole maps, injectivity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.inline import InLine, inline_attention, inline_weights, naive_inline_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("inline")
def test_golden(path) -> None:
    case, weights = load(path)
    form, kind = path.stem.split("_")[1:3]
    phi = "leaky_relu" if kind == "leakyrelu" else kind if form == "swin" else "identity"
    dim, per_head = weights["residual.0.weight"].shape[:2]
    bias = "qkv.bias" in weights or "q.bias" in weights
    module = InLine(dim, dim // per_head, phi=phi, fused="qkv.weight" in weights, qkv_bias=bias)
    module.load_state_dict(weights)
    x, cls = case["x"], None
    if form == "deit":
        cls, x = x[:, :1], x[:, 1:]
    hw = case["hw"].tolist() if "hw" in case else [int(x.shape[1] ** 0.5)] * 2
    out = module.eval()(x.unflatten(1, hw), cls)
    out = out.flatten(1, 2) if cls is None else torch.cat([out[1], out[0].flatten(1, 2)], 1)
    assert error(out, case["out"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    inputs = [randn(2, n, 3, d, seed=n + d, dtype=dtype) for n, d in ((7, 5), (11, 5), (11, 4))]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(inline_attention, naive_inline_attention, inputs, limit)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.floats(0.1, 30))
def test_laws_of_the_row(queries, keys, seed, size) -> None:
    q, k, v = (
        randn(1, n, 2, 3, seed=seed + i, dtype=torch.float64) * size for i, n in enumerate((queries, keys, keys))
    )
    weights = inline_weights(q, k)
    ones = torch.ones_like(weights[..., 0])
    assert error(weights.sum(-1), ones) <= 1e-9
    constant = torch.full_like(v, 2.0)
    assert error(inline_attention(q, k, constant), constant[:, :1].expand_as(q)) <= 1e-8
    assert error(inline_weights(q, k + 5), weights) <= 1e-8  # a vector added to every key changes nothing
    assert error(inline_attention(0 * q, k, v), v.mean(1, keepdim=True).expand_as(q)) <= 1e-9
    order = torch.randperm(keys)
    assert error(inline_attention(q, k[:, order], v[:, order]), inline_attention(q, k, v)) <= 1e-8


@given(st.integers(0, 99))
def test_injective(seed) -> None:
    k = randn(1, 7, 1, 3, seed=seed, dtype=torch.float64)  # centred keys span the whole space
    q = randn(1, 2, 1, 3, seed=seed + 100, dtype=torch.float64)
    row, other = inline_weights(q, k)[0, 0]
    centred = (k - k.mean(1, keepdim=True))[0, :, 0]
    found = torch.linalg.lstsq(centred, (row - other)[:, None] * 7 / 3**-0.5).solution[:, 0]
    assert error(found, (q[0, 0] - q[0, 1])[0]) <= 1e-6  # the row tells the query
    assert error(inline_weights(3 * q, k), inline_weights(q, k)) > 1e-4  # softmax-free rows that division would confuse


def test_row_and_bad_phi() -> None:
    module = seeded(InLine(8, 2, phi="exp"))
    x = randn(2, 3, 5, 8)
    assert error(module.attention_of(x, (1, 2)).sum((-1, -2)), torch.ones(2, 2)) <= 1e-5
    with torch.no_grad():  # without the local residual the module is its rows
        for p in module.residual.parameters():
            p.zero_()
    _, _, v = module._project(x.flatten(1, 2))
    mixed = torch.einsum("bhn,bnhd->bhd", module.attention_of(x, (1, 2)).flatten(2), v).flatten(1)
    assert error(module.proj(mixed), module(x)[:, 1, 2]) <= 1e-5
    with pytest.raises(ParameterError, match="phi='elu'"):
        InLine(8, 2, phi="elu")

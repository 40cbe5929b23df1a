"""HiLo: golden arrays, who sees what, special cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.hilo import HiLo, average, low_attention
from sightline.mix.parts.base import dense_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("hilo", "[wa][s01]*")
def test_golden(path) -> None:
    case, weights = load(path)
    names = "num_heads", "window_size", "alpha"
    heads, window, alpha = (case[n] for n in names)
    module = HiLo(case["x"].shape[-1], heads, window=window, alpha=alpha)
    module.load_state_dict(weights)
    assert (module.low_heads, module.high_heads) == (case["l_heads"], case["h_heads"])
    out = module.eval()(case["x"].unflatten(1, case["hw"].tolist()))
    assert error(out.flatten(1, 2), case["out"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    inputs = [randn(2, *g, 2, 5, seed=i, dtype=dtype) for i, g in enumerate([(5, 7), (3, 4), (3, 4)])]

    def naive(q, k, v):
        return dense_attention(*(x.flatten(1, 2) for x in (q, k, v)), 5**-0.5).reshape(q.shape)

    assert_same_gradients(low_attention, naive, inputs, 1e-5 if dtype == torch.float32 else 2e-2)


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 3), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_who_sees_what(rows, columns, s, alpha, seed) -> None:
    module = seeded(HiLo(8, 4, window=s, alpha=alpha), seed)
    x = randn(1, rows * s, columns * s, 8, seed=seed)
    out, high = module(x), module.high_heads * 2
    other = x.clone()
    other[:, :s, :s] = randn(1, s, s, 8, seed=seed + 1)  # one window changes
    changed = module(other)
    same = torch.ones(rows * s, columns * s, dtype=torch.bool)
    same[:s, :s] = False
    assert error(changed[0, same][:, :high], out[0, same][:, :high]) == 0  # high heads keep to their window
    if alpha > 0 and same.any():
        assert error(changed[0, same][:, high:], out[0, same][:, high:]) > 0  # low heads see all
    flipped = other.clone()
    flipped[:, :s, :s] = other[:, :s, :s].flip(1)  # tokens of one averaged cell change places: its keys stay
    assert error(module(flipped)[0, same][:, high:], changed[0, same][:, high:]) <= 1e-5
    row = module.attention_of(x, (0, -1))
    assert error(row.sum((-1, -2)), torch.ones(1, 4)) <= 1e-5


def test_plain_attention_at_window_one() -> None:
    module = seeded(HiLo(8, 2, window=1, alpha=0.3))
    assert module.high_heads == 0
    x = randn(2, 3, 5, 8)
    q = module.l_q(x).view(2, 15, 2, 4)
    k, v = module.l_kv(x).view(2, 15, 2, 2, 4).unbind(2)
    assert error(module.l_proj(dense_attention(q, k, v, 0.5).reshape(2, 3, 5, 8)), module(x)) <= 1e-5
    assert error(average(x[:, :2, :4], 2)[:, 0, 1], x[:, :2, 2:4].mean((1, 2))) <= 1e-6
    with pytest.raises(ParameterError, match=r"alpha=1\.5"):
        HiLo(8, 2, alpha=1.5)

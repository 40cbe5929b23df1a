"""Outlook attention: golden arrays, timm's module, fold against windows one by one, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.parts import groups
from sightline.mix.volo import Outlook, naive_outlook_attention, outlook_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("volo", "outlook*")
def test_golden(path) -> None:
    case, weights = load(path)
    heads = case["num_heads"]
    kernel = round((len(weights["attn.bias"]) / heads) ** 0.25)
    bias = "v.bias" in weights
    module = Outlook(case["x"].shape[-1], heads, kernel=kernel, stride=case["stride"], qkv_bias=bias)
    module.load_state_dict(weights)
    assert error(module.eval()(case["x"]), case["out"]) <= 1e-5


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_timm_is_the_same(size) -> None:
    volo = pytest.importorskip("timm.models.volo")
    theirs = volo.OutlookAttention(12, 3, stride=2).eval()
    ours = Outlook(12, 3)
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, *size, 12)
    assert error(ours(x), theirs(x)) <= 1e-5


def inputs(grid, kernel, stride, dtype=torch.float32, seed=0) -> list[torch.Tensor]:
    cells = [-(-n // stride) for n in grid]
    weights = randn(2, *cells, 2, kernel**2, kernel**2, seed=seed).softmax(-1)
    return [randn(2, *grid, 2, 3, seed=seed + 1).to(dtype), weights.to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    def run(function):
        return lambda v, a: function(v, a, 3, 2)

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(run(outlook_attention), run(naive_outlook_attention), inputs((5, 7), 3, 2, dtype), limit)


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([(1, 1), (3, 1), (3, 2), (3, 3), (5, 2)]))
def test_any_size(height, width, shape) -> None:
    kernel, stride = shape
    v, a = inputs((height, width), kernel, stride)
    found = outlook_attention(v, a, kernel, stride)
    assert error(found, naive_outlook_attention(v, a, kernel, stride)) <= 1e-5
    assert error(outlook_attention(2 * v, a, kernel, stride), 2 * found) <= 1e-5
    if kernel == 1:
        assert error(found, v) <= 1e-6


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (3, 3), (5, 1), (5, 2), (5, 4)])
@pytest.mark.parametrize("height", [9, 10, 11])
def test_pieces_change_nothing(height, shape, monkeypatch) -> None:
    monkeypatch.setattr(groups, "CACHED", 1)  # as few rows of windows at once as can be
    v, a = inputs((height, 5), *shape)
    assert error(outlook_attention(v, a, *shape), naive_outlook_attention(v, a, *shape)) <= 1e-5
    monkeypatch.setattr(groups, "SPARE", 1)

    def run(function):
        return lambda v, a: function(v, a, *shape)

    assert_same_gradients(run(outlook_attention), run(naive_outlook_attention), [v, a], 1e-5)


def test_local_and_equivariant() -> None:
    module = seeded(Outlook(8, 2))
    x = randn(1, 14, 14, 8)
    out = module(x)
    weights = module.weights(x)
    assert error(weights.sum(-1), torch.ones_like(weights[..., 0])) <= 1e-5
    other = x.clone()
    other[:, 7, 7] += 1
    changed = (module(other) - out).abs().amax((0, -1)) > 0
    assert changed[5:10, 5:10].any()
    changed[4:11, 4:11] = False  # K - 1 = 2 around it, and the cell of the average
    assert not changed.any()
    moved = module(x.roll(2, 1))
    assert error(moved[:, 4:12, 2:12], out[:, 2:10, 2:12]) <= 1e-5
    with torch.no_grad():
        module.attn.weight.zero_()
        module.attn.bias.zero_()
    even = torch.nn.functional.avg_pool2d(module.v(x).movedim(-1, 1), 3, 2, 1)  # zeros count: the mean of the window
    spread = torch.nn.functional.fold(
        even.flatten(2).repeat_interleave(9, 1), (14, 14), kernel_size=3, padding=1, stride=2
    )
    assert error(module.proj(spread.movedim(1, -1)), module(x)) <= 1e-5
    row = module.attention_of(x, (3, 3))  # in four windows, 1/9 of each
    assert row.sum().item() == pytest.approx(2 * 4, rel=1e-4)
    for wrong in ({"kernel": 2}, {"stride": 4}):
        with pytest.raises(ParameterError, match="must be odd"):
            Outlook(8, 2, **wrong)

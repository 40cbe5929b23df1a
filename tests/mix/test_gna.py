"""Neighborhood attention with stride: golden arrays, tiles and FlexAttention against whole masks, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import InputError, ParameterError
from sightline.mix import FNA, GNA
from sightline.mix.fna import attention as fna_attention
from sightline.mix.gna import neighborhood_attention
from sightline.mix.parts.groups import attend_with_lse
from sightline.mix.parts.tiles import best_stride, flat_bound, tile_bound
from sightline.mix.parts.windows import Window, axis_mask, grid_mask, windows_of
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


def rule_of(case: dict) -> list[tuple]:
    return [tuple(case[name].tolist()) for name in ("kernel_size", "stride", "dilation", "is_causal")]


@pytest.mark.parametrize("backend", ["tiles", "naive", pytest.param("flex", marks=pytest.mark.slow)])
@cases("gna", "[123]d_*")
def test_golden(path, backend: str) -> None:
    check_golden(path, backend)


@pytest.mark.parametrize("backend", ["tiles", "naive", pytest.param("flex", marks=pytest.mark.slow)])
@cases("fna", "[123]d*")
def test_golden_fna(path, backend: str) -> None:
    check_golden(path, backend)


def check_golden(path, backend: str) -> None:
    case, _ = load(path)
    q, k, v = case["q"], case["k"], case["v"]
    grid = q.shape[1:-2]
    assert torch.equal(grid_mask(windows_of(len(grid), *rule_of(case)), grid), case["mask"])
    out, lse = neighborhood_attention(q, k, v, *rule_of(case), scale=case["scale"], return_lse=True, backend=backend)
    assert max(error(out, case["out"]), error(lse, case["lse"])) <= 1e-5
    plain = neighborhood_attention(q, k, v, *rule_of(case), scale=case["scale"], backend=backend)
    assert error(plain, case["out"]) <= 1e-5
    if "merged_out" in case:
        extra = {"extra_keys": case["additional_k"], "extra_values": case["additional_v"]}
        out, lse = neighborhood_attention(
            q, k, v, *rule_of(case), scale=case["scale"], return_lse=True, backend=backend, **extra
        )
        assert max(error(out, case["merged_out"]), error(lse, case["merged_lse"])) <= 1e-5


@cases("gna", "module*")
def test_golden_module(path) -> None:
    case, weights = load(path)
    check_module(GNA(16, 2, window=5, stride=2), case, weights)


@cases("fna", "module*")
def test_golden_module_fna(path) -> None:
    case, weights = load(path)
    check_module(FNA(16, 2, window=(3, 4), dilation=(2, 1), causal=(False, True)), case, weights)


def check_module(module: GNA, case: dict, weights: dict) -> None:
    module.load_state_dict(weights)
    assert error(module.eval()(case["x"]), case["out"]) <= 1e-5


@cases("gna", "mask_sweep_1d")
def test_every_mask_of_the_sweep(path) -> None:
    case, _ = load(path)
    for (length, size, stride, dilation, causal), mask in zip(case["params"].tolist(), case["mask"], strict=True):
        assert torch.equal(axis_mask(Window(size, stride, dilation, bool(causal)), length), mask[:length, :length])


@cases("gna", "tile_counts")
def test_tile_counts(path) -> None:
    case, _ = load(path)
    for n in range(7):
        grid, *rule, q_tile, kv_tile = case[f"c{n}_params"].tolist()
        tiles = tile_bound(grid, *rule[:3], [bool(c) for c in rule[3]], q_tile=q_tile, kv_tile=kv_tile)
        assert (tiles.dense, tiles.static, tiles.dynamic) == tuple(
            case[f"c{n}_{w}"] for w in ("dense", "static", "dynamic")
        )


BOUNDS = [  # grid, window, stride, q tile, kv tile -> bound, worst tile; the project's documents for the first
    ((32768,), (2048,), (1,), (256,), (128,), 14.3217, 14.2222),
    ((32768,), (2048,), (256,), (256,), (128,), 16, 16),
    ((256, 256), (80, 80), (1, 1), (16, 16), (8, 16), 7.061, 6.095),
    ((256, 256), (80, 80), (16, 16), (16, 16), (8, 16), 10.240, 10.240),
    ((256, 256), (80, 80), (1, 1), (16, 8), (16, 8), 7.515, 6.649),
    ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), (2, 8, 8), 5.440, 3.600),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.111, None),
    ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 16), (2, 8, 8), 4.603, 3.000),
]


@pytest.mark.parametrize(("grid", "window", "stride", "q_tile", "kv_tile", "bound", "worst"), BOUNDS)
def test_bounds_of_the_sheet(grid, window, stride, q_tile, kv_tile, bound, worst) -> None:
    tiles = tile_bound(grid, window, stride, q_tile=q_tile, kv_tile=kv_tile)
    assert tiles.bound == pytest.approx(bound, abs=1e-3)
    assert worst is None or tiles.worst == pytest.approx(worst, abs=1e-3)
    assert tiles.bound <= tiles.flops * 1.001


def test_smallest_perfect_stride_and_flat_tiles() -> None:
    assert best_stride((1024,), (128,), q_tile=(32,), kv_tile=(16,)) == (32,)
    assert best_stride((256, 256), (80, 80), q_tile=(16, 16), kv_tile=(16, 16)) == (16, 16)
    rules = windows_of(2, 4, 4)
    box = tile_bound((16, 16), 4, 4, q_tile=4, kv_tile=4)
    assert flat_bound((16, 16), rules, 16, 16) < box.bound == box.flops == 16
    assert box.end_to_end(0.5) == pytest.approx(1 / (0.5 + 0.5 / 16))


@st.composite
def rules(draw, axes: int | None = None):
    """(grid, window, stride, dilation, causal) that fit together."""
    axes = draw(st.integers(1, 3)) if axes is None else axes
    top = {1: 15, 2: 9, 3: 5}[axes]
    given = []
    for _ in range(axes):
        length = draw(st.integers(2, top))
        size = draw(st.integers(2, length))
        stride, dilation = draw(st.integers(1, size)), draw(st.integers(1, length // size))
        given.append((length, size, stride, dilation, draw(st.booleans())))
    return tuple(zip(*given, strict=True))


@settings(max_examples=25)
@given(rules(), st.integers(1, 4), st.booleans())
def test_tiles_are_the_whole_mask(rule, tile, lse) -> None:
    grid, *rule = rule
    q, k, v = (randn(1, *grid, 2, 4, seed=s) for s in range(3))
    wanted, wanted_lse = neighborhood_attention(q, k, v, *rule, return_lse=True, backend="naive")
    found = neighborhood_attention(q, k, v, *rule, return_lse=lse, tile=(tile,) * len(grid))
    assert error(found[0] if lse else found, wanted) <= 1e-5
    assert not lse or error(found[1], wanted_lse) <= 1e-5


@given(rules())
def test_laws_of_the_mask(rule) -> None:
    for length, w, s, d, c in zip(*rule, strict=True):
        mask = axis_mask(Window(w, s, d, c), length)
        assert mask.diagonal().all()  # the query itself is always seen
        if not c:
            assert (mask.sum(1) == w).all()
        else:
            assert not mask.triu(1).any()
            assert (mask.sum(1) <= w).all()
            place = torch.arange(length) // d
            assert s > 1 or torch.equal(mask.sum(1), (place + 1).clamp(max=w))
        for g in range(d):  # each dilation group is a grid of its own
            sub = mask[g::d, g::d]
            assert torch.equal(sub, axis_mask(Window(w, s, 1, c), sub.shape[0]))
            first = [row.nonzero()[0].item() for row in sub]
            assert all(first[p] == first[p // s * s] for p in range(len(first)))  # a stride group has one start
        assert mask.sum() == sum(axis_mask(Window(w, s, 1, c), len(range(g, length, d))).sum() for g in range(d))


@settings(max_examples=20)
@given(rules(axes=2), st.integers(0, 3))
def test_laws_of_the_operator(rule, seed) -> None:
    grid, *given_ = rule
    q, k, v = (randn(1, *grid, 1, 4, seed=seed + s) for s in range(3))
    out = neighborhood_attention(q, k, v, *given_)
    flipped = neighborhood_attention(*(x.transpose(1, 2) for x in (q, k, v)), *(r[::-1] for r in given_))
    assert error(flipped.transpose(1, 2), out) <= 1e-5
    ones = neighborhood_attention(q, k, torch.full_like(v, 3.0), *given_)
    assert error(ones, torch.full_like(v, 3.0)) <= 1e-5
    size, stride, dilation, causal = given_
    for i in range(dilation[0]):
        for j in range(dilation[1]):
            sub = [x[:, i :: dilation[0], j :: dilation[1]] for x in (q, k, v)]
            apart = neighborhood_attention(*sub, size, stride, 1, causal)
            assert error(apart, out[:, i :: dilation[0], j :: dilation[1]]) <= 1e-5


@settings(max_examples=15)
@given(rules(), st.integers(1, 5))
def test_extra_keys_are_keys(rule, extra) -> None:
    grid, *given_ = rule
    q, k, v = (randn(1, *grid, 2, 4, seed=s) for s in range(3))
    more_k, more_v = randn(1, extra, 2, 4, seed=3), randn(1, extra, 2, 4, seed=4)
    found = neighborhood_attention(q, k, v, *given_, extra_keys=more_k, extra_values=more_v)
    mask = torch.cat(
        [grid_mask(windows_of(len(grid), *given_), grid), torch.ones(q[0, ..., 0, 0].numel(), extra) > 0], 1
    )
    flat = [x.flatten(1, -3) for x in (q, k, v)]
    keys, values = torch.cat([flat[1], more_k], 1), torch.cat([flat[2], more_v], 1)
    scores = torch.einsum("bnhd,bmhd->bhnm", flat[0], keys) * 0.5
    wanted = torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)
    assert error(found.flatten(1, -3), wanted) <= 1e-5


CASES = [
    ((11,), 4, 1, 2, True),
    ((7, 9), (3, 4), (1, 2), (2, 1), (False, True)),
    ((7, 10), 4, 4, 1, False),
    ((4, 5, 6), (2, 3, 3), (2, 1, 3), 1, (True, False, False)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, dtype) -> None:
    grid, *rule = case
    inputs = [randn(2, *grid, h, 6, seed=s, dtype=dtype) for s, h in enumerate((4, 2, 2))]
    extra = [randn(2, 3, 2, 6, seed=s, dtype=dtype) for s in (3, 4)]

    def run(backend: str):
        return lambda q, k, v, a, b: (
            neighborhood_attention(q, k, v, *rule, extra_keys=a, extra_values=b, backend=backend)
            + neighborhood_attention(q, k, v, *rule, backend=backend)
        )

    assert_same_gradients(run("tiles"), run("naive"), [*inputs, *extra], 1e-5 if dtype == torch.float32 else 2e-2)


def test_pieces_change_nothing(monkeypatch) -> None:
    from sightline.mix.parts import groups

    q, k, v = (randn(2, 13, 11, 2, 4, seed=s) for s in range(3))
    whole = neighborhood_attention(q, k, v, 5, 2, return_lse=True)
    monkeypatch.setattr(groups, "CACHED", 4000)
    pieces = neighborhood_attention(q, k, v, 5, 2, return_lse=True)
    assert error(pieces[0], whole[0]) <= 1e-6
    assert error(pieces[1], whole[1]) <= 1e-6


def test_flex_is_the_same() -> None:
    q, k, v = (randn(1, 5, 6, 2, 8, seed=s) for s in range(3))
    rule = (3, 4), (2, 1), 1, (False, True)
    found, lse = neighborhood_attention(q, k, v, *rule, return_lse=True, backend="flex")
    wanted, wanted_lse = neighborhood_attention(q, k, v, *rule, return_lse=True, backend="naive")
    assert max(error(found, wanted), error(lse, wanted_lse)) <= 1e-5


def test_special_cases() -> None:
    q, k, v = (randn(1, 6, 8, 2, 4, seed=s) for s in range(3))
    full = torch.nn.functional.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    whole = neighborhood_attention(q, k, v, (6, 8))
    assert error(whole, full.transpose(1, 2).view_as(q)) <= 1e-6
    assert error(fna_attention(q, k, v, 3), neighborhood_attention(q, k, v, 3, 1)) == 0
    blocked = neighborhood_attention(q, k, v, (3, 4), (3, 4))
    for i in range(0, 6, 3):
        for j in range(0, 8, 4):
            block = [x[:, i : i + 3, j : j + 4] for x in (q, k, v)]
            assert error(neighborhood_attention(*block, (3, 4)), blocked[:, i : i + 3, j : j + 4]) <= 1e-6


def test_row_is_the_row_of_the_mask() -> None:
    module = seeded(GNA(8, 2, window=(3, 2), stride=(2, 1), dilation=(1, 2), causal=(True, False)))
    x = randn(2, 5, 7, 8)
    row = module.attention_of(x, (3, -2))
    assert row.shape == (2, 2, 5, 7)
    seen = grid_mask(module.rules((5, 7)), (5, 7))[3 * 7 + 5].view(5, 7)
    assert torch.equal(row > 0, seen.expand_as(row))


def test_bad_input_is_named() -> None:
    q = randn(1, 5, 6, 2, 4)
    with pytest.raises(ParameterError, match="window=4 with dilation=2 needs an axis of at least 8"):
        neighborhood_attention(q, q, q, 4, 1, (1, 2))
    with pytest.raises(ParameterError, match="1 <= stride <= window"):
        neighborhood_attention(q, q, q, 3, 4)
    with pytest.raises(ParameterError, match="3 values for 2 axes"):
        neighborhood_attention(q, q, q, (3, 3, 3))
    with pytest.raises(ParameterError, match=r"window=3\.5"):
        GNA(8, 2, window=3.5)
    with pytest.raises(ParameterError, match="backend"):
        GNA(8, 2, backend="fast")
    with pytest.raises(InputError, match="together"):
        neighborhood_attention(q, q, q, 3, extra_keys=q[:, 0])
    with pytest.raises(InputError, match="query heads"):
        neighborhood_attention(q[..., :1, :], q, q, 3)


def test_cost_counts_the_window() -> None:
    cost = GNA(16, 2, window=4, stride=4).cost((8, 8))
    assert cost.flops == 4 * 64 * 16 * 16 + 8 * 64 * 16**2
    assert cost.saving > 1
    assert GNA(16, 2, window=4, stride=4).bound((16, 16), 4, 4).bound == 16


def test_a_query_without_keys_is_zero_with_finite_gradients() -> None:
    q, k, v = (randn(1, 3, 4, seed=s).requires_grad_() for s in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out, lse = attend_with_lse(q, k, v, 0.5, mask)
    assert (out[0, 1] == 0).all()
    assert lse[0, 1] == -torch.inf
    grads = torch.autograd.grad(out.sum() + lse[0, ::2].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)

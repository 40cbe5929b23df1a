"""Haloed block attention: golden arrays, timm's module, blocks against whole scores, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.gna import neighborhood_attention
from sightline.mix.halonet import Halo, halo_attention, naive_halo_attention
from sightline.mix.parts import groups
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded

NAMES = {"block_size": "block", "halo_size": "halo", "dim_head": "qk_dim"}
FLAGS = ("avg_down", "qkv_bias")


@cases("halonet")
def test_golden(path) -> None:
    case, weights = load(path)
    x, out = case.pop("x"), case.pop("out")
    heads = case.pop("num_heads")
    given_ = {NAMES.get(k, k): bool(v) if k in FLAGS else v for k, v in case.items() if k not in ("dim",)}
    module = Halo(x.shape[1], heads, **given_)
    module.load_state_dict(weights)
    assert error(module.eval()(x.movedim(1, -1)).movedim(-1, 1), out) <= 1e-5


@pytest.mark.parametrize(
    "given_",
    [
        {"block": 4, "halo": 2, "stride": 2},
        {"block": 4, "halo": 1, "stride": 2, "avg_down": True, "qkv_bias": True},
        {"block": 2, "halo": 3, "dim_out": 24, "qk_ratio": 0.33},
    ],
    ids=str,
)
def test_timm_is_the_same(given_) -> None:
    layers = pytest.importorskip("timm.layers.halo_attn")
    names = {ours: theirs for theirs, ours in NAMES.items()}
    theirs = layers.HaloAttn(16, num_heads=2, **{names.get(k, k): v for k, v in given_.items()}).eval()
    ours = Halo(16, 2, **given_).eval()
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, 16, 8, 12)
    assert error(ours(x.movedim(1, -1)).movedim(-1, 1), theirs(x)) <= 1e-5


def inputs(grid, block, halo, stride=1, dtype=torch.float32, seed=0) -> list[torch.Tensor]:
    small = [-(-n // stride) for n in grid]
    win = 2 * (block + 2 * halo) - 1
    shapes = (2, *small, 2, 4), (2, *grid, 2, 4), (2, *grid, 2, 3), (win, 4), (win, 4)
    return [randn(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_pieces_change_nothing(stride, masked, monkeypatch) -> None:
    monkeypatch.setattr(groups, "CACHED", 1)  # one row of blocks at once
    given_ = inputs((11, 7), 4, 1, stride)
    rule = {"block": 4, "halo": 1, "stride": stride, "mask_padding": masked}
    assert error(halo_attention(*given_, **rule), naive_halo_attention(*given_, **rule)) <= 1e-5
    monkeypatch.setattr(groups, "SPARE", 1)

    def run(function):
        return lambda *given_: function(*given_, **rule)

    assert_same_gradients(run(halo_attention), run(naive_halo_attention), given_, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients(stride, masked, dtype) -> None:
    def run(function):
        return lambda *tensors: function(*tensors, block=4, halo=1, stride=stride, mask_padding=masked)

    limit = 1e-5 if dtype == torch.float32 else 6e-2  # the tables sum thousands of products
    assert_same_gradients(run(halo_attention), run(naive_halo_attention), inputs((7, 9), 4, 1, stride, dtype), limit)


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.booleans())
def test_any_size(height, width, block, halo, masked, scaled) -> None:
    tensors = inputs((height, width), block, halo)
    flags = {"block": block, "halo": halo, "mask_padding": masked, "scale_rel": scaled}
    assert error(halo_attention(*tensors, **flags), naive_halo_attention(*tensors, **flags)) <= 1e-5


def test_laws() -> None:
    q, k, v, rows, columns = inputs((6, 9), 3, 0)
    nothing = torch.zeros_like(rows)
    blocked = neighborhood_attention(q, k, v, 3, 3)
    assert error(halo_attention(q, k, v, nothing, nothing, block=3, halo=0), blocked) <= 1e-5
    q, k, v, rows, columns = inputs((9, 9), 3, 1)
    tables = {"block": 3, "halo": 1}
    wide = neighborhood_attention(q, k, v, 5, 3)  # the same window but shifted at borders: equal in the middle block
    zero = torch.zeros_like(rows)
    found = halo_attention(q, k, v, zero, zero, **tables)
    assert error(found[:, 3:6, 3:6], wide[:, 3:6, 3:6]) <= 1e-5
    assert error(found[:, :3], wide[:, :3]) > 1e-2
    masked = halo_attention(q, k, torch.ones_like(v), rows, columns, mask_padding=True, **tables)
    assert error(masked, torch.ones_like(v)) <= 1e-5
    q, k, v, rows, columns = inputs((12, 12), 3, 1)
    out = halo_attention(q, k, v, rows, columns, **tables)
    moved = halo_attention(*(t.roll(3, 1) for t in (q, k, v)), rows, columns, **tables)
    assert error(moved[:, 6:9], out[:, 3:6]) <= 1e-5  # moves with the image, by whole blocks
    flipped = halo_attention(*(t.flip(3) for t in (q, k, v)), rows, columns, **tables)
    assert error(flipped.flip(3), out) <= 1e-6


def test_row_and_errors() -> None:
    module = seeded(Halo(8, 2, block=3, halo=1))
    x = randn(1, 5, 7, 8)
    row = module.attention_of(x, (4, 3))
    assert (row.sum((-1, -2)) < 1).all()  # the halo leaves the map
    assert error(row[..., :2, :], torch.zeros(1, 2, 2, 7)) == 0
    _, _, v = module._project(x)
    mixed = torch.einsum("bhij,bijhd->bhd", row, v).flatten(1)
    assert error(mixed, module(x)[:, 4, 3]) <= 1e-5
    assert seeded(Halo(8, 2, block=3, halo=1, stride=2, dim_out=16))(x).shape == (1, 2, 3, 16)
    with pytest.raises(ParameterError, match="stride=3"):
        Halo(8, 2, stride=3)
    with pytest.raises(ParameterError, match="dim_out=9"):
        Halo(8, 2, dim_out=9)

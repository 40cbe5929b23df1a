"""Single-head attention on a part of the channels: golden arrays and laws."""

from __future__ import annotations

import re

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


@cases("shvit", "tiny_net*")
@torch.no_grad()
def test_golden_network(path) -> None:
    """timm's network, which is the official one under other names, with our operator for its own."""
    shvit = pytest.importorskip("timm.models.shvit")
    case, weights = load(path)
    sizes = {"embed_dim": (16, 24, 32), "partial_dim": (4, 6, 8), "qk_dim": (4, 4, 4)}
    net = shvit.SHViT(num_classes=case["out"].shape[-1], depth=(1, 1, 1), types=("i", "s", "s"), **sizes).eval()
    net.load_state_dict({of_timm(key): value for key, value in weights.items()})
    mixers = [m for m in net.modules() if isinstance(m, shvit.SHSA)]
    assert len(mixers) == 2
    for theirs in mixers:
        ours = SHSA(theirs.dim, part=theirs.pdim, qk_dim=theirs.qk_dim).eval()
        ours.load_state_dict(theirs.state_dict())
        theirs.register_forward_hook(lambda _, given, __, ours=ours: ours(given[0].movedim(1, -1)).movedim(-1, 1))
    assert error(net(case["x"]), case["out"]) <= 1e-4


def of_timm(key: str) -> str:
    """timm's name of an official entry: what stands before a stage's blocks is its `downsample`."""
    found = re.fullmatch(r"blocks(\d)\.(\d+)\.(.+)", key)
    if found is None:
        return key
    stage, place, rest = int(found[1]) - 1, int(found[2]), found[3]
    if stage and place in (0, 2):  # two residual parts
        part, rest = rest.split(".", 1)
        return f"stages.{stage}.downsample.{place // 2 * 3 + int(part)}.{rest}"
    if stage and place == 1:
        return f"stages.{stage}.downsample.2.{rest}"
    return f"stages.{stage}.blocks.{place - 3 * (stage > 0)}.{rest}"


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

"""Channel and window attention: golden arrays, timm's modules, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.mix.davit import (
    ChannelAttention,
    WindowAttention,
    channel_attention,
    channel_map,
    naive_channel_attention,
    window_attention,
    window_mask,
)
from sightline.mix.parts.base import dense_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("davit", "channel_attn*")
def test_golden(path) -> None:
    case, weights = load(path)
    bias = "qkv.bias" in weights
    module = ChannelAttention(case["x"].shape[-1], case["num_heads"], second="v2" in path.stem, qkv_bias=bias)
    module.load_state_dict(weights)
    assert error(module.eval()(case["x"]), case["out"]) <= 1e-5


@cases("davit", "*_block*")
def test_golden_blocks(path) -> None:
    davit = pytest.importorskip("timm.models.davit")
    case, weights = load(path)
    spatial = "spatial" in path.stem
    bias, window = "attn.qkv.bias" in weights, {"window_size": case.get("window_size", 4)} if spatial else {}
    kind = davit.SpatialBlock if spatial else davit.ChannelBlock
    block = kind(case["x"].shape[1], case.get("num_heads", 3), qkv_bias=bias, **window)
    block.load_state_dict(weights)
    assert error(with_ours(block.eval(), case["x"]), case["out"]) <= 1e-5


@cases("davit", "tiny_net*")
@torch.no_grad()
def test_golden_network(path) -> None:
    davit = pytest.importorskip("timm.models.davit")
    case, weights = load(path)
    sizes = {"depths": (1, 1, 2, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (2, 2, 4, 4), "window_size": 4}
    net = davit.DaVit(num_classes=case["out"].shape[-1], **sizes).eval()
    net.load_state_dict(weights)
    blocks = [m for m in net.modules() if isinstance(m, (davit.SpatialBlock, davit.ChannelBlock))]
    for block in blocks:  # every block's output with our operator in it
        block.register_forward_hook(lambda block, given, _: with_ours(block, *given))
    assert len(blocks) == 10
    assert error(net(case["x"]), case["out"]) <= 1e-4


def with_ours(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """timm's block on (B, C, H, W), with our operator for its own."""
    dim, bias = x.shape[1], block.attn.qkv.bias is not None
    if hasattr(block, "window_size"):
        ours = WindowAttention(dim, block.attn.num_heads, window=block.window_size[0], qkv_bias=bias)
    else:
        ours = ChannelAttention(dim, block.attn.num_heads, qkv_bias=bias)
    ours.load_state_dict(block.attn.state_dict())
    tokens = block.cpe1(x).flatten(2).mT  # (B, N, C)
    tokens = tokens + ours(block.norm1(tokens).unflatten(1, x.shape[2:])).flatten(1, 2)
    tokens = block.cpe2(tokens.mT.view_as(x)).flatten(2).mT
    return (tokens + block.mlp(block.norm2(tokens))).mT.view_as(x)


def test_timm_is_the_same() -> None:
    davit = pytest.importorskip("timm.models.davit")
    block = davit.SpatialBlock(12, 3, window_size=4).eval()
    x = randn(2, 12, 6, 9)
    assert error(with_ours(block, x), block(x)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second", [False, True])
def test_gradients(second, dtype) -> None:
    inputs = [randn(2, 13, 2, 5, seed=i, dtype=dtype) for i in range(3)]
    limit = 1e-5 if dtype == torch.float32 else 2e-2

    def run(function):
        return lambda q, k, v: function(q, k, v, second=second)

    assert_same_gradients(run(channel_attention), run(naive_channel_attention), inputs, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window_gradients(dtype) -> None:
    inputs = [randn(2, 6, 9, 2, 5, seed=i, dtype=dtype) for i in range(3)]

    def naive(q, k, v):
        mask = window_mask(3, (6, 9))
        return dense_attention(*(x.flatten(1, 2) for x in (q, k, v)), 5**-0.5, mask).reshape(q.shape)

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(lambda q, k, v: window_attention(q, k, v, 3), naive, inputs, limit)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_laws_of_channels(tokens, width, seed, second) -> None:
    q, k, v = (randn(1, tokens, 2, width, seed=seed + i, dtype=torch.float64) for i in range(3))
    out = channel_attention(q, k, v, second=second)
    a = channel_map(q, k, v, second=second)
    assert error(a.sum(-1), torch.ones(1, 2, width)) <= 1e-9
    order = torch.randperm(tokens)
    shuffled = channel_attention(*(x[:, order] for x in (q, k, v)), second=second)
    assert error(shuffled, out[:, order]) <= 1e-9
    read = v if second else q
    if width == 1:
        assert error(out, read) <= 1e-9
    level = read[..., :1].expand_as(read)  # equal channels stay what they are
    same = channel_attention(q, k, level, second=True) if second else channel_attention(level, k, v)
    assert error(same, level) <= 1e-9
    twice = [torch.cat([x, x], 1) for x in (q, k, v)]
    logits = a.log() - a.log().mean(-1, keepdim=True)
    doubled = channel_map(*twice, second=second).log()
    grown = 2**0.5 if second else 2
    assert error(doubled - doubled.mean(-1, keepdim=True), logits * grown) <= 1e-6


def test_windows_of_a_small_map_and_rows() -> None:
    module = seeded(WindowAttention(8, 2, window=4))
    x = randn(2, 3, 7, 8)
    row = module.attention_of(x, (2, 1))
    assert (row[..., 4:] == 0).all()
    assert (row.sum((-1, -2)) < 1).all()  # the window holds a row of padding
    _, _, v = module._project(x)
    pad = v[:, 3:, :4]
    q, k, _ = module._project(x)
    full = dense_attention(*(t[:, :, :4].flatten(1, 2) for t in (q, k, v)), 0.5).reshape(2, 4, 4, 8)
    assert error(module.proj(full)[:, :3], module(x)[:, :, :4]) <= 1e-5
    assert error(pad, module.qkv.bias[16:].view(2, 4).expand_as(pad)) <= 1e-6  # pads carry the bias

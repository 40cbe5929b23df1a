"""Agent attention and AgentSD: golden arrays, fast against whole maps, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.agent import Agent, agent_attention, naive_agent_attention
from sightline.mix.agent_sd import match, merged_attention
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


def form_of(weights: dict[str, torch.Tensor]) -> Agent:
    """The module that the weights belong to: their names and shapes tell every parameter."""
    (heads, agents), dim = weights["an_bias"].shape[:2], len(weights["proj.weight"])
    return Agent(
        dim,
        heads,
        agents,
        (weights["ha_bias"].shape[2], weights["wa_bias"].shape[3]),
        qkv_bias="qkv.bias" in weights or "q.bias" in weights,
        fused="qkv.weight" in weights,
        reduction=weights["sr.weight"].shape[-1] if "sr.weight" in weights else 1,
        cls="ac_bias" in weights,
    )


@cases("agent", "[!s]*")
def test_golden(path) -> None:
    check_golden(path)


@cases("agent", "swin*")  # not sd_*
def test_golden_swin(path) -> None:
    check_golden(path)


def check_golden(path) -> None:
    case, weights = load(path)
    module = form_of(weights)
    module.load_state_dict(weights)
    x, cls = case["x"], None
    if module.cls:
        cls, x = x[:, :1], x[:, 1:]
    out = module.eval()(x.unflatten(1, module.window), cls)
    out = out.flatten(1, 2) if cls is None else torch.cat([out[1], out[0].flatten(1, 2)], 1)
    assert error(out, case["out"]) <= 1e-5


@cases("agent", "sd_*")
def test_golden_without_training(path) -> None:
    case, weights = load(path)
    x = case["x"]
    grid = (case["h"], case["w"]) if "h" in case else (7, 9) if "odd" in path.stem else (8, 8)
    merged, agents, none = case["merged"], case.get("agents"), case.get("agent_r", 0)
    matching = match(x, grid, x.shape[1] - merged.shape[1], none if agents is None else x.shape[1] - agents.shape[1])
    tokens, few = matching.merge(x), matching.agents(x)
    assert error(tokens.sum(1), merged.sum(1)) <= 1e-4
    assert (few is None) == (agents is None)
    heads = case.get("num_heads", case.get("heads", 2))
    q, k, v = (F.linear(tokens, weights[f"to_{n}.weight"]).unflatten(-1, (heads, -1)) for n in "qkv")
    a = None
    if agents is not None:
        assert error(few.sum(1), agents.sum(1)) <= 1e-4
        a = F.linear(few, weights["to_q.weight"]).unflatten(-1, (heads, -1))
    scales = {name: case[name] for name in ("k_scale2", "k_shortcut") if name in case}
    out = merged_attention(q, k, v, a, **scales).flatten(-2)
    out = F.linear(out, weights["to_out.0.weight"], weights.get("to_out.0.bias"))
    assert error(matching.unmerge(out), case["unmerged"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype) -> None:
    shapes = [(2, 7, 3, 4), (2, 11, 3, 4), (2, 11, 3, 5), (2, 5, 3, 4), (1, 3, 5, 11), (1, 3, 7, 5)]
    inputs = [randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same_gradients(agent_attention, naive_agent_attention, inputs, limit)


@settings(max_examples=15)
@given(st.integers(3, 9), st.integers(3, 9), st.sampled_from([1, 4, 9]), st.integers(0, 50))
def test_effective_map(height, width, agents, seed) -> None:
    module = seeded(Agent(8, 2, agents, (4, 6)), seed)  # biases are resized to other maps
    x = randn(1, height, width, 8, seed=seed)
    index = (height - 1, width // 2)
    row = module.attention_of(x, index)
    assert row.shape == (1, 2, height, width)
    assert (row >= 0).all()
    assert error(row.sum((-1, -2)), torch.ones(1, 2)) <= 1e-5
    if agents == 1:
        assert error(row, module.attention_of(x, (0, 0))) <= 1e-6
    with torch.no_grad():
        module.dwc.weight.zero_()
        module.dwc.bias.zero_()
        _, _, v, _, _ = module._project(x, None)
        mixed = torch.einsum("bhn,bnhd->bhd", row.flatten(2), v).flatten(1)
        assert error(module.proj(mixed), module(x)[:, index[0], index[1]]) <= 1e-4


@settings(max_examples=25)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 40), st.integers(0, 60), st.integers(0, 99))
def test_merging(height, width, r, agents_r, seed) -> None:
    x = randn(2, height * width, 5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(4, (height // 2, width // 2), generator=generator)
    matching = match(x, (height, width), r, agents_r, choice=choice)
    merged = matching.merge(x)
    assert merged.shape[1] == height * width - matching.r
    few = matching.agents(x)
    assert few is None or few.shape[1] == height * width - min(agents_r, len(matching.src))
    back = matching.unmerge(merged)
    for b in range(2):
        gone = matching.src[matching.order[b, : matching.r]]
        goal = matching.dst[matching.target[b, matching.order[b, : matching.r]]]
        assert torch.equal(back[b, gone], back[b, goal])
        stay = matching.src[matching.order[b, matching.r :]]
        assert torch.equal(back[b, stay], x[b, stay])
    if matching.r == 0:
        assert torch.equal(back, x)


def test_bad_parameters() -> None:
    with pytest.raises(ParameterError, match="square number"):
        Agent(8, 2, agents=5)
    with pytest.raises(ParameterError, match="fused=False"):
        Agent(8, 2, agents=4, reduction=2)
    with pytest.raises(ParameterError, match="cls=True"):
        Agent(8, 2, agents=4, window=4)(randn(1, 4, 4, 8), randn(1, 1, 8))
    with pytest.raises(ParameterError, match="do not fit 12 tokens"):
        match(randn(1, 12, 3), (3, 5), 2, 4)
    q = randn(1, 8, 2, 4)
    assert error(merged_attention(q, q, q, q), agent_attention(q, q, q, q)) > 1e-3  # too many agents: plain

"""Cluster attention: golden arrays, clusters against queries one by one, k-means, the sheet's laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import ParameterError
from sightline.mix.parts.base import dense_attention
from sightline.mix.routing_transformer import (
    Routing,
    clustered_attention,
    commitment,
    k_means,
    members,
    naive_clustered_attention,
    new_means,
)
from tests.mix.numbers import assert_same_gradients, cases, error, load, randn, seeded


@cases("routing-transformer")
def test_golden(path) -> None:
    case, _ = load(path)
    q, k, v = (case[n].transpose(1, 2) for n in "qkv")
    means, window, shared = case["means"], case["window_size"], bool(case["shared_qk"])
    routed = q if shared else torch.cat([q, k], 1)
    k = F.normalize(k, dim=-1) if shared else k
    index = members(q, means, window), members(q if shared else case["k"].transpose(1, 2), means, window)
    memory = (case["mem_key"], case["mem_value"]) if case["mem_key"].numel() else None
    out = clustered_attention(q, k, v, *index, causal=bool(case["causal"]), shared=shared, memory=memory)
    assert error(out.transpose(1, 2), case["out"]) <= 1e-5
    assert (1e-4 * commitment(routed, means)).item() == pytest.approx(case["aux_loss"], abs=1e-9)
    fresh = new_means(routed, means)
    assert error(fresh, case["new_means"]) <= 1e-5
    assert error(means.lerp(fresh, 1e-3), case["ema_means"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "shared"), [(False, False), (True, False), (True, True)])
def test_gradients(causal, shared, dtype) -> None:
    q, k, v = (randn(2, 7, 2, 4, seed=i, dtype=dtype) for i in range(3))
    means = F.normalize(randn(2, 3, 4, seed=5), dim=-1)
    index = members(q, means, 4), members(q if shared else k, means, 4)
    slots = [randn(2, 3, 1, 4, seed=i, dtype=dtype) for i in (7, 8)]

    def run(function):
        return lambda q, k, v, *memory: function(q, k, v, *index, causal=causal, shared=shared, memory=memory)

    limit = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same_gradients(run(clustered_attention), run(naive_clustered_attention), [q, k, v, *slots], limit)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_laws(tokens, clusters, window, seed) -> None:
    q, k, v = (randn(1, tokens, 2, 4, seed=seed + i, dtype=torch.float64) for i in range(3))
    means = F.normalize(randn(2, clusters, 4, seed=seed + 5, dtype=torch.float64), dim=-1)
    index = members(q, means, window), members(k, means, window)
    assert index[0].shape == (1, 2, clusters, min(window, tokens))
    assert all(len(set(c.tolist())) == len(c) for c in index[0].flatten(0, 2))
    out = clustered_attention(q, k, v, *index)
    order = torch.randperm(clusters)
    assert error(clustered_attention(q, k, v, *(i[:, :, order] for i in index)), out) <= 1e-9
    alone = torch.ones(2, tokens, dtype=torch.bool)
    for h in range(2):
        alone[h, index[0][0, h].unique()] = False
    assert (out[0].transpose(0, 1)[alone] == 0).all()  # a token in no cluster
    causal = clustered_attention(q, k, v, *index, causal=True)
    later = v.clone()
    later[:, tokens // 2 :] += 3  # membership is fixed: only the values of later tokens change
    assert error(clustered_attention(q, k, later, *index, causal=True)[:, : tokens // 2], causal[:, : tokens // 2]) == 0
    whole = [torch.arange(tokens).expand(1, 2, 1, -1)] * 2
    assert error(clustered_attention(q, k, v, *whole) * (1 + 1e-5), dense_attention(q, k, v, 0.5)) <= 1e-6


def test_padding_and_rows() -> None:
    q, k, v = (randn(2, 6, 2, 4, seed=i) for i in range(3))
    index = [torch.arange(6).expand(2, 2, 1, -1)] * 2
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    out = clustered_attention(q, k, v, *index, key_mask=mask)
    short = dense_attention(*(x[:1, :4] for x in (q, k, v)), 0.5)
    assert error(out[:1, :4] * (1 + 1e-5), short) <= 1e-5
    assert (clustered_attention(q, k, v, *index, key_mask=mask & False) == 0).all()  # nothing to see: zeros, not NaN
    module = seeded(Routing(8, 2, clusters=2, window=5))
    x = randn(1, 3, 3, 8)
    row = module.attention_of(x, (1, 1)).flatten(2)
    _, _, v = module._project(x)
    mixed = torch.einsum("bhn,bnhd->bhd", row, v).flatten(1)
    assert error(module.proj(mixed), module(x)[:, 1, 1]) <= 1e-5
    with pytest.raises(ParameterError, match="clusters=0"):
        Routing(8, 2, clusters=0)


def test_start_draws_different_tokens() -> None:
    x = randn(2, 3, 2, 4)
    first = k_means(x, 6, torch.Generator().manual_seed(0), steps=0)  # as many clusters as tokens
    every = F.normalize(x, dim=-1).flatten(0, 1).transpose(0, 1)
    assert error(first.sum(1), every.sum(1)) <= 1e-6
    assert error(k_means(x, 6, torch.Generator().manual_seed(0)), first) <= 1e-6  # each its own cluster: they stay
    assert k_means(x, 9).shape == (2, 9, 4)  # more than there are tokens: some twice


def test_centroids_learn_in_training_only() -> None:
    module = seeded(Routing(8, 2, clusters=3))
    x = randn(2, 12, 8)
    module.start(x, torch.Generator().manual_seed(1))
    start = module.means.clone()
    module.start(x, torch.Generator().manual_seed(1))
    assert torch.equal(module.means, start)  # the draw can be replayed
    _, before = module(x, with_loss=True)
    assert torch.equal(module.means, start)
    module.train()
    module.decay = 0.5
    with torch.no_grad():
        module.means.copy_(F.normalize(torch.randn(2, 3, 4), dim=-1))
    _, far = module(x, with_loss=True)
    for _ in range(30):
        _, near = module(x, with_loss=True)
    assert near < far
    assert before > 0

"""ZipVL: the laws of its split, attention among the important tokens, and the three ways to keep the cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.errors import ParameterError
from sightline.prune.zipvl import ZipVL, important, probes
from tests.engine.numerics import assert_close
from tests.engine.whole import forward, generate
from tests.tiny_hosts import picture

QUESTIONS, PICTURES = ["Is there a dog?", "How many red cups are on the table?"], [picture(), picture(80, 64, 1)]


def split(rows: torch.Tensor, seen: torch.Tensor, tau: float) -> torch.Tensor:
    """The important tokens by rows (B, P, N) of attention, mean over heads."""
    return important(rows.sum(1), seen.sum(1), tau)


def maps(seed: int, count: int = 20, sharp: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole causal maps (2, N, N) and what is visible."""
    seen = torch.ones(count, count).tril().bool().expand(2, -1, -1)
    scores = torch.randn(2, count, count, generator=torch.Generator().manual_seed(seed)) * sharp
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), seen


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tau=st.floats(0.05, 0.99), more=st.floats(0, 0.5))
def test_more_mass_never_means_fewer_tokens(seed, tau, more):
    rows, seen = maps(seed)
    few, many = split(rows, seen, tau), split(rows, seen, min(tau + more, 1.0))
    assert (few.sum(1) >= 1).all()
    assert (few.sum(1) <= many.sum(1)).all()
    assert not (few & ~many).any()  # the same order, cut later
    total = rows.sum(1).sort(descending=True).values  # (2, N)
    assert torch.allclose(total.sum(1), torch.full((2,), 20.0), atol=1e-4)
    for row in range(2):
        count = int(few[row].sum())
        assert float(total[row, :count].sum()) >= tau * 20 - 1e-4
        assert float(total[row, : count - 1].sum()) < tau * 20 + 1e-4


def test_uniform_and_one_hot():
    seen = torch.ones(1, 4, 10, dtype=torch.bool)
    assert int(split(torch.full((1, 4, 10), 0.1), seen, 0.55).sum()) == math.ceil(5.5)
    hot = torch.zeros(1, 4, 10)
    hot[..., 3] = 1.0
    assert split(hot, seen, 0.99).nonzero().tolist() == [[0, 3]]


def test_early_tokens_have_no_advantage():
    """Of two tokens with equal sums the one that fewer probes could see ranks higher."""
    rows = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.4, 0.4]]])
    seen = torch.ones(3, 3).tril().bool()[None]
    assert split(rows, seen, 0.5).tolist() == [[True, False, False]]  # 1.7/3 = .57, .9/2 = .45, .4/1 = .4
    rows = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.2, 0.8]]])
    assert split(rows, seen, 0.5).tolist() == [[False, False, True]]  # 1.5/3, .7/2, .8/1


@settings(max_examples=40, deadline=None)
@given(pad=st.integers(0, 12), count=st.integers(1, 60), recent=st.integers(1, 9), random=st.integers(0, 9))
def test_probes(pad, count, recent, random):
    """The last ones, one of every stretch before them, no padding; the same whatever the padding is."""
    draws = torch.rand(random, generator=torch.Generator().manual_seed(0))
    real = torch.ones(1, pad + count, dtype=torch.bool)
    real[:, :pad] = False
    found = probes(real, recent, random, draws)
    assert not (found & ~real).any()
    assert int(found.sum()) == min(count, recent + random)
    assert found[0, -min(recent, count) :].all()
    assert torch.equal(found[:, pad:], probes(real[:, pad:], recent, random, draws))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_first_layer_attends_among_the_important(name, tiny):
    """Its split follows from the host's own attention: with all tokens asking, the sums of the whole map decide."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    watch = sl.record(maps=True, sinks=False)
    with sl.attach(host.model, watch):
        forward(host.model, inputs)
    rows = watch.seen.maps[0][0].mean(1)  # (1, N, N)
    wanted = split(rows, torch.ones_like(rows).tril().bool(), 0.8)
    again = sl.record(maps=True, sinks=False)
    with sl.attach(host.model, ZipVL(tau=0.8, recent=500, cache_mode="keep"), again) as attached:
        forward(host.model, inputs)
    found = again.seen.maps[0][0]  # (1, H, N, N)
    assert (found[:, :, ~wanted[0]] == 0).all()
    assert (found[:, :, :, ~wanted[0]] == 0).all()
    sums = found.sum(-1)[:, :, wanted[0]]
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    share = attached.report()["zipvl"]["share_of_tokens"]
    assert share[0] == pytest.approx(float(wanted.float().mean()))
    assert attached.report()["zipvl"]["attention_flops_share"] < 1


def test_sixteen_bits_and_all_tokens_are_the_host(tiny):
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    plain = generate(host.model, inputs)
    with sl.attach(host.model, ZipVL(tau=1.0, bits_high=16, bits_low=16)):
        assert torch.equal(generate(host.model, inputs)[1], plain[1])
    with sl.attach(host.model, ZipVL(tau=1.0, bits_high=16, bits_low=8, interval=2)):  # important: all, so 16 bits
        found = generate(host.model, inputs, 7)
    assert_close("compressed", found[1], generate(host.model, inputs, 7)[1], 1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_cache(name, tiny):
    """Quantising keeps every token in fewer bytes; evicting keeps the important ones; new tokens join by intervals."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    options = {"tau": 0.8, "recent": 8, "random": 8, "interval": 3}
    with torch.no_grad():
        plain = made_cache(host.model(**inputs))
        with sl.attach(host.model, ZipVL(**options)) as attached:
            small = made_cache(host.model(**inputs))
        with sl.attach(host.model, ZipVL(cache_mode="evict", **options)) as thinned:
            short = made_cache(host.model(**inputs))
    for own, layer in zip(plain.layers, small.layers, strict=True):
        if not getattr(own, "is_sliding", False):
            keys = layer.all()[0]
            assert keys.shape == own.keys.shape
            assert layer.nbytes < 0.7 * 2 * own.keys.numel() * 4
            assert layer.get_seq_length() == inputs["input_ids"].shape[1]
    assert attached.report()["zipvl"]["bits_per_number"] < 4
    shares = thinned.report()["zipvl"]["share_of_tokens"]
    for layer, share in zip(short.layers, shares, strict=True):
        real = int(inputs["attention_mask"].sum())
        if not getattr(layer, "is_sliding", False):
            assert layer.keys.shape[-2] >= share * real / 2
            assert layer.keys.shape[-2] < inputs["input_ids"].shape[1]
    for mode in ("quantise", "evict"):
        with sl.attach(host.model, ZipVL(cache_mode=mode, **options)):
            ids, logits = generate(host.model, inputs, 11, return_dict_in_generate=True)
            beams, _ = generate(host.model, inputs, 11, num_beams=2)
        assert logits.isfinite().all()
        assert beams.shape == ids.shape


def test_intervals_compress_what_was_generated(tiny):
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    sizes = []

    class Watch(sl.engine.system.System):
        def cache(self, site, cache):
            sizes.append((len(getattr(cache.layers[1], "blocks", ())), cache.layers[1].keys.shape[-2]))

    with sl.attach(host.model, ZipVL(tau=0.9, interval=3), Watch()):
        generate(host.model, inputs, 8)
    assert sizes == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tau": 1.5}, "tau"),
        ({"bits_high": 3}, "2, 4, 8 or 16"),
        ({"bits_high": 2, "bits_low": 4}, "exchange"),
        ({"cache_mode": "drop"}, "quantise, evict or keep"),
    ],
)
def test_bad_parameters(options, match):
    with pytest.raises(ParameterError, match=match):
        ZipVL(**options)

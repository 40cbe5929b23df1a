"""Formulas against published figures and against counting; what is measured on a tiny model."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sightline.decode.damro import DAMRO
from sightline.engine.system import System
from sightline.errors import InputError, ParameterError
from sightline.evaluate import cost, pareto, world
from sightline.evaluate.flops import Decoder
from sightline.evaluate.peak import peak_bytes

LLAMA_7B = Decoder(32, 4096, 32, 32, 128, 11008)
LLAMA_13B = Decoder(40, 5120, 40, 40, 128, 13824)
SIZE = 56


@pytest.fixture(scope="module")
def task():
    return world.build("pope:random", n=6, size=SIZE)[0]


@pytest.mark.parametrize(
    ("decoder", "tokens", "tera"),
    [
        (LLAMA_7B, [576] * 32, 3.82),  # PyramidDrop's table
        (LLAMA_7B, [576] * 2 + [288] * 30, 2.01),  # FastV, K = 2, half
        (LLAMA_7B, [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8, 1.78),  # PyramidDrop
        (LLAMA_7B, [192] * 32, 1.25),
        (LLAMA_7B, [64] * 32, 0.42),
        (LLAMA_7B, [2880] * 32, 20.8),
        (LLAMA_13B, [576] * 40, 7.44),
    ],
)
def test_published_flops(decoder, tokens, tera):
    assert decoder.prefill_macs(tokens) / 1e12 == pytest.approx(tera, abs=0.006 if tera < 10 else 0.05)


def test_published_two_matrix_form_and_cache():
    two = Decoder(32, 4096, 32, 32, 128, 11008, gated=False)
    assert two.prefill_macs([576] * 32) / 1e12 == pytest.approx(2.99, abs=0.006)
    assert LLAMA_7B.kv_bytes([576] * 32, 2) == 288 * 2**20
    assert LLAMA_7B.kv_bytes([2880 + 144] * 32, 2) == 1512 * 2**20


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_more_tokens_cost_more_than_their_sum(a, b):
    assert LLAMA_7B.layer_macs(a + b) >= LLAMA_7B.layer_macs(a) + LLAMA_7B.layer_macs(b)
    assert LLAMA_7B.layer_macs(1) == 4 * 4096**2 + 2 * 4096 + 3 * 4096 * 11008


def test_formula_refusals():
    with pytest.raises(ParameterError, match="3 token counts for 32 layers"):
        LLAMA_7B.prefill_macs([1, 2, 3])
    with pytest.raises(ParameterError, match="n=-1"):
        LLAMA_7B.layer_macs(-1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_the_formula_is_what_torch_counts(lvlm, task, name):
    """Exactly, on hosts with and without grouped heads, of head widths that do and do not fill the model's width."""
    found = cost.count(lvlm(name), (), task, task.items[0], new_tokens=2)
    assert found["decoder_gflops"] == pytest.approx(found["formula_gflops"], rel=1e-9)
    assert found["kv_mib"] == pytest.approx(found["kv_formula_mib"], rel=1e-9)
    assert found["prefill_gflops"] > found["decoder_gflops"]


class Touch(System):
    """Touches the input of every layer and changes nothing that counts."""

    slug = "touch"

    def hidden(self, site, hidden):
        return hidden * 1.0


def test_systems_are_counted_too(lvlm, task, var):
    rows = {"none": (), "touch": (Touch(),), "var": (var,)}
    found = cost.measure(lvlm(), rows, task, rounds=2, warmup=0, new_tokens=3, console=Console(file=io.StringIO()))
    assert found["touch"]["tokens_per_layer"] == found["none"]["tokens_per_layer"] == 57
    assert found["var"]["decoder_gflops"] > found["var"]["formula_gflops"]  # the edited rows are computed again
    for figures in found.values():
        assert 0 < figures["prefill_ms"] < figures["ttft_ms"]
        assert figures["tokens_per_s"] > 0
        low, high = figures["prefill_ms_quartiles"]
        assert low <= high
        assert figures["rounds"] == 2
    with pytest.raises(ParameterError, match="new_tokens=1"):
        cost.measure(lvlm(), rows, task, new_tokens=1)


def test_a_second_stream_is_counted_and_expected(lvlm, task):
    plain = cost.count(lvlm(), (), task, task.items[0])
    found = cost.count(lvlm(), (DAMRO(topk=4),), task, task.items[0])
    assert found["decoder_gflops"] > 1.2 * plain["decoder_gflops"]
    assert found["tokens_per_layer"] > plain["tokens_per_layer"]
    assert found["decoder_gflops"] == pytest.approx(found["formula_gflops"], rel=0.02)


def test_the_measurement_is_interleaved(lvlm, task, monkeypatch):
    """Every round has every combination once, and not always in the same order."""
    order = []
    monkeypatch.setattr(cost, "_time", lambda lvlm, systems, *rest: order.append(len(systems)) or (1.0, 2.0, 3.0))
    rows = {"none": (), "touch": (Touch(),)}
    found = cost.measure(lvlm(), rows, task, rounds=3, warmup=1, new_tokens=2)
    assert [sorted(order[k : k + 2]) for k in range(0, 8, 2)] == [[0, 1]] * 4
    assert order[:4] == [0, 1, 1, 0]
    assert found["none"]["ttft_ms"] == 2000


def test_peak_by_hand():
    layer = torch.nn.Linear(256, 256, bias=False)  # 256 KiB
    x = torch.zeros(256, 256)
    with torch.no_grad():
        one = peak_bytes(layer, lambda: layer(x))
        chain = peak_bytes(layer, lambda: layer(layer(layer(x))))
        kept = peak_bytes(layer, lambda: [layer(x) for _ in range(4)])
    kib = 2**10
    assert one == (256 + 256) * kib
    assert chain == (256 + 2 * 256) * kib  # two activations live at a time
    assert kept == (256 + 4 * 256) * kib


POINT = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.lists(POINT, min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    price, quality = zip(*points, strict=True)
    best = pareto.front(price, quality)
    assert best
    for k, (p, q) in enumerate(points):
        beaten = any(a <= p and b >= q and (a, b) != (p, q) for a, b in points)
        assert (k in best) is not beaten


def test_a_picture_needs_costs():
    with pytest.raises(InputError, match="no prefill_ms"):
        pareto.picture([], {})

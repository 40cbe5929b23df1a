"""Attention among chosen tokens, rows of chosen queries, and the cache of two precisions: against their definitions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import sightline as sl
from sightline.engine import attention
from sightline.engine import mixed as mixed_cache
from sightline.engine.attention import Call, Edit, Only, Probe, among, attend, naive_attention, rows_of, sums_of
from sightline.engine.mixed import Block, mixed, pack, quantise, unpack
from sightline.errors import AttachError, HostError, ParameterError
from tests.engine.numerics import Largest, assert_close
from tests.engine.toys import toy
from tests.engine.whole import generate
from tests.tiny_hosts import picture

B, H, D = 2, 4, 8


def call(queries: int = 13, keys: int = 13, heads_kv: int = 2, mask: str = "none", dtype=torch.float32) -> Call:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, n: int) -> Tensor:
        return torch.randn(B, heads, n, D, generator=generator).to(dtype).requires_grad_()

    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].repeat(B, 1, 1, 1)
    causal[1, :, :, :3] = False  # padding on the left
    value = {"none": None, "bool": causal, "additive": torch.zeros(causal.shape).masked_fill(~causal, -3e38)}[mask]
    return Call(draw(H, queries), draw(heads_kv, keys), draw(heads_kv, keys), value, mask == "none", D**-0.5)


def chosen(keys: int) -> Tensor:
    only = torch.rand(B, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    only[:, -1] = True
    return only


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("heads_kv", [1, 4])
def test_attention_among_some(mask, even, heads_kv):
    """As if all other tokens were masked, and zero where a token takes no part; the same gradients."""
    one = call(mask=mask, heads_kv=heads_kv)
    only = chosen(13)
    only = only[:1].repeat(2, 1) if even else only
    found = among(_with(one, only))
    allowed = torch.ones(13, 13).tril().bool()[None, None] if one.mask is None else one.mask
    allowed = allowed if allowed.dtype == torch.bool else allowed > -1
    allowed = allowed & only[:, None, None] & only[:, None, :, None]
    wanted, _ = naive_attention(one.query, one.key, one.value, scale=one.scale, mask=allowed)
    empty = ~allowed.any(-1)[:, 0]  # (B, Q): the naive softmax makes these uniform
    wanted = wanted.masked_fill(empty[..., None, None], 0.0)
    here = ~empty | ~only
    assert_close("output", found[here], wanted[here], 1e-5)
    inputs = (one.query, one.key, one.value)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) * here[..., None, None]
    for got, want in zip(torch.autograd.grad((found * weight).sum(), inputs),
                         torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):  # fmt: skip
        assert_close("gradient", got, want, 1e-4)


def _with(one: Call, only: Tensor) -> Call:
    return replace(one, only=only)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_probes_and_edits_see_the_same_attention(mask):
    """Rows shown under `Only` are those that made the output; an edit that changes nothing leaves it."""
    one = _with(call(mask=mask), chosen(13))
    seen = torch.zeros(B, H, 13, 13)
    probe = Probe(lambda w, first: seen[:, :, first : first + w.shape[2]].copy_(w.detach()))
    with torch.no_grad():
        plain = among(one)
        again, _ = attend(one, lambda: (among(one), None), [Edit(gain=torch.ones(1, H, 1))], [probe])
        value = one.value.repeat_interleave(H // one.value.shape[1], 1)
        assert_close("rows", (seen @ value).transpose(1, 2)[:, 3:], plain[:, 3:], 1e-5)
        assert_close("edited", again[:, 3:], plain[:, 3:], 1e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("past", [0, 5])
def test_rows_of_chosen_queries(mask, past):
    one = call(mask=mask)
    before = torch.randn(B, 2, past, D, generator=torch.Generator().manual_seed(3)) if past else None
    if past and one.mask is not None:
        width = torch.ones(B, 1, 13, past)
        front = width.bool() if one.mask.dtype == torch.bool else torch.zeros_like(width)
        one = replace(one, mask=torch.cat([front, one.mask], -1))
    queries = torch.tensor([[12, 4, -1], [7, 12, 5]])
    with torch.no_grad():
        found = rows_of(one, queries, before)
        key = one.key if before is None else torch.cat([before, one.key], 2)
        allowed = torch.ones(13, 13 + past).tril(past).bool()[None, None] if one.mask is None else one.mask
        allowed = allowed if allowed.dtype == torch.bool else allowed > -1
        value = torch.zeros(B, 2, 13 + past, D)
        _, whole = naive_attention(one.query, key, value, scale=one.scale, mask=allowed)
    for row in range(B):
        for k, query in enumerate(queries[row].tolist()):
            if query < 0:
                assert found[row, :, k].abs().max() == 0
            else:
                assert_close("row", found[row, :, k], whole[row, :, query], 1e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("piece", [1, 600, 1 << 20])
@pytest.mark.parametrize(("heads_kv", "dtype"), [(1, torch.float32), (2, torch.float32), (4, torch.bfloat16)])
def test_sums_of_chosen_queries(mask, piece, heads_kv, dtype, monkeypatch):
    """As the rows themselves, however many heads are summed at once; queries that are none, or see nothing, give nothing."""
    monkeypatch.setattr(attention, "PIECE_BYTES", piece)
    one = call(heads_kv=heads_kv, mask=mask, dtype=dtype)
    queries = torch.tensor([[12, 4, -1], [7, 0, 5]])  # row 1's query 0 is padding where there is a mask
    found = sums_of(one, queries)
    assert not found.requires_grad
    assert_close("sums", found, rows_of(one, queries).mean(1).sum(1).detach(), 1e-6)
    if mask != "none":
        assert_close("asked", found.sum(1), torch.tensor([2.0, 2.0]), 1e-5)


def test_sums_make_nothing_of_all_heads():
    one = Call(*(torch.randn(1, 8, 700, 8) for _ in range(3)), None, True, 1.0)
    with Largest() as largest:
        sums_of(one, torch.arange(600, 700)[None])
    assert largest.numel < 8 * 100 * 700


def test_no_large_tensor_appears():
    """Attention among a tenth of the tokens makes nothing of the size of a whole map, without a mask."""
    one = _with(
        Call(*(torch.randn(1, 2, 500, 8) for _ in range(3)), None, True, 1.0), torch.arange(500)[None] % 10 == 9
    )
    with torch.no_grad(), Largest() as largest:
        among(one)
    assert largest.numel < 500 * 500


# -- two precisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [8, 7, 1])
def test_packing(bits, dim):
    code = torch.randint(0, 2**bits, (2, 3, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(code, bits)
    assert packed.shape[-1] == -(-dim * bits // 8)
    assert torch.equal(unpack(packed, bits, dim), code)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), over=st.sampled_from([2, 3]), seed=st.integers(0, 1000))
def test_the_error_is_half_a_step(bits, over, seed):
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 10
    codes = quantise(x, bits, over=over)
    assert ((codes.numbers() - x).abs() <= codes.scale / 2 * 1.001 + 1e-5).all()
    by_channel = quantise(x, bits, over=3, channels=True)
    limit = by_channel.scale / 2 * by_channel.channel
    assert ((by_channel.numbers() - x).abs() <= limit * 1.001 + 1e-5).all()


@pytest.mark.parametrize("size", [1.0, 1e-38, 1e-44])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_code_leaves_its_bits(bits, size):
    """Down to the smallest numbers none spills into its neighbour's bits: all stay within the old range."""
    x = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0)) * size
    x[:, 0] = 3.0 * size
    for over in (2, 3):
        found = quantise(x, bits, over=over).numbers()
        assert torch.equal(found[:, 0], x[:, 0])
        assert (found >= x.amin(over, keepdim=True)).all()
        assert (found <= x.amax(over, keepdim=True) + 1e-6 * size).all()
    with pytest.raises(ParameterError, match="choose one of"):
        quantise(x, 3, over=2)


@pytest.mark.parametrize("channels", [True, False])
def test_pieces_are_the_whole(channels, monkeypatch):
    """However many heads are quantised at once, the codes are the same."""
    x = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = quantise(x, 4, over=3, channels=channels)
    for piece in (1, 4 * 2 * 6 * 8 * 2):  # one head, two heads
        monkeypatch.setattr(mixed_cache, "PIECE_BYTES", piece)
        found = quantise(x, 4, over=3, channels=channels).tensors()
        assert all(torch.equal(found[name], part) for name, part in whole.tensors().items())


@pytest.mark.parametrize("bits", [(8, 2), (16, 16)])
def test_padding_spoils_no_minimum(bits):
    """A row without padding and one with it, of any size, hold the same numbers in the same codes."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 6, 8, generator=generator)
    high = torch.tensor([[True, False, True, False, False, True]])
    whole = Block.of(keys, values, high, bits, torch.ones_like(high)).restored()
    wide = [torch.cat([torch.full((1, 2, 3, 8), 1e9), x], 2) for x in (keys, values)]
    pad, both = torch.zeros(1, 3, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    real, both[:1] = torch.cat([pad, torch.ones_like(high)], 1), torch.cat([pad, high], 1)
    both[1] = ~both[0]  # another row, of which fewer are unimportant
    real = torch.cat([real, torch.ones_like(real)])
    rows = [torch.cat([x, torch.randn(1, 2, 9, 8, generator=generator)]) for x in wide]
    for found, wanted in zip(Block.of(*rows, both, bits, real).restored(), whole, strict=True):
        assert torch.equal(found[:1, :, 3:], wanted)
        assert found.isfinite().all()
    nothing = Block.of(*rows, torch.zeros_like(both), bits, torch.zeros_like(real)).restored()
    assert all(x.isfinite().all() for x in nothing)


def test_blocks_keep_the_order():
    """At 16 bits numbers come back as they were, whatever is important; fewer bits take fewer bytes."""
    keys, values = torch.randn(2, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    high = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    real = torch.ones(2, 9, dtype=torch.bool)
    whole = Block.of(keys, values, high, (16, 16), real)
    assert torch.equal(whole.restored()[0], keys)
    assert torch.equal(whole.restored()[1], values)
    small = Block.of(keys, values, high, (8, 2), real)
    assert small.bytes < whole.bytes
    error = (small.restored()[0] - keys).abs().amax((1, 3))  # (B, n)
    assert error[high].max() < error[~high].max() / 4
    swapped = small.rows(lambda x: x[[1, 0]])
    assert torch.equal(swapped.restored()[0], small.restored()[0][[1, 0]])


def squeeze(bits: tuple[int, int], layers: tuple[int, ...] = (0, 1, 2, 3)):
    def station(site, cache) -> None:
        if site.step == 0:
            for layer in layers:
                if site.cuts.loose(layer) is not None:
                    site.cuts.compress(layer, site.cuts.tokens(layer).visual, bits)

    return toy(cache=station, name="squeeze")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_cache_of_sixteen_bits_is_the_plain_one(name, tiny):
    """Through padded decode steps and beams; at few bits it is near, and smaller."""
    host = tiny(name)
    inputs = host.inputs(["Is there a dog?", "How many red cups?"], [[picture()], [picture(80, 64, 1)]])
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        plain = generate(host.model, inputs, **options)
        with sl.attach(host.model, squeeze((16, 16))):
            found = generate(host.model, inputs, **options)
        assert torch.equal(found[0], plain[0])
        assert_close("logits", found[1], plain[1], 1e-5)
    with sl.attach(host.model, squeeze((8, 8))), torch.no_grad():
        cache = host.model(**inputs).past_key_values
        near = generate(host.model, inputs)
    assert_close("eight bits", near[1][:, 1], generate(host.model, inputs)[1][:, 1], 0.1)
    loose = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    held = [layer.nbytes for layer in loose]
    assert all(
        size < 4 * 2 * B * layer.blocks[0].high.shape[1] * 2 * 8 for size, layer in zip(held, loose, strict=True)
    )
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_the_ledger_of_precisions(tiny):
    """Which token is held in how many bits, through compression, later tokens and what was taken out."""
    host, seen = tiny("llava"), []
    inputs = host.inputs(["Is there a dog?", "How many red cups?"], [[picture()], [picture(80, 64, 1)]])

    def station(site, cache) -> None:
        visual = site.cuts.tokens(0).visual
        if site.step == 0:
            site.cuts.evict(0, ~visual | (site.cuts.tokens(0).index % 2 == 0))
            site.cuts.compress(1, visual, (8, 2))
        seen.append((site.cuts.precision(0), site.cuts.precision(1), site.cuts.precision(2)))

    with sl.attach(host.model, toy(cache=station)):
        generate(host.model, inputs, 2)
    visual = inputs["input_ids"] == host.model.config.image_token_id
    for step, (thinned, mixed_bits, plain) in enumerate(seen):
        width = visual.shape[1]
        assert plain.shape == (2, width + step)
        assert (plain == 16).all()
        assert torch.equal(mixed_bits[:, :width], torch.where(visual, 8, 2).to(torch.int8))
        assert (mixed_bits[:, width:] == 16).all()
        assert ((thinned[:, :width] > 0) & visual).sum(1).tolist() == [18, 18]
        real = inputs["attention_mask"].bool() & ~visual
        assert (thinned[:, :width][real] == 16).all()
        assert (thinned[:, width:] == 16).all()


def test_a_compressed_cache_copies_and_repeats():
    cache = DynamicCache()
    cache.update(*torch.randn(2, 2, 2, 9, 8), 0)
    layer = mixed(cache.layers[0])
    real = torch.ones(2, 9, dtype=torch.bool)
    layer.compress(real, (4, 2), real)
    whole = layer.all()[0]
    other = copy.deepcopy(layer)
    other.batch_repeat_interleave(2)
    assert torch.equal(other.all()[0], whole.repeat_interleave(2, 0))
    other.batch_select_indices(torch.tensor([2]))
    assert torch.equal(other.all()[0], whole[1:])
    assert layer.keys.untyped_storage().nbytes() == 0  # nothing as it was is kept behind an empty view
    layer.update(*torch.randn(2, 2, 2, 1, 8))
    assert layer.get_seq_length() == 10
    assert layer.all()[0].shape == (2, 2, 10, 8)
    with pytest.raises(AttachError, match="cannot be cropped"):
        layer.crop(-1)


def test_what_cannot_be_compressed_or_thinned(tiny):
    def compress_all(site, cache):
        for layer in range(4):
            site.cuts.compress(layer, site.cuts.tokens(layer).visual, (4, 2))

    host = tiny("gemma3")
    with sl.attach(host.model, toy(cache=compress_all)), pytest.raises(HostError, match="cannot be compressed"):
        generate(host.model, host.inputs(["A dog?"], [[picture()]]))

    def both(site, cache):
        site.cuts.compress(0, site.cuts.tokens(0).visual, (4, 2))
        site.cuts.evict(0, site.cuts.tokens(0).visual)

    host = tiny("llava")
    with sl.attach(host.model, toy(cache=both)), pytest.raises(HostError, match="quantised"):
        generate(host.model, host.inputs(["A dog?"], [[picture()]]))


def test_only_on_a_host(tiny):
    """All tokens taking part is plain attention; none but text changes the answer."""
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?", "How many red cups?"], [[picture()], [picture(80, 64, 1)]])
    plain = generate(host.model, inputs)[1]

    def every(site):
        return Only(torch.ones(site.tokens.shape, dtype=torch.bool))

    with sl.attach(host.model, toy(attention=every)):
        assert_close("all", generate(host.model, inputs)[1], plain, 2e-5)
    with sl.attach(host.model, toy(attention=lambda site: Only(~site.tokens.visual) if site.prefill else None)):
        assert (generate(host.model, inputs)[1] - plain).abs().max() > 1e-2

"""The fast paths of the attention engine against whole maps, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sightline.engine import attention
from sightline.engine.attention import (
    Call,
    Edit,
    Probe,
    apply_factors,
    attend,
    grouped_attention,
    merge,
    naive_attention,
    row_weights,
)
from tests.engine.numerics import RATIO, Largest, assert_close

B, H, HKV, Q, K, D = 2, 4, 2, 63, 65, 60
MASKS = ("none", "causal", "bool", "bool heads", "additive", "lowest", "holes")


def make_call(mask: str = "none", heads_kv: int = HKV, dtype: torch.dtype = torch.float32, **sizes: int) -> Call:
    """A call of odd sizes; of mask "holes" some rows see no key at all."""
    q, k, d = sizes.get("q", Q), sizes.get("k", K), sizes.get("d", D)
    g = torch.Generator().manual_seed(7)
    query, key, value = (
        torch.randn(B, h, n, d, generator=g).to(dtype).requires_grad_()
        for h, n in ((H, q), (heads_kv, k), (heads_kv, k))
    )
    seen = torch.rand(B, 1, q, k, generator=g) < 0.6
    seen[..., 0] = True
    table = {
        "bool": seen,
        "bool heads": seen & (torch.rand(B, H, q, k, generator=g) < 0.9) | (torch.arange(k) == 0),
        "additive": torch.randn(1, 1, q, k, generator=g).to(dtype),
        "lowest": torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype),
        "holes": seen & (torch.arange(q) % 3 > 0)[:, None],
    }
    return Call(query, key, value, table.get(mask), mask == "causal", d**-0.5)


def sdpa(call: Call) -> tuple[Tensor, None]:
    """The host's kernel, as transformers calls it."""
    output = F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.mask,
        is_causal=call.causal,
        scale=call.scale,
        enable_gqa=call.key.shape[1] != H,
    )
    return output.transpose(1, 2).contiguous(), None


def eager(call: Call) -> tuple[Tensor, Tensor]:
    """A host that returns its weights (`Call.weights`)."""
    return naive_attention(call.query, call.key, call.value, scale=call.scale, mask=call.mask, causal=call.causal)


def whole_map(call: Call, bias: Tensor | None = None) -> Tensor:
    """(B, H, Q, K) fp32 weights by definition; rows without a key are zero."""
    key = call.key.repeat_interleave(H // call.key.shape[1], 1).float()
    scores = call.query.float() @ key.transpose(-1, -2) * call.scale + (0 if bias is None else bias)
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -torch.inf)
    elif call.mask is not None:
        scores = scores + call.mask.float()
    elif call.causal:
        scores = scores.masked_fill(torch.ones(call.queries, call.keys).triu(1).bool(), -torch.inf)
    empty = scores.amax(-1, keepdim=True) <= torch.finfo(torch.float32).min
    return scores.masked_fill(empty, 0.0).softmax(-1) * ~empty


def reference(call: Call, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Output (B, Q, H, D) and weights (B, H, Q, K) of edits, written down on whole maps."""
    bias = torch.zeros(B, H, call.queries, call.keys)
    for e in edits:
        if e.bias is not None:
            full = F.pad(e.bias, (0, call.keys - e.bias.shape[-1])).expand(B, H, -1, -1)
            bias = torch.where(inside(e, call)[:, None, :, None], bias + spread(e, call, full), bias)
    weights = whole_map(call, bias)
    gain = torch.ones(B, call.queries, H, 1)
    for e in edits:
        mine = inside(e, call)  # (B, Q)
        new = weights
        if e.factors is not None:
            groups = F.pad(e.groups, (0, 0, 0, call.keys - e.groups.shape[1]))[:, None]
            factor = e.factors(new @ groups, 0)  # (B, H, Q, G)
            belongs = groups.any(-1).squeeze(1)[:, None, None]
            new = torch.where(belongs, new * (factor @ groups.transpose(-1, -2)), new)
        if e.rewrite is not None:
            new = e.rewrite(new, 0)
        weights = torch.where(mine[:, None, :, None], new, weights)
        if e.gain is not None:
            full = spread(e, call, e.gain[..., None]).expand(B, H, call.queries, 1).transpose(1, 2)
            gain = torch.where(mine[:, :, None, None], gain * full, gain)
    value = call.value.repeat_interleave(H // call.value.shape[1], 1).float()
    return (weights @ value).transpose(1, 2) * gain, weights


def inside(e: Edit, call: Call) -> Tensor:
    """(B, Q) bool: rows that an edit covers."""
    stop = call.queries if e.stop is None else e.stop
    found = torch.zeros(B, call.queries, dtype=torch.bool)
    found[:, e.start : stop] = True if e.rows is None else e.rows
    return found


def spread(e: Edit, call: Call, values: Tensor) -> Tensor:
    """(.., .., stop - start | 1, ..) on all rows of the block, zeros outside."""
    stop = call.queries if e.stop is None else e.stop
    if values.shape[2] == 1:
        values = values.expand(*values.shape[:2], stop - e.start, -1)
    return F.pad(values, (0, 0, e.start, call.queries - stop))


def groups_of(width: int, count: int = 3) -> Tensor:
    """(B, width, count) disjoint groups; every seventh key belongs to none."""
    column = torch.arange(width)
    member = F.one_hot(column % count, count).float() * (column % 7 > 0)[:, None]
    return torch.stack([member, member.roll(1, 0)])


def halve_first(masses: Tensor, first: int) -> Tensor:
    """The first group keeps half, the second gets the rest, row by row; the others stay."""
    freed = masses[..., 0] * 0.5
    given = 1 + freed / masses[..., 1].clamp(min=1e-6)
    return torch.stack([torch.full_like(given, 0.5), given, *[torch.ones_like(given)] * (masses.shape[-1] - 2)], -1)


def sharpen(weights: Tensor, first: int) -> Tensor:
    power = weights**1.5
    return power / power.sum(-1, keepdim=True).clamp(min=1e-9)


def some_rows(start: int, stop: int) -> Tensor:
    return torch.rand(B, stop - start, generator=torch.Generator().manual_seed(3)) < 0.5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


EDITS = {
    "bias": [Edit(bias=draw(1, 1, 1, 40))],
    "bias per row": [Edit(start=5, stop=29, bias=draw(B, H, 24, K))],
    "bias on some rows": [Edit(start=9, rows=some_rows(9, Q), bias=draw(B, 1, Q - 9, K))],
    "hide keys on some rows": [
        Edit(
            start=9, rows=some_rows(9, Q), bias=torch.where(torch.arange(K) % 2 > 0, -torch.inf, 0.0)[None, None, None]
        )
    ],
    "gain": [Edit(start=3, stop=50, gain=draw(1, H, 1))],
    "gain per row": [Edit(start=3, stop=50, gain=draw(B, H, 47), rows=some_rows(3, 50))],
    "factors": [Edit(groups=groups_of(K), factors=halve_first)],
    "factors on fewer keys": [Edit(start=20, groups=groups_of(50, 8), factors=halve_first)],
    "factors on some rows": [Edit(start=7, stop=60, rows=some_rows(7, 60), groups=groups_of(K), factors=halve_first)],
    "rewrite": [Edit(start=11, stop=12, rewrite=sharpen)],
    "rewrite some rows": [Edit(rows=some_rows(0, Q), rewrite=sharpen)],
    "all in one": [
        Edit(
            start=2,
            stop=61,
            rows=some_rows(2, 61),
            bias=draw(B, H, 59, K),
            groups=groups_of(K),
            factors=halve_first,
            rewrite=sharpen,
            gain=draw(B, H, 59),
        )
    ],
    "two biases and a gain": [
        Edit(start=0, stop=20, bias=draw(1, H, 20, K)),
        Edit(start=10, bias=draw(B, 1, 1, 30), gain=draw(1, H, 1)),
    ],
    "overlapping factors": [
        Edit(stop=40, groups=groups_of(K), factors=halve_first),
        Edit(start=30, rows=some_rows(30, Q), groups=groups_of(K, 2), factors=halve_first),
    ],
    "far apart": [
        Edit(stop=4, gain=draw(1, H, 1)),
        Edit(start=50, rewrite=sharpen),
        Edit(start=55, stop=60, bias=draw(1, 1, 1, K)),
    ],
    "nothing": [Edit(start=Q, gain=draw(1, H, 1)), Edit(start=8, stop=8, rewrite=sharpen)],
}


def run(call: Call, edits: Sequence[Edit], host=sdpa, probes: Sequence[Probe] = ()) -> tuple[Tensor, Tensor | None]:
    return attend(call, lambda: host(call), edits, probes)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS.keys())
def test_edits_equal_the_reference_forward_and_backward(edits, mask):
    call = make_call(mask)
    found, _ = run(call, edits)
    wanted, _ = reference(call, edits)
    covered = torch.stack([inside(e, call) for e in edits]).any(0)
    if mask == "holes":  # what the host does with rows that see nothing is the host's business; edited ones are zero
        wanted = torch.where(covered[:, :, None, None], wanted, found.detach())
    assert_close("output", found, wanted)
    plain, _ = sdpa(call)
    assert torch.equal(found[~covered], plain[~covered]), "untouched rows must be the host's, bit for bit"
    weight = draw(*found.shape)
    if mask == "holes":
        weight = weight * covered[:, :, None, None]
    for name, a, b in zip(
        "qkv",
        torch.autograd.grad((found * weight).sum(), (call.query, call.key, call.value)),
        torch.autograd.grad((wanted * weight).sum(), (call.query, call.key, call.value)),
        strict=True,
    ):
        assert_close(f"gradient of {name}", a, b, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["causal", "bool", "lowest", "holes"])
@pytest.mark.parametrize("name", ["bias per row", "hide keys on some rows", "gain", "factors", "all in one"])
def test_edits_in_half_precision(name, mask, dtype):
    call = make_call(mask, dtype=dtype)
    found, _ = run(call, EDITS[name])
    wanted, _ = reference(call, EDITS[name])
    if mask == "holes":
        covered = torch.stack([inside(e, call) for e in EDITS[name]]).any(0)
        wanted = torch.where(covered[:, :, None, None], wanted, found.detach().float())
    assert found.dtype == dtype
    assert_close("output", found, wanted, RATIO[dtype])
    mix = draw(*found.shape)
    if mask == "holes":
        mix = mix * covered[:, :, None, None]
    gradients = torch.autograd.grad((found * mix).sum(), (call.query, call.key, call.value))
    reference_gradients = torch.autograd.grad((wanted * mix).sum(), (call.query, call.key, call.value))
    for name, a, b in zip("qkv", gradients, reference_gradients, strict=True):
        assert_close(f"gradient of {name}", a, b, 3 * RATIO[dtype])


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("name", ["bias", "factors", "all in one"])
def test_grouped_heads(name, heads_kv):
    call = make_call("causal", heads_kv=heads_kv)
    assert_close("output", run(call, EDITS[name])[0], reference(call, EDITS[name])[0])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS.keys())
def test_chunks_change_nothing(edits, rows, monkeypatch):
    call = make_call("bool")
    whole = run(call, edits)[0]
    firsts = []
    probe = Probe(lambda w, first: firsts.append((first, w.shape[2])))
    monkeypatch.setattr(attention, "CHUNK_BYTES", 4 * B * H * K * rows)
    assert_close("output", run(call, edits)[0], whole, 1e-6)
    run(call, edits, probes=[probe])
    assert firsts == [(a, min(rows, Q - a)) for a in range(0, Q, rows)], "the chunking was not exercised"


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize(
    "edit",
    [
        Edit(gain=draw(1, H, 1)),
        Edit(bias=draw(1, H, 1, K)),
        Edit(groups=groups_of(K), factors=halve_first),
        Edit(rewrite=sharpen),
        Edit(rows=torch.tensor([[True], [False]]), rewrite=sharpen),
        Edit(groups=groups_of(K), factors=halve_first, bias=draw(1, 1, 1, K), gain=draw(B, H, 1)),
    ],
    ids=["gain", "bias", "factors", "rewrite", "one row", "all"],
)
@pytest.mark.parametrize("host", [sdpa, eager])
def test_one_new_token(edit, mask, host):
    """Decoding: one query, where the host's kernel need not run at all."""
    call = replace(make_call(mask, q=1), weights=host is eager)
    found, weights = run(call, [edit], host)
    wanted, wanted_weights = reference(call, [edit])
    assert_close("output", found, wanted)
    if host is eager:
        assert_close("weights", weights, wanted_weights)


@pytest.mark.parametrize("mask", MASKS[:-1])
def test_a_host_that_returns_weights_shows_the_edited_ones(mask):
    call = make_call(mask)
    edits = EDITS["factors on some rows"]
    output, weights = run(call, edits, eager)
    wanted, wanted_weights = reference(call, edits)
    assert_close("output", output, wanted)
    assert_close("weights", weights, wanted_weights)
    assert (eager(call)[1] - weights).abs().max() > 1e-3
    torch.autograd.grad(output.square().sum(), call.query)  # the host saved its own weights for the backward pass


@pytest.mark.parametrize("name", ["bias", "gain", "two biases and a gain"])
def test_weights_after_bias_and_gain(name):
    """A bias shows in the weights that a host returns; a gain acts behind them."""
    call = make_call("bool")
    _, weights = run(call, EDITS[name], eager)
    assert_close("weights", weights, reference(call, EDITS[name])[1])


def test_a_gain_that_is_learnt_gets_its_gradient():
    call = make_call("causal")
    gain = draw(1, H, 1).requires_grad_()
    output, _ = run(call, [Edit(start=4, gain=gain)])
    wanted, _ = reference(call, [Edit(start=4, gain=gain)])
    for found, right in zip(*(torch.autograd.grad(o.square().sum(), gain) for o in (output, wanted)), strict=True):
        assert_close("gradient of the gain", found, right)


def test_a_function_of_outputs_reaches_its_rows_only():
    """In the rows of `start` ... `stop` that are chosen, and behind a gain of an edit given later."""
    call = make_call("causal")
    rows = some_rows(7, 30)
    edits = [
        Edit(start=7, stop=30, rows=rows, after=lambda outputs, first: 2 * outputs + first),
        Edit(gain=draw(1, H, 1)),
    ]
    output, _ = run(call, edits)
    gained, _ = run(call, edits[1:])
    wanted = gained.clone()
    wanted[:, 7:30][rows] = 2 * gained[:, 7:30][rows] + 7
    assert rows.any()
    assert not rows.all()
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_probes_see_the_final_weights(mask):
    call = make_call(mask)
    seen = torch.full((B, H, Q, K), torch.nan)

    def see(weights: Tensor, first: int) -> None:
        seen[:, :, first : first + weights.shape[2]] = weights

    with torch.no_grad():
        run(call, EDITS["factors"], probes=[Probe(see)])
        _, weights = reference(call, EDITS["factors"])
    assert_close("weights", seen, weights)
    total = seen.sum(-1)
    sees = whole_map(call).any(-1)
    assert torch.allclose(total[sees], torch.ones(()), atol=1e-5)
    assert (total[~sees] == 0).all()


def test_probes_change_nothing():
    call = make_call("bool")
    spans = []
    probes = [Probe(lambda w, first: spans.append((first, w.shape[2])), 60), Probe(lambda w, _: None, 1, 2)]
    output, weights = run(call, [], probes=probes)
    assert torch.equal(output, sdpa(call)[0])
    assert weights is None
    assert spans == [(60, 3)]
    for name in ("bias", "gain"):  # the cheap paths of an edit give way to a probe, and say the same
        assert_close(name, run(call, EDITS[name], probes=probes)[0], run(call, EDITS[name])[0])


@pytest.mark.parametrize("name", [n for n in EDITS if n != "nothing"])
def test_every_edit_here_edits(name):
    call = make_call("bool")
    assert (run(call, EDITS[name])[0] - sdpa(call)[0]).abs().max() > 1e-2


# -- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("span", [(0, Q), (17, 18), (40, Q)])
def test_row_weights(mask, span):
    call = make_call(mask)
    found = row_weights(call, *span)
    assert_close("rows", found, whole_map(call)[:, :, span[0] : span[1]])
    bias = draw(B, 1, span[1] - span[0], K)
    whole = F.pad(bias, (0, 0, span[0], Q - span[1]))
    assert_close("rows", row_weights(call, *span, bias), whole_map(call, whole)[:, :, span[0] : span[1]])


def test_row_weights_of_rows_that_see_nothing_are_zero():
    call = make_call("holes")
    rows = row_weights(call, 0, Q)
    empty = ~call.mask.any(-1)[:, 0]  # (B, Q)
    assert empty.any()
    assert (rows.transpose(1, 2)[empty] == 0).all()
    hidden = row_weights(make_call(), 0, Q, torch.full((1, 1, 1, K), -torch.inf))
    assert (hidden == 0).all()


@pytest.mark.parametrize("d", [64, 128, 80])
def test_large_logits_in_fp16(d):
    """q k^T beyond 65504 overflows fp16 before the scale makes it small (Qwen2's keys do that); SDPA stands it."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, d, generator=g) + 40 for n in (3, 5))
    assert (query @ key.transpose(-1, -2)).min() > 65504
    call = Call(query.half(), key.half(), key.half(), None, False, d**-0.5)
    rows = row_weights(call, 0, 3)
    assert rows.isfinite().all()
    assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5)


def test_naive_attention_is_torchs():
    """The reference itself is checked against another implementation."""
    for mask, heads_kv in itertools.product(("none", "causal", "bool", "additive"), (1, 2, 4)):
        call = make_call(mask, heads_kv=heads_kv)
        assert_close(mask, eager(call)[0], sdpa(call)[0])
        assert_close(mask, eager(call)[1], whole_map(call))


# -- factors ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), st.integers(0, 2**16))
def test_factors_scale_exactly_their_groups(keys, width, count, seed):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(2, 3, 4, keys, generator=g).softmax(-1)
    owner = torch.randint(-1, count, (2, width), generator=g)
    groups = F.one_hot(owner + 1, count + 1)[..., 1:].float()
    scale = torch.rand(2, 3, 4, count, generator=g) * 3
    seen = []

    def factors(masses: Tensor, first: int) -> Tensor:
        seen.append((masses, first))
        return scale

    found = apply_factors(weights, groups, factors, 11)
    for b, j in itertools.product(range(2), range(keys)):
        mine = int(owner[b, j]) if j < width else -1
        wanted = weights[b, :, :, j] * (scale[b, :, :, mine] if mine >= 0 else 1)
        assert torch.allclose(found[b, :, :, j], wanted, atol=1e-6)
        assert mine >= 0 or torch.equal(found[b, :, :, j], weights[b, :, :, j])
    masses, first = seen[0]
    inside = min(width, keys)
    assert torch.allclose(masses, torch.einsum("bhrk,bkg->bhrg", weights[..., :inside], groups[:, :inside]), atol=1e-6)
    assert first == 11


def test_factors_backward():
    weights = torch.rand(B, H, 5, K).softmax(-1).requires_grad_()
    groups = groups_of(40)
    found = apply_factors(weights, groups, halve_first)
    full = F.pad(groups, (0, 0, 0, K - 40))[:, None]
    factor = halve_first(weights @ full, 0)
    wanted = weights * (factor @ full.transpose(-1, -2) + 1 - full.sum(-1)[:, :, None])
    assert_close("weights", found, wanted)
    mix = draw(*found.shape)
    grads = [torch.autograd.grad((x * mix).sum(), weights)[0] for x in (found, wanted)]
    assert_close("gradient", *grads)


# -- grouped attention and merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(RATIO))
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize(("heads_kv", "count"), [(4, 3), (2, 8), (1, 9)])
def test_grouped_attention_forward_and_backward(mask, heads_kv, count, dtype):
    call = make_call(mask, heads_kv=heads_kv, dtype=dtype)
    groups = (torch.rand(B, K, count, generator=torch.Generator().manual_seed(1)) < 0.4).float()  # overlapping
    output, masses = grouped_attention(
        call.query, call.key, call.value, groups, scale=call.scale, mask=call.mask, causal=call.causal
    )
    wanted, weights = eager(call)
    assert output.dtype == masses.dtype == dtype
    assert_close("output", output, wanted, RATIO[dtype])
    assert_close("masses", masses, weights @ groups[:, None], RATIO[dtype])
    inputs = (call.query, call.key, call.value)
    mixes = draw(*output.shape), draw(*masses.shape)
    found = torch.autograd.grad((output.float() * mixes[0]).sum() + (masses.float() * mixes[1]).sum(), inputs)
    right = torch.autograd.grad(
        (wanted * mixes[0]).sum() + (weights @ groups[:, None] * mixes[1]).sum(),
        inputs,
    )
    for name, a, b in zip("qkv", found, right, strict=True):
        assert_close(f"gradient of {name}", a, b, 3 * RATIO[dtype])


def test_masses_of_a_partition_sum_to_one():
    call = make_call("causal")
    groups = F.one_hot(torch.arange(K) % 5, 5).float().expand(B, -1, -1)
    _, masses = grouped_attention(call.query, call.key, call.value, groups, scale=call.scale, causal=True)
    assert torch.allclose(masses.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 30, K])
def test_merge_equals_attention_over_the_union(cut):
    call = make_call("none", heads_kv=H)
    scores = call.query @ call.key.transpose(-1, -2) * call.scale

    def over(part: slice) -> tuple[Tensor, Tensor]:
        s = scores[..., part]
        return s.softmax(-1) @ call.value[:, :, part], s.logsumexp(-1)

    output, lse = merge(*over(slice(0, cut)), *over(slice(cut, K)))
    wanted, whole = over(slice(0, K))
    assert_close("output", output, wanted)
    assert_close("lse", lse, whole)
    inputs = (call.query, call.key, call.value)
    found = torch.autograd.grad(output.square().sum() + lse.sum(), inputs, retain_graph=True)
    right = torch.autograd.grad(wanted.square().sum() + whole.sum(), inputs)
    for name, a, b in zip("qkv", found, right, strict=True):
        assert_close(f"gradient of {name}", a, b, 2e-5)


def test_merge_of_nothing_with_nothing_is_nothing():
    none = torch.full((3,), -torch.inf)
    output, lse = merge(torch.zeros(3, 4), none, torch.zeros(3, 4), none)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    half = merge(torch.ones(3, 4).half(), torch.zeros(3).half(), torch.zeros(3, 4).half(), none.half())
    assert half[0].dtype == half[1].dtype == torch.float32
    assert torch.equal(half[0], torch.ones(3, 4))


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["factors", "all in one", "probe", "grouped", "bias"])
def test_no_n_by_n(name, monkeypatch):
    """Not one tensor as large as a single head's map appears, though every row is edited or seen."""
    n = 1024
    monkeypatch.setattr(attention, "CHUNK_BYTES", 256 << 10)
    call = make_call("causal", q=n, k=n, d=8)
    call = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
    groups = groups_of(n)
    edit = {
        "factors": [Edit(groups=groups, factors=halve_first)],
        "all in one": [Edit(groups=groups, factors=halve_first, rewrite=sharpen, bias=draw(1, 1, 1, n), gain=draw(1, H, 1))],
        "bias": [Edit(bias=draw(B, H, 1, n))],
    }  # fmt: skip
    with Largest() as seen:
        if name == "grouped":
            grouped_attention(call.query, call.key, call.value, groups, scale=call.scale, causal=True)
        elif name == "probe":
            run(call, [], probes=[Probe(lambda w, _: None)])
        else:
            run(call, edit[name])
    assert B * H * n < seen.numel < n * n, seen.where


def test_largest_would_see_a_whole_map():
    call = make_call("causal", q=256, k=256, d=8)
    with Largest() as seen:
        eager(call)
    assert seen.numel >= B * H * 256 * 256

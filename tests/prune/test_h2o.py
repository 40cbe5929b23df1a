"""H2O: its choice against the plain rule, generation against masks by definition, sizes, heads of their own, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import sightline as sl
from sightline.engine.attention import Edit, Probe, apply_factors
from sightline.engine.depth import Held, spread
from sightline.engine.seats import _on_held
from sightline.engine.sequences import made_cache
from sightline.engine.system import System
from sightline.errors import AttachError, HostError, InputError, ParameterError
from sightline.mix.sinklora import heavy_hitters
from sightline.prune.h2o import H2O, kept
from sightline.prune.zipvl import ZipVL
from tests.engine.numerics import assert_close
from tests.engine.whole import generate
from tests.tiny_hosts import picture

QUESTIONS, PICTURES = ["Is there a dog?", "How many red cups are on the table?"], [picture(), picture(80, 64, 1)]
NAME = "h2o_by_definition"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 14), st.integers(0, 6), st.integers(1, 6), st.integers(0, 5))
def test_the_choice(seed, tokens, heavy, recent, pad) -> None:
    """That of `mix.sinklora.heavy_hitters`, whatever padding stands before."""
    scores = torch.randint(0, 4, (1, 2, tokens), generator=torch.Generator().manual_seed(seed)).float()  # with ties
    wanted = torch.zeros(1, 2, tokens, dtype=torch.bool).scatter(2, heavy_hitters(scores, heavy, recent), True)
    real = F.pad(torch.ones(1, tokens, dtype=torch.bool), (pad, 0))
    found = kept(F.pad(scores, (pad, 0)), real, torch.tensor([heavy]), torch.tensor([recent]))
    assert torch.equal(found, F.pad(wanted, (pad, 0)))


def test_dropped_tokens_never_return_and_heads_keep_as_many() -> None:
    scores = torch.tensor([[[-torch.inf, 1.0, 2.0, 0.0], [1.0, -torch.inf, 2.0, 0.0]]])
    found = kept(scores, torch.ones(1, 4, dtype=torch.bool), torch.tensor([0]), torch.tensor([3]))
    assert found.tolist() == [[[False, True, True, True], [True, False, True, True]]]


def by_definition(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention under a mask of what every head dropped, which grows by the rule, token by token."""
    heads_kv, share = key.shape[1], query.shape[1] // key.shape[1]
    wide_k, wide_v = (x.repeat_interleave(share, 1) for x in (key, value))
    total = key.shape[2]
    seen = torch.ones(query.shape[2], total).tril(total - query.shape[2]).bool()
    seen = seen[None, None].expand(key.shape[0], 1, -1, -1)
    if attention_mask is not None:
        seen = seen & attention_mask[..., :total]
    real = seen[:, 0, -1]  # (B, N), as the last token sees it
    if query.shape[2] > 1:
        module.dropped = torch.zeros(*key.shape[:3], dtype=torch.bool)
        module.sums = torch.zeros(*key.shape[:3])
        module.first = real.sum(1)
    grown = total - module.dropped.shape[2]
    module.dropped, module.sums = F.pad(module.dropped, (0, grown)), F.pad(module.sums, (0, grown))
    allowed = seen & ~module.dropped.repeat_interleave(share, 1)[:, :, None]
    scores = (query @ wide_k.mT * scaling).masked_fill(~allowed, -torch.inf)
    weights = scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0).softmax(-1)
    for row in range(key.shape[0]):
        asking = weights[row][:, real[row, -query.shape[2] :]]
        heavy, recent = (int(share * module.first[row]) for share in module.shares)
        for head in range(heads_kv):
            module.sums[row, head] += asking[head * share : (head + 1) * share].sum((0, 1))
            held = [j for j in range(total) if real[row, j] and not module.dropped[row, head, j]]
            old = held[: len(held) - max(recent, 1)]
            best = sorted(old, key=lambda j: (-float(module.sums[row, head, j]), j))[:heavy]
            for j in set(old) - set(best):
                module.dropped[row, head, j] = True
    return (weights @ wide_v).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, by_definition)
AttentionMaskInterface.register(NAME, sdpa_mask)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_generation_is_that_of_the_definition(name, tiny) -> None:
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    model = copy.deepcopy(host.model)
    model.set_attn_implementation({"text_config": NAME})
    for module in model.modules():
        module.shares = (0.2, 0.1)
    wanted = generate(model, inputs, 6)
    with sl.attach(host.model, H2O(0.2, 0.1)) as attached:
        found = generate(host.model, inputs, 6)
    assert torch.equal(found[0], wanted[0])
    assert_close(name, found[1], wanted[1], 1e-4)
    assert (found[1] - generate(host.model, inputs, 6)[1]).abs().max() > 1e-3
    assert max(attached.report()["h2o"]["cached_tokens_per_head"]) < inputs["input_ids"].shape[1] // 3


def test_sizes_and_heads(tiny) -> None:
    """After the prompt and after every token each head holds its budget, not the same tokens; the cache says the whole length."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    length, sizes, last = inputs["input_ids"].shape[1], [], []
    plain = made_cache(host.model(**inputs))

    def look(module, args, output):
        last[:] = [made_cache(output)]
        sizes.append({layer.keys.shape[2] for layer in last[0].layers})

    with sl.attach(host.model, H2O(0.2, 0.1)):
        hook = host.model.register_forward_hook(look)
        generate(host.model, inputs, 5)
        host.model(**inputs)
        hook.remove()
    assert sizes == [{int(0.2 * length) + int(0.1 * length)}] * 6
    assert last[0].get_seq_length() == length
    held = [
        (own.keys[0, :, :, None] - layer.keys[0, :, None]).abs().amax(-1).argmin(1)  # (Hkv, k) columns
        for own, layer in zip(plain.layers, last[0].layers, strict=True)
    ]
    assert all((columns.diff() > 0).all() for columns in held)
    assert any((columns[0] != columns[1]).any() for columns in held)
    with sl.attach(host.model, H2O(0.0, 0.1)):  # heavy = 0: the window
        keys = made_cache(host.model(**inputs)).layers[0].keys
    assert torch.equal(keys, plain.layers[0].keys[:, :, length - int(0.1 * length) :])


def test_a_later_question(tiny) -> None:
    """A second prompt in the same cache: budgets grow with the text, dropped tokens stay away, heads hold as many."""
    host = tiny("llava")
    first = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    with torch.no_grad(), sl.attach(host.model, H2O(0.2, 0.3)):
        cache = made_cache(host.model(**first))
        more = torch.randint(300, 310, (2, 40), generator=torch.Generator().manual_seed(0))
        mask = F.pad(first["attention_mask"], (0, 40), value=1)
        out = host.model(input_ids=more, attention_mask=mask, past_key_values=cache)
        step = host.model(input_ids=more[:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
        keys = cache.layers[1].keys
        # row 1 alone: the same
        alone = host.inputs(QUESTIONS[1:], [PICTURES[1:]])
        own = made_cache(host.model(**alone))
        mask = F.pad(alone["attention_mask"], (0, 40), value=1)
        second = host.model(input_ids=more[1:], attention_mask=mask, past_key_values=own)
        third = host.model(input_ids=more[1:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=own)
    assert_close("second prompt", out.logits[1:], second.logits, 1e-4)
    assert_close("token", step.logits[1:], third.logits, 1e-4)
    assert keys.shape[2] >= own.layers[1].keys.shape[2]


def test_edits_where_heads_hold_different_tokens() -> None:
    """Group factors, biases and what is seen count the ledger's columns, head by head."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.tensor([[[0, 2, 5], [1, 2, 3]]])  # of 2 key heads
    held, weights = Held(heads[:, 0], 6, False, heads), torch.rand(1, 4, 1, 4, generator=generator)  # and one new token
    groups = torch.zeros(1, 7, 1)
    groups[0, [1, 2, 5]] = 1

    def factors(masses, first):
        return 2 * masses

    edit = _on_held(Edit(groups=groups, factors=factors, bias=torch.arange(7.0)[None, None, None]), held, 7, 4)
    full = spread(weights, held.of_heads(7), 7)
    assert full[0, 3, 0].tolist() == [0, *weights[0, 3, 0, :3].tolist(), 0, 0, float(weights[0, 3, 0, 3])]
    assert edit.bias[0, :, 0].tolist() == [[0, 2, 5, 6], [0, 2, 5, 6], [1, 2, 3, 6], [1, 2, 3, 6]]
    wanted = apply_factors(full, groups, factors)
    assert torch.allclose(spread(edit.rewrite(weights, 0), held.of_heads(7), 7), wanted)
    seen = []
    _on_held(Probe(lambda w, first: seen.append(w)), held, 7, 4).see(weights, 0)
    assert torch.equal(seen[0], full)


def test_what_is_refused(tiny) -> None:
    with pytest.raises(ParameterError, match="heavy"):
        H2O(heavy=1.5)
    host = tiny("llava")
    with pytest.raises(AttachError, match="cannot run together"):
        sl.attach(host.model, H2O(), ZipVL())
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])

    class Uneven(System):
        def cache(self, site, cache):
            keep = torch.ones(1, cache.layers[0].keys.shape[1], site.tokens.shape[1], dtype=torch.bool)
            keep[:, 0, 3] = False
            site.cuts.evict(0, keep)

    with sl.attach(host.model, Uneven()), pytest.raises(InputError, match="different numbers"):
        host.model(**inputs)
    window = tiny("gemma3")

    class Everywhere(System):
        def cache(self, site, cache):
            for layer in range(site.layers):
                shape = 1, cache.layers[layer].keys.shape[1], site.cuts.tokens(layer).shape[1]
                site.cuts.evict(layer, torch.ones(shape, dtype=torch.bool))

    with sl.attach(window.model, Everywhere()), pytest.raises(HostError, match="sliding window"):
        window.model(**window.inputs(QUESTIONS[:1], [PICTURES[:1]]))

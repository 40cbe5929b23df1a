"""Cuts before the decoder: the prompt that is left, on every host, against the host given the shorter prompt itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sightline as sl
from sightline.engine.pictures import columns_of, keep_visual
from sightline.engine.select import Keep, columns, take
from sightline.engine.tokens import Role
from sightline.errors import HostError, InputError, ParameterError
from tests.engine.numerics import assert_close
from tests.engine.toys import toy
from tests.engine.whole import forward, generate
from tests.tiny_hosts import TINY, picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
CLOSE = 2e-5
everywhere = pytest.mark.parametrize("name", TINY)


def batch(host):
    return host.inputs(QUESTIONS, [[picture()], [picture(80, 64, 1)]])


def every(step: int, positions: str = "renumber", seen: list | None = None):
    """Keeps every `step`-th visual token, and half of those of the last picture."""

    def visual_tokens(site, embeddings):
        places = site.pictures.places
        order = torch.arange(len(places.real))
        chosen = (order % step == 0) & ((order % 2 == 0) | (places.image < places.image.max()))
        if seen is not None:
            seen.append((site, places))
        return keep_visual(site, chosen, positions)

    return toy(visual_tokens=visual_tokens)


def test_llava_with_fewer_tokens_is_llava_with_a_shorter_prompt(tiny):
    """The host's own door for encoded pictures is the oracle: ragged rows, logits, cache, and tokens alike."""
    host = tiny("llava")
    inputs = batch(host)
    with sl.attach(host.model, every(3)), torch.no_grad():
        found = host.model(**inputs, use_cache=True)
        ids, logits = generate(host.model, inputs)
    with torch.no_grad():
        encoded = host.model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    order = torch.arange(36)
    chosen = [order[order % 3 == 0], order[order % 6 == 0]]
    encoded.pooler_output = [x[c] for x, c in zip(encoded.pooler_output, chosen, strict=True)]
    stay = inputs["attention_mask"].bool()
    visual = inputs["input_ids"] == host.model.config.image_token_id
    stay[visual] = torch.cat([order % 3 == 0, order % 6 == 0])
    index = columns(stay)
    short = {
        "input_ids": take(inputs["input_ids"], index, fill=host.processor.tokenizer.pad_token_id),
        "attention_mask": (index >= 0).long(),
    }
    with torch.no_grad():
        wanted = host.model(**short, mm_encoder_outputs={"image": encoded}, use_cache=True)
    assert found.logits.shape[1] == inputs["input_ids"].shape[1]  # the caller's length
    for row in range(2):
        real = index[row] >= 0
        assert_close("logits", found.logits[row][index[row][real]], wanted.logits[row][real], 1e-6)
    assert_close("cache", found.cache.layers[2].keys, wanted.cache.layers[2].keys, 1e-6)
    wanted_ids, wanted_logits = generate(host.model, {**short, "mm_encoder_outputs": {"image": encoded}})
    assert torch.equal(ids[:, -5:], wanted_ids[:, -5:])
    assert_close("steps", logits, wanted_logits, 1e-6)


@everywhere
@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_with_and_without_a_cache(name, positions, tiny):
    """Masks, positions and windows of later forwards are those of one forward over everything."""
    host = tiny(name)
    with sl.attach(host.model, every(3, positions)):
        ids, logits = generate(host.model, batch(host))
        again, wanted = generate(host.model, batch(host), use_cache=False)
        once = forward(host.model, batch(host))
    assert torch.equal(ids, again)
    assert_close("steps", logits, wanted, CLOSE)
    assert_close("the last position", once[:, -1], logits[:, 0], CLOSE)


@everywhere
def test_dropping_nothing_is_the_host_bit_for_bit(name, tiny):
    host = tiny(name)
    everything = toy(visual_tokens=lambda site, x: Keep(torch.ones(x.shape[:2], dtype=torch.bool)))
    plain = generate(host.model, batch(host))
    with sl.attach(host.model, everything):
        found = generate(host.model, batch(host))
    assert torch.equal(found[1], plain[1])


@everywhere
def test_the_ledger_says_what_is_left(name, tiny):
    """Cache lengths, original columns and the patches behind every token."""
    host = tiny(name)
    inputs, seen = batch(host), []
    with sl.attach(host.model, every(4, seen=seen)), torch.no_grad():
        cache = host.model(**inputs, use_cache=True).cache
    site, places = seen[0]
    tokens = cache._sightline.tokens
    assert all(layer.keys.shape[2] in (tokens.shape[1], 15) for layer in cache.layers)  # 15: a window's cache
    kept = tokens.position[tokens.role != int(Role.PAD)]
    rows = (tokens.role != int(Role.PAD)).nonzero()[:, 0]
    ids = inputs["input_ids"][rows, kept.long()]
    image = host.model.config.image_token_id
    assert torch.equal(ids == image, tokens.visual[tokens.role != int(Role.PAD)])
    assert int((ids != image).sum()) == int(((inputs["input_ids"] != image) & inputs["attention_mask"].bool()).sum())
    assert site.tokens.visual.sum() == len(places.real) == (inputs["input_ids"] == image).sum()
    assert (places.row >= 0).any(1).eq(places.real).all()
    pairs = torch.stack([places.row, places.patch], -1)[places.row >= 0]
    assert len(set(map(tuple, pairs.tolist()))) == len(pairs) or name == "llava_onevision"  # shrunk grids share patches


@everywhere
def test_layouts_without_a_processor_are_those_with_one(name, tiny):
    """What the arguments of the encoding tell about crops, cells and patches is what the processor tells."""
    from sightline.hosts import layouts

    host = tiny(name)
    inputs, seen = batch(host), []
    with sl.attach(host.model, every(4, seen=seen)):
        forward(host.model, inputs)
    wanted = layouts(host.model, host.processor, inputs, [(64, 48), (80, 64)])
    found = seen[0][1].layouts
    assert np.concatenate([np.concatenate([x.cell for x in found])]).tolist() == [
        cell for layout in wanted for cell in layout.cell.tolist()
    ]
    assert [p for layout in found for p in layout.patches] == [p for layout in wanted for p in layout.patches]


def test_labels_and_losses_keep_their_length(tiny):
    """A dropped position repeats the state before it, so that the first word behind a picture is still predicted."""
    host = tiny("llava")
    inputs = batch(host)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == host.model.config.image_token_id, -100)
    with sl.attach(host.model, every(3)):
        out = host.model(**inputs, labels=labels, use_cache=False)
        out.loss.backward()
    assert torch.isfinite(out.loss)
    visual = (inputs["input_ids"] == host.model.config.image_token_id)[0].nonzero().flatten()
    assert torch.equal(out.logits[0, visual[-1]], out.logits[0, visual[33]])  # the last kept of 36 is number 33
    host.model.zero_grad()


def test_two_cuts_one_after_the_other(tiny):
    host = tiny("llava")
    first, second = every(2), every(3)
    seen: list = []

    def halve(site, x):
        seen.append(site.tokens.visual.sum(1).tolist())
        return Keep(~site.tokens.visual | (site.tokens.index % 4 == 0))

    with sl.attach(host.model, first, toy(visual_tokens=halve)):
        logits = forward(host.model, batch(host))
    assert seen == [[18, 18]]
    with sl.attach(host.model, toy(visual_tokens=lambda s, x: Keep(~s.tokens.visual | (s.tokens.index % 4 == 0)))):
        assert_close("logits", forward(host.model, batch(host)), logits, CLOSE)
    assert second is not first


def test_a_second_picture_later(tiny):
    """A later block with a picture of its own is cut too; what came before keeps its places."""
    host = tiny("llava")
    one = host.inputs(["Is there a dog?"], [[picture()]])
    two = host.inputs(["And there?"], [[picture(80, 64, 1)]])
    joined = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
        "attention_mask": torch.cat([one["attention_mask"], two["attention_mask"]], 1),
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
    }
    first = toy(
        visual_tokens=lambda s, x: Keep(~s.tokens.visual[:, s.start :] | (s.tokens.index[:, s.start :] % 3 == 0))
    )
    with sl.attach(host.model, first), torch.no_grad():
        wanted = host.model(**joined, use_cache=False).logits
        cache = host.model(**one, use_cache=True).cache
        later = {**two, "attention_mask": joined["attention_mask"]}
        found = host.model(**later, cache=cache, use_cache=True).logits
    assert_close("the second block", found, wanted[:, -found.shape[1] :], CLOSE)


def test_a_second_question_without_a_picture(tiny):
    """Nothing is cut from it, and the shortened prompt is still counted right."""
    host = tiny("llava")
    one = host.inputs(["Is there a dog?"], [[picture()]])
    text = host.inputs(["And there?"])
    joined = {k: torch.cat([one[k], text[k]], 1) for k in ("input_ids", "attention_mask")}
    with sl.attach(host.model, every(3)), torch.no_grad():
        wanted = host.model(**joined, pixel_values=one["pixel_values"], use_cache=False).logits
        cache = host.model(**one, use_cache=True).cache
        later = {"input_ids": text["input_ids"], "attention_mask": joined["attention_mask"]}
        found = host.model(**later, cache=cache, use_cache=True).logits
    assert_close("the second question", found, wanted[:, -found.shape[1] :], CLOSE)


def test_what_cannot_be_cut_says_so(tiny):
    host = tiny("llava")
    with sl.attach(host.model, every(3)):
        with pytest.raises(HostError, match="StaticCache has a fixed shape"):
            generate(host.model, batch(host), cache_implementation="static")
        with pytest.raises(ParameterError, match="in one piece: leave it out"):
            generate(host.model, batch(host), prefill_chunk_size=16)
    assert "get_image_features" not in host.model.model.__dict__
    assert columns_of(2, torch.tensor([[True, False], [True, False]])).tolist() == [0, 1]
    repeated = torch.tensor([[True, True, False]] * 2 + [[True, False, False]] * 2)
    assert columns_of(3, repeated).tolist() == [0, 1, 0, 1, 2, 2]
    with pytest.raises(InputError, match="4 image tokens in this block of the prompt, 2 were encoded"):
        columns_of(2, torch.tensor([[True, True, False], [True, False, False], [True, False, False]]))  # no repetition


# -- inside the tower -------------------------------------------------------------------------------------------------------


def shrinking(kept: list | None = None):
    """Drops every other patch after tower layer 0, and those tokens before the decoder."""

    def vision_hidden(site, hidden):
        if site.layer == 1:
            return Keep((torch.arange(hidden.shape[1]) % 2 == 0).expand(hidden.shape[:2]))
        return None

    def visual_tokens(site, embeddings):
        alive = site.pictures.alive[-1]
        if kept is not None:
            kept.append(alive)
        there = torch.zeros(site.pictures.tower, dtype=torch.bool).scatter(1, alive, True)[:, 1:]
        return keep_visual(site, site.pictures.places.pool(there) > 0)

    return toy(vision_hidden=vision_hidden, visual_tokens=visual_tokens)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_tower_may_run_fewer_tokens(name, tiny):
    """Those left are what the tower gives when only they are there."""
    host = tiny(name)
    inputs, kept, lengths = batch(host), [], []
    tower = host.model.model.vision_tower
    with sl.attach(host.model, shrinking(kept)):
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, a, k: lengths.append((a[0] if a else k["hidden_states"]).shape[1]), with_kwargs=True
            )
            for layer in tower.encoder.layers
        ]
        forward(host.model, inputs)
        for hook in hooks:
            hook.remove()
    assert lengths[0] == kept[0].shape[1] * 2 - 1
    assert lengths[1:] == [kept[0].shape[1]] * (len(lengths) - 1)
    with sl.attach(host.model, shrinking()):
        ids, logits = generate(host.model, inputs)
        for row in range(2):
            alone = host.inputs([QUESTIONS[row]], [[[picture()], [picture(80, 64, 1)]][row]])
            one, steps = generate(host.model, alone)
            assert torch.equal(ids[row, -5:], one[0, -5:])
            assert_close("row", logits[row], steps[0], CLOSE)


def test_towers_of_which_several_layers_are_used_refuse_cuts(tiny):
    host = tiny("qwen3_vl")
    cut = toy(vision_hidden=lambda site, x: Keep(torch.ones(x.shape[:2], dtype=torch.bool)))
    with sl.attach(host.model, cut, every(1)), pytest.raises(HostError, match="several layers of this vision tower"):
        forward(host.model, batch(host))

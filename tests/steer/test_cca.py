"""CCA: golden arrays of the official code, the rings' symmetries, and plain hosts told positions and mask by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sightline as sl
from sightline.errors import InputError, SightlineWarning
from sightline.steer.cca import (
    CCA,
    block_of,
    concentric_mask,
    concentric_positions,
    next_position,
    ring_map,
    rings,
)
from tests.engine.numerics import assert_close
from tests.engine.toys import toy
from tests.engine.whole import extended, forward, generate
from tests.steer.goldens import cases, load
from tests.tiny_hosts import TINY, picture

ON = CCA(trained=True)
QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


def rotated(x: torch.Tensor, places: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding, half-split: x (B, H, S, D) at integer places (1, S)."""
    half = x.shape[-1] // 2
    angle = places[:, None, :, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@cases("cca")
def test_golden(path) -> None:
    case = load(path)
    rows, columns = case["ring_map"].shape
    length, begin = case["seq_len"], case["image_begin"]
    assert torch.equal(ring_map(rows, columns), case["ring_map"])
    places, allowed = concentric_positions(length, begin, rows, columns), concentric_mask(length, begin, rows, columns)
    assert torch.equal(places[None], case["position_ids"])
    if "next_decode_position" in case:
        assert next_position(length, rows, columns) == int(case["next_decode_position"])
    if "allowed" in case:
        assert torch.equal(allowed, case["allowed"])
    else:
        assert np.array_equal(np.packbits(allowed.numpy(), axis=-1), case["allowed_packed"].numpy())
    if "out" in case:
        q, k = (rotated(case[n], places[None], case["rope_theta"]) for n in "qk")
        out = F.scaled_dot_product_attention(q, k, case["v"], attn_mask=allowed)
        assert (out - case["out"]).abs().max() <= 2e-6


@pytest.mark.parametrize(("n", "pairs"), [(2, 16), (4, 12 * 16 + 16 * 4 - 48), (5, None), (24, None)])
def test_rings_of_a_square(n: int, pairs: int | None) -> None:
    ring = ring_map(n, n)
    for turned in (ring.T, ring.flip(0), ring.flip(1), ring.rot90()):
        assert torch.equal(turned, ring)
    assert int(ring.max()) + 1 == rings(n, n)
    sizes = ring.flatten().bincount()
    wanted = [4 * (n - 1 - 2 * r) or 1 for r in range(rings(n, n))]
    assert sizes.tolist() == wanted
    block = concentric_mask(n * n, 0, n, n)
    total = sum(a * sum(wanted[: i + 1]) for i, a in enumerate(wanted))
    assert int(block.sum()) == total
    cells = block.view(n, n, n, n)
    assert torch.equal(cells.flip(0).flip(2), cells)
    assert torch.equal(cells.transpose(0, 1).transpose(2, 3), cells)


def test_the_paper_s_grid() -> None:
    assert int(concentric_mask(631, 35, 24, 24).sum()) == 217508
    places = concentric_positions(631, 35, 24, 24)
    assert (places[35:611].amin(), places[35:611].amax(), places[611], places[-1]) == (35, 46, 47, 66)
    assert torch.equal(concentric_mask(9, 3, 2, 2)[3:7, 3:7], torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (1, 7)])
def test_oblong_grids(shape: tuple[int, int]) -> None:
    ring = ring_map(*shape)
    assert int(ring.max()) + 1 == rings(*shape)
    assert (ring[0] == 0).all()
    assert (ring[:, -1] == 0).all()
    assert torch.equal(ring.rot90(2), ring)


def test_a_batch_of_paddings_and_pictures() -> None:
    """Every row as the pure functions say, whatever stands beside it."""
    visual = torch.zeros(3, 14, dtype=torch.bool)
    visual[0, 3:12] = True
    visual[1, 6:10] = True
    visual[1, 11:13] = True
    real = torch.ones_like(visual)
    real[1, :2] = False
    block = block_of(visual, real, [(3, 3), (2, 2), (1, 2)])
    places = block.advance.cumsum(1) - block.advance + block.ring
    assert torch.equal(places[0], concentric_positions(14, 3, 3, 3))
    assert places[1].tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7]
    assert places[2].tolist() == list(range(14))
    assert block.has.flatten().tolist() == [True, True, False]
    assert block.view[1].tolist() == [-1] * 6 + [1] * 4 + [-1] + [2] * 2 + [-1]


def by_hand(host, inputs: dict) -> torch.Tensor:
    """Logits of the plain model when positions and mask are handed in: one row, one square of 36 tokens."""
    ids = inputs["input_ids"]
    begin = int((ids[0] == host.model.config.image_token_id).int().argmax())
    allowed = concentric_mask(ids.shape[1], begin, 6, 6)[None, None]
    places = concentric_positions(ids.shape[1], begin, 6, 6)[None]
    with torch.no_grad():
        found = host.model(**{**inputs, "attention_mask": allowed}, position_ids=places, use_cache=False)
    return found.logits


def test_llava_by_hand(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    with sl.attach(host.model, ON):
        found = forward(host.model, inputs)
        ids, steps = generate(host.model, inputs, 4)
    assert_close("prompt", found, by_hand(host, inputs), 2e-5)
    whole = by_hand(host, extended(inputs, ids[:, :-1]))[:, -4:]
    assert_close("answer", steps, whole, 2e-5)
    assert not torch.allclose(found, forward(host.model, inputs), atol=1e-2)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3"])
def test_with_and_without_cache(name: str, tiny) -> None:
    """Decoding position by position equals computing everything again, padded batch and all."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    with sl.attach(host.model, ON):
        ids, steps = generate(host.model, inputs)
        again, whole = generate(host.model, inputs, use_cache=False)
    assert torch.equal(ids, again)
    assert_close("steps", steps, whole, 2e-5)


def test_all_axes_of_rotary_positions_get_the_ring(tiny) -> None:
    host = tiny("qwen2_5_vl")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    seen = []
    with sl.attach(host.model, ON, toy(positions=lambda site, given: seen.append(given.clone()))):
        generate(host.model, inputs, 2)
    visual = (inputs["input_ids"] == host.model.config.image_token_id)[0]
    thw = inputs["image_grid_thw"][0].tolist()
    rows, columns = thw[1] // 2, thw[2] // 2
    wanted = concentric_positions(len(visual), int(visual.int().argmax()), rows, columns)
    assert torch.equal(seen[0], wanted.expand(3, 1, -1))
    assert seen[1].flatten().tolist() == [next_position(len(visual), rows, columns)] * 3


def test_a_second_question_with_a_second_picture(tiny) -> None:
    host = tiny("llava")
    first, second = (host.inputs([q], [[p]]) for q, p in zip(QUESTIONS, PICTURES, strict=True))
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    with torch.no_grad(), sl.attach(host.model, ON):
        one = host.model(input_ids=first["input_ids"], pixel_values=first["pixel_values"])
        cache = getattr(one, "cache", None) or one.past_key_values
        turns = host.model(
            input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache
        ).logits[:, -1]
        long = host.model(**whole).logits[:, -1]
    assert_close("second turn", turns, long, 2e-5)


def test_a_second_question_about_the_same_picture(tiny) -> None:
    host = tiny("llava")
    first = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    more = torch.arange(300, 305)[None]
    whole = {**first, "input_ids": torch.cat([first["input_ids"], more], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad(), sl.attach(host.model, ON):
        one = host.model(**first)
        cache = getattr(one, "cache", None) or one.past_key_values
        turns = host.model(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache).logits
        long = host.model(**whole).logits[:, -5:]
    assert_close("second turn", turns, long, 2e-5)


def test_untrained_weights_are_warned_of() -> None:
    host = TINY["llava"]()
    with pytest.warns(SightlineWarning, match="only weights trained with it"), sl.attach(host.model, CCA()):
        pass


def test_pictures_encoded_before(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    with torch.no_grad():
        encoded = host.model.get_image_features(pixel_values=inputs["pixel_values"])
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with sl.attach(host.model, ON), pytest.raises(InputError, match="encoded before"):
        host.model(**rest, mm_encoder_outputs={"image": encoded})

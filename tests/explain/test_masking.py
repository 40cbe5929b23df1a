"""What masks and variants do to the maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline import explain
from sightline.engine.attach import attach
from sightline.engine.record import record
from sightline.engine.tokens import Role
from sightline.errors import ParameterError
from sightline.explain.ablation import redirect
from sightline.explain.masking import random_mask
from sightline.steer.var import VAR, factors
from tests.explain.tiny import DIMS, SINKS, TAU, batch, lvlm, sinks_of, text_rows, whole


def hidden_columns(seen, layer, b):
    """(N,) bool: visual columns that no text row attends."""
    return seen.tokens.visual[b] & (seen.maps[0][layer][b][:, text_rows(seen, b)].amax((0, 1)) == 0)


def test_hidden_sinks_get_nothing_from_the_text_and_the_rest_keeps_its_proportions():
    model, asked = lvlm(), batch()
    plain = whole(model, asked.images, asked.questions)
    masked = whole(model, asked.images, asked.questions, explain.MaskTokens(**SINKS))
    for b in range(3):
        rows = text_rows(plain, b)
        for layer in plain.maps[0]:
            assert torch.equal(hidden_columns(masked, layer, b), sinks_of(masked, layer, b))
        sinks = sinks_of(plain, 0, b)
        before, after = plain.maps[0][0][b], masked.maps[0][0][b]  # layer 0: the same states
        assert torch.allclose(before[:, ~rows], after[:, ~rows], atol=1e-6)
        expected = before[:, rows].masked_fill(sinks, 0)
        torch.testing.assert_close(after[:, rows], expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
        assert before[:, ~rows][..., sinks].max() > 0  # the picture itself still sees them


def test_generated_tokens_do_not_see_them_either():
    model, asked = lvlm(), batch()
    recorder = record(maps=True, **SINKS)
    with attach(model.model, explain.MaskTokens(**SINKS), recorder), torch.no_grad():
        model.model.generate(**model.inputs(asked.images, asked.questions), max_new_tokens=3, do_sample=False)
    seen = recorder.seen
    for b in range(3):
        for layer in range(4):
            sinks = sinks_of(seen, layer, b)
            row = seen.maps[2][layer][b, :, 0]
            assert row[:, : len(sinks)][:, sinks].sum() == 0
            torch.testing.assert_close(row.sum(-1), torch.ones(4), atol=1e-5, rtol=0)


def test_random_tokens_are_as_many_not_sinks_nested_and_the_same_in_any_batch():
    model, asked = lvlm(), batch()
    three = whole(model, asked.images, asked.questions, random_mask(asked.items, 1, 0, TAU, DIMS))
    other = whole(model, asked.images, asked.questions, random_mask(asked.items, 2, 0, TAU, DIMS))
    alone = whole(model, asked.images[1:2], asked.questions[1:2], random_mask(asked.items[1:2], 1, 0, TAU, DIMS))
    for b in range(3):
        for layer in range(4):
            hidden, sinks = hidden_columns(three, layer, b), sinks_of(three, layer, b)
            assert int(hidden.sum()) == int(sinks.sum())
            assert not (hidden & sinks).any()
    picked = [hidden_columns(three, layer, 1)[three.tokens.visual[1]] for layer in range(4)]
    same = [hidden_columns(alone, layer, 0)[alone.tokens.visual[0]] for layer in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(picked, same, strict=True))
    small, large = sorted(picked, key=lambda m: int(m.sum()))[-2:]
    assert int((small & large).sum()) > 0.5 * int(small.sum())  # one order for all layers
    assert any(not torch.equal(hidden_columns(three, 0, b), hidden_columns(other, 0, b)) for b in range(3))


def test_mask_sinks_returns_every_condition_with_the_baseline():
    model, asked = lvlm(), batch(2)
    found = explain.mask_sinks(model, asked.items, draws=2, **SINKS)
    assert list(found) == ["none", "mask sinks", "mask random 1", "mask random 2"]
    again = explain.mask_sinks(model, asked.items, draws=2, **SINKS)
    assert found == again
    assert len({replies[0].logprob for replies in found.values()}) == 4
    with pytest.raises(ParameterError, match="draws=0"):
        explain.mask_sinks(model, asked.items, draws=0)
    with pytest.raises(ParameterError, match="0 generators for 2 rows"):
        whole(model, asked.images, asked.questions, explain.MaskTokens(hide="random", **SINKS))


def test_redirect_to_visual_is_var_bit_for_bit():
    model, asked = lvlm(), batch()
    var = whole(model, asked.images, asked.questions, VAR(**SINKS))
    same = whole(model, asked.images, asked.questions, explain.Redirect(**SINKS))
    plain = whole(model, asked.images, asked.questions)
    assert all(torch.equal(var.maps[0][i], same.maps[0][i]) for i in range(4))
    assert not torch.equal(var.maps[0][2], plain.maps[0][2])


@pytest.mark.parametrize("to", ["text", "all"])
def test_budget_goes_to_the_receivers_in_proportion(to):
    model, asked = lvlm(), batch()
    plain = whole(model, asked.images, asked.questions)
    moved = whole(model, asked.images, asked.questions, explain.Redirect(to=to, p=0.5, **SINKS))
    edited = 0
    for b in range(3):
        sinks = plain.phi[2][b] > TAU
        sinks &= plain.tokens.role[b] != int(Role.PAD)
        visual, text = plain.tokens.visual[b], ~plain.tokens.where(Role.PAD, Role.IMAGE)[b]
        if not (sinks & visual).any():
            continue
        receivers = {"text": text, "all": text | visual}[to] & ~sinks
        before, after = plain.maps[0][2][b].double(), moved.maps[0][2][b].double()  # layer 2 is the first edited
        mass, share = before[..., visual].sum(-1), before[..., sinks & visual].sum(-1)
        chosen = (mass >= 0.2) & (share <= 0.5 * (mass + 1e-6 * int(visual.sum()))) & text_rows(plain, b)
        freed = 0.5 * before[..., sinks].sum(-1, keepdim=True)
        expected = torch.where(sinks, 0.5 * before, before)
        expected = torch.where(receivers, before * (1 + freed / before[..., receivers].sum(-1, keepdim=True)), expected)
        expected = torch.where(chosen[..., None], expected, before)
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
        edited += int(chosen.sum())
    assert edited > 20


def test_generated_text_is_a_receiver_too():
    model, asked = lvlm(), batch(1)
    inputs = model.inputs(asked.images, asked.questions)
    rows = {}
    for p in (1e-9, 0.999999):
        recorder = record(maps=True, **SINKS)
        system = explain.Redirect(to="text", p=p, first_layer=0, **SINKS)
        with attach(model.model, system, recorder), torch.no_grad():
            model.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        rows[p] = recorder.seen.maps[1][0][0, :, 0]  # layer 0 of the first generated token: the same query for both
    gained = rows[1e-9][:, -1] / rows[0.999999][:, -1]
    assert (gained > 1).any()
    torch.testing.assert_close(rows[1e-9].sum(-1), torch.ones(4), atol=1e-5, rtol=0)


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda x: sum(x) > 1e-3),
    st.floats(0, 1),
    st.sampled_from(["visual", "text", "all"]),
)
def test_redirect_keeps_the_mass_of_a_row(raw, p, to):
    masses = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    scale = redirect(masses, 10, p=p, rho=0.5, summ=0.2, to=to)
    assert float((scale * masses).sum()) == pytest.approx(1, abs=1e-6)
    assert (scale >= 0).all()
    if to == "visual":
        assert torch.equal(scale[:3], factors(masses[:3], 10, p=p, rho=0.5, summ=0.2))
        assert scale[3] == 1


def test_ablations_have_the_baseline_and_every_variant():
    asked = batch(1)
    found = explain.ablations(lvlm(), asked.items, sweep=(0.0,), **SINKS)
    assert list(found) == ["none", "var", "no head selection", "budget to text", "budget to all", "p=0"]
    assert found["none"] != found["var"]
    chosen = explain.variants(**SINKS)["no head selection"][0]
    assert (chosen.min_nonsink_ratio, chosen.summ) == (0, 0)
    assert not np.isnan([r.logprob for replies in found.values() for r in replies]).any()

"""One pass against the full maps."""

from __future__ import annotations

import numpy as np
import pytest

from sightline import explain
from sightline.engine import attention
from sightline.errors import InputError, ParameterError
from sightline.explain.heads import heads_of
from tests.explain.tiny import DIMS, SINKS, TAU, batch, lvlm, sinks_of, text_rows, whole

HOSTS = ("llava", "qwen2_5_vl", "gemma3", "internvl", "llava_next")


@pytest.mark.parametrize("name", HOSTS)
def test_observation_is_what_the_full_maps_say(name):
    model, asked = lvlm(name), batch()
    seen = explain.observe(model, asked.images, asked.questions, **SINKS)
    truth = whole(model, asked.images, asked.questions)
    for b, one in enumerate(seen):
        rows, visual = text_rows(truth, b), truth.tokens.visual[b]
        assert one.rows == int(rows.sum()) > 3
        assert len(one.layout) == int(visual.sum())
        for layer, map_ in truth.maps[0].items():
            part = map_[b][:, rows].double()  # (H, R, N)
            sinks = sinks_of(truth, layer, b)
            assert (one.sinks[layer] == sinks[visual].numpy()).all()
            np.testing.assert_allclose(one.phi[layer], truth.phi[layer][b][visual], rtol=1e-5)
            np.testing.assert_allclose(one.received[layer], part[..., visual].mean(1), atol=1e-6)
            np.testing.assert_allclose(one.mass[layer], part[..., visual].sum(-1).mean(1), atol=1e-5)
            np.testing.assert_allclose(one.sink_mass[layer], part[..., sinks].sum(-1).mean(1), atol=1e-5)
            mass, on_sinks = part[..., visual].sum(-1), part[..., sinks].sum(-1)
            passed = (mass >= 0.2) & (on_sinks <= 0.5 * (mass + 1e-6 * int(visual.sum())))
            np.testing.assert_allclose(one.selected[layer], passed.double().mean(1), atol=1e-6)
    assert any(one.sinks.any() for one in seen)


def test_a_row_does_not_depend_on_its_batch():
    model, asked = lvlm(), batch()
    together = explain.observe(model, asked.images, asked.questions, **SINKS)[2]
    alone = explain.observe(model, asked.images[2:], asked.questions[2:], **SINKS)[0]
    np.testing.assert_allclose(together.received, alone.received, atol=1e-5)
    np.testing.assert_allclose(together.phi, alone.phi, rtol=1e-4)


def test_chunks_of_queries_give_the_same(monkeypatch):
    model, asked = lvlm(), batch()
    before = explain.observe(model, asked.images, asked.questions, **SINKS)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)  # one query at once
    after = explain.observe(model, asked.images, asked.questions, **SINKS)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a.received, b.received, atol=1e-5)
        np.testing.assert_allclose(a.selected, b.selected)
    heavy = explain.contribution(model, asked.images, asked.questions, **SINKS)
    monkeypatch.undo()
    for a, b in zip(explain.contribution(model, asked.images, asked.questions, **SINKS), heavy, strict=True):
        np.testing.assert_allclose(a.norms, b.norms, rtol=1e-4)


def test_unlike_numbers_of_pictures_and_questions_are_refused():
    asked = batch()
    with pytest.raises(InputError, match="3 pictures and 2 questions"):
        explain.observe(lvlm(), asked.images, asked.questions[:2])
    with pytest.raises(InputError, match="come as lists here"):
        explain.sink_map(lvlm(), "kitchen.png", "Is there a dog?")
    with pytest.raises(InputError, match="0 pictures"):
        explain.observe(lvlm(), [], [])
    with pytest.raises(ParameterError, match="tau=6 can never be exceeded"):
        explain.observe(lvlm(), asked.images, asked.questions, tau=6, sink_dims=DIMS)


def test_sink_map_lies_on_the_grid_and_correlates_ranks():
    asked = batch(1)
    found = explain.sink_map(lvlm(), asked.images, asked.questions, **SINKS)[0]
    grid = found.grid(2)
    assert grid.shape == (6, 6)
    assert (grid.ravel() == found.phi[2]).all()  # one row-major view
    assert found.received.shape == found.phi.shape == (4, 36)
    assert (found.sinks == (found.phi > TAU)).all()
    order = lambda x: np.argsort(np.argsort(x))  # noqa: E731
    expected = np.corrcoef(order(found.phi[1]), order(found.received[1]))[0, 1]
    assert found.correlation()[1] == pytest.approx(expected)


def test_grid_of_an_anyres_picture_is_that_of_its_base_view():
    asked = batch(1)
    found = explain.sink_map(lvlm("llava_next"), asked.images, asked.questions, **SINKS)[0]
    layout = found.layout
    assert len(layout.grids) > 1
    for t in np.flatnonzero(layout.crop == layout.base):
        assert found.grid(0)[tuple(layout.cell[t])] == found.phi[0, t]
    assert found.grid(0).shape == layout.grids[layout.base]


def test_heads_are_means_over_text_queries_not_over_prompts():
    model, asked = lvlm(), batch()
    seen = explain.observe(model, asked.images, asked.questions, **SINKS)
    assert len({s.rows for s in seen}) > 1
    found = explain.image_heads(model, asked.images, asked.questions, batch=2, **SINKS)
    truth = whole(model, asked.images, asked.questions)
    for layer, map_ in truth.maps[0].items():
        pooled = [map_[b][:, text_rows(truth, b)][..., truth.tokens.visual[b]].sum(-1) for b in range(3)]
        np.testing.assert_allclose(found.mass[layer], np.concatenate(pooled, 1).mean(1), atol=1e-5)
    assert found.rows == sum(s.rows for s in seen)
    centric = found.centric(0.9)
    assert all(found.selected[layer, head] >= 0.9 for layer, head in centric)
    assert len(centric) == (found.selected >= 0.9).sum()
    with pytest.raises(InputError, match="no prompt"):
        heads_of([])


def test_nothing_stays_on_the_model():
    model, asked = lvlm(), batch(1)

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.model.modules()]

    before = model.ask(asked.images[0], asked.questions[0], max_new_tokens=4)
    count = hooks()
    explain.observe(model, asked.images, asked.questions, **SINKS)
    explain.contribution(model, asked.images, asked.questions, **SINKS)
    assert model.ask(asked.images[0], asked.questions[0], max_new_tokens=4) == before
    assert hooks() == count

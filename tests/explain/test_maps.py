"""Object share of tokens against counted pixels; background and object attention."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import explain
from sightline.errors import InputError, ParameterError
from sightline.explain.maps import maps_of
from sightline.hosts.geometry import Layout
from tests.explain.tiny import SINKS, batch, lvlm

FINE = 8  # boxes on eighths of a pixel, so that counting sub-pixels is exact


def layout_of(boxes, size):
    n = len(boxes)
    return Layout(size, np.array(boxes, np.float32), np.zeros(n, int), np.zeros((n, 2), int), ((1, n),), ((),) * n)


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_object_share_is_the_covered_area(seed):
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(3, 12, 2))
    mask = rng.random((height, width)) < 0.4
    corners = np.sort(rng.integers(-2 * FINE, (max(width, height) + 2) * FINE, (6, 2, 2)), 1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1]], 1) / FINE
    boxes[0] = np.nan
    found = explain.object_share(layout_of(boxes, (width, height)), mask)
    fine = mask.repeat(FINE, 0).repeat(FINE, 1)
    for (x0, y0, x1, y1), share in zip(boxes * FINE, found, strict=True):
        if np.isnan(x0):
            assert np.isnan(share)
            continue
        part = fine[max(0, int(y0)) : max(0, int(y1)), max(0, int(x0)) : max(0, int(x1))]
        assert np.isnan(share) if part.size == 0 else share == pytest.approx(part.mean(), abs=1e-5)


def test_background_is_below_the_least_share_and_never_a_token_that_shows_nothing():
    assert explain.background(np.array([0, 0.049, 0.05, 1, np.nan])).tolist() == [True, True, False, False, False]
    assert explain.background(np.array([0, 0.4]), least=0.5).all()
    with pytest.raises(ParameterError, match="least=2"):
        explain.background(np.array([0.0]), least=2)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_maps_of_a_prompt(name):
    model, asked = lvlm(name), batch(2)
    masks = [np.any([o.mask for o in i.scene.objects], 0) for i in asked.items]
    found = explain.text_to_image(model, asked.images, asked.questions, masks, **SINKS)
    seen = explain.observe(model, asked.images, asked.questions, **SINKS)
    for one, sight, mask in zip(found, seen, masks, strict=True):
        share = explain.object_share(sight.layout, mask)
        np.testing.assert_allclose(one.attention, sight.received.mean(1), atol=1e-6)
        assert (one.without[one.sinks] == 0).all()
        assert (one.without[~one.sinks] == one.attention[~one.sinks]).all()
        assert (one.shown == ~np.isnan(sight.layout.visible_boxes()).any(1)).all()
        counts = one.counts()
        for layer in range(4):
            sinks = [t for t in range(len(share)) if sight.phi[layer, t] > sight.tau and one.shown[t]]
            assert counts["sinks"][layer] == len(sinks)
            assert counts["sinks on background"][layer] == sum(share[t] < 0.05 for t in sinks)
        assert counts["background"][0] == np.nansum(share < 0.05) < counts["tokens"][0]
        whole, without = one.on_objects()
        good = one.shown
        expected = one.attention[:, share >= 0.05].sum(1) / one.attention[:, good].sum(1)
        np.testing.assert_allclose(whole, expected, rtol=1e-5)
        assert (np.abs(whole - without) > 0).any()


def test_no_attention_left_is_nan_not_an_error():
    seen = explain.observe(lvlm(), batch(1).images, batch(1).questions, tau=1e-6, sink_dims=tuple(range(32)))[0]
    one = maps_of(seen, np.ones((56, 56), bool))
    assert np.isnan(one.on_objects()[1]).all()  # every token is a sink
    assert (one.on_objects()[0] == 1).all()


def test_masks_that_do_not_fit_are_refused():
    asked = batch(2)
    with pytest.raises(InputError, match="1 masks for 2 pictures"):
        explain.text_to_image(lvlm(), asked.images, asked.questions, [np.ones((56, 56), bool)])
    with pytest.raises(InputError, match=r"shape \(5, 5\)"):
        explain.object_share(layout_of([[0, 0, 1, 1]], (6, 5)), np.ones((5, 5), bool))

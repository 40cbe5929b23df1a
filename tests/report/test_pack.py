from __future__ import annotations

import numpy as np
import pytest

from sightline.report import pack
from sightline.report.summary import word_rows

from .synthetic import grid_layout, make_look


def unpack(run, channels, tokens):
    rows, scales = pack.pack_rows(run, channels)
    count = len(run.words) + 1
    q = np.frombuffer(rows, np.uint8).reshape(count, len(channels), tokens)
    s = np.frombuffer(scales, "<f4").reshape(count, len(channels), 1)
    return s * (q / 255.0) ** 2, s


def test_every_map_is_kept_within_half_a_step(look):
    run, plan = look.runs[0], pack.plan(look)
    assert plan.full
    assert plan.remark == ""
    assert len(plan.channels) == 24
    found, scale = unpack(run, plan.channels, 196)
    true = np.stack([*(word_rows(run, w) for w in run.words), word_rows(run)]).reshape(found.shape)
    unit = np.sqrt(true / scale)
    assert (np.abs(np.sqrt(found / scale) - unit) <= 0.5 / 255 + 1e-5).all()
    assert np.abs(found - true).max() <= scale.max() / 255


def test_faint_tokens_survive_beside_a_sink():
    look = make_look(sink_gain=6.0, changed=None)
    run, plan = look.runs[0], pack.plan(look)
    found, _ = unpack(run, plan.channels, 196)
    rest = np.delete(np.arange(196), [17, 150])
    true = word_rows(run, run.words[0]).reshape(24, 196)[:, rest]
    peaks = true[8:].argmax(-1)  # layers with sinks
    rows = np.arange(16)
    assert true[8:][rows, peaks].max() < 0.05
    assert found[0, 8:][:, rest][rows, peaks] == pytest.approx(true[8:][rows, peaks], rel=0.2)


def test_large_looks_are_thinned_to_head_means_and_the_strongest_heads(look):
    one = 196 * 21  # bytes per channel: 9 + 10 words and two whole answers
    plan = pack.plan(look, budget=one * 8)
    assert not plan.full
    assert [(c.first, c.stop, c.head) for c in plan.channels[:6]] == [(i, i + 1, -1) for i in range(6)]
    assert [(c.first, c.head) for c in plan.channels[6:]] == [(4, 0), (5, 0)]  # the two that look most
    assert "4 heads of each layer" in plan.remark
    assert "2 heads that look most" in plan.remark
    found, _ = unpack(look.runs[0], plan.channels, 196)
    true = word_rows(look.runs[0], look.runs[0].words[2])
    assert found[2, 3] == pytest.approx(true[3].mean(0), rel=0.2, abs=1e-4)
    assert found[2, 7] == pytest.approx(true[5, 0], rel=0.2, abs=2e-4)


def test_layers_are_averaged_when_one_map_each_is_too_much(look):
    plan = pack.plan(look, budget=196 * 21 * 2)
    assert [(c.first, c.stop, c.head) for c in plan.channels] == [(0, 3, -1), (3, 6, -1)]
    assert "3 neighbouring layers" in plan.remark
    assert len(pack.plan(look, budget=1).channels) == 1


def test_budget_holds_for_a_large_model():
    layout = grid_layout((96, 96), 24, 24)
    look = make_look(tuple(" w" for _ in range(20)), None, layout=layout, layers=16, heads=16)
    plan = pack.plan(look, budget=500_000)
    rows, _ = pack.pack_rows(look.runs[0], plan.channels)
    assert len(plan.channels) >= 16
    assert 450_000 < len(rows) <= 500_000


def test_masses_and_phi_keep_two_digits(look):
    run = look.runs[0]
    masses = np.frombuffer(pack.pack_masses(run, full=True), np.uint8).reshape(10, 6, 4, 6) / 255
    assert np.abs(masses[:9] - run.masses).max() <= 0.5 / 255 + 1e-6
    assert np.abs(masses[9] - run.masses.mean(0)).max() <= 0.5 / 255 + 1e-6
    thin = np.frombuffer(pack.pack_masses(run, full=False), np.uint8).reshape(10, 6, 1, 6) / 255
    assert np.abs(thin[:9, :, 0] - run.masses.mean(2)).max() <= 0.5 / 255 + 1e-6
    data, step = pack.pack_phi(run)
    phi = np.frombuffer(data, "<u2").reshape(6, 196) * np.array(step)[:, None]
    assert np.abs(phi - run.phi).max() < 1e-3

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sightline.report import to_json
from sightline.report.summary import heads, hide_sinks, plain, word_rows, words

from .synthetic import SINKS, make_look, make_run


def test_words_look_where_they_were_made_to(look):
    found = words(look, look.runs[0])
    assert [w.text for w in found] == ["Yes", ",", "a", "red", "ball", "on", "the", "grass", "."]
    assert [w.regions[0].place for w in found[:4]] == ["upper left", "lower right", "upper left", "lower right"]
    run = look.runs[0]
    exact = run.rows[3].astype(np.float64)
    assert found[3].image_mass == pytest.approx(exact.sum(-1).mean(), rel=1e-4)
    sinks = exact[2:, :, list(SINKS)].sum() / exact.sum()
    assert found[3].sink_share == pytest.approx(sinks, rel=1e-3)
    assert all(not set(SINKS) <= set(r.tokens) for r in found[3].regions)


def test_a_word_of_several_tokens_is_their_mean_and_its_probability_their_product(look):
    run = look.runs[0]
    word = replace(run.words[0], start=1, stop=4)
    assert np.allclose(word_rows(run, word), run.rows[1:4].astype(np.float32).mean(0), atol=1e-6)
    (found,) = words(look, replace(run, words=(word,)))
    assert found.probability == pytest.approx(float(np.prod(run.probability[1:4])), rel=1e-5)


def test_hiding_sinks_zeroes_only_their_columns_in_their_layers(look):
    run = look.runs[0]
    rows = word_rows(run)
    hidden = hide_sinks(rows, run.sinks)
    assert (hidden[2:, :, list(SINKS)] == 0).all()
    assert (hidden[:2] == rows[:2]).all()
    rest = np.delete(np.arange(rows.shape[-1]), SINKS)
    assert (hidden[..., rest] == rows[..., rest]).all()
    assert (rows[2:, :, list(SINKS)] > 0).all()  # the original is left alone


def test_image_centric_heads_pass_both_tests(look):
    run = look.runs[0]
    rows = np.zeros_like(run.rows)
    rows[:, 3, 0, 40] = 0.19  # too little
    rows[:, 3, 1, 40] = 0.25
    rows[:, 3, 2, SINKS[0]], rows[:, 3, 2, 40] = 0.4, 0.2  # mostly a sink
    rows[:, 4, 3, 40] = 0.5
    scan = heads(replace(run, rows=rows))
    assert np.argwhere(scan.centric).tolist() == [[3, 1], [4, 3]]
    assert scan.largest(10) == [(4, 3), (3, 1)]
    assert scan.largest(1) == [(4, 3)]
    assert scan.sink_share[3, 2] == pytest.approx(2 / 3, rel=1e-3)


def test_json_holds_the_numbers_and_survives_a_round_trip(look):
    found = json.loads(json.dumps(to_json(look), allow_nan=False))
    assert found["question"] == look.question
    assert [r["label"] for r in found["runs"]] == ["none", "var:p=0.6"]
    run = found["runs"][1]
    assert run["did"]["var"] == {"p": 0.6, "heads edited": 14, "mass moved": pytest.approx(0.0725, rel=1e-4)}
    assert [len(layer["visual"]) for layer in run["sinks"]["layers"]] == [0, 0, 2, 2, 2, 2]
    assert run["sinks"]["layers"][2]["visual"][0] == {"token": SINKS[1], "phi": 31.0}
    assert run["sinks"]["layers"][2]["text"] == [{"position": 0, "token": "<s>"}]
    assert sum(run["mass_by_group"].values()) == pytest.approx(1, abs=1e-3)
    assert run["words"][3]["regions"][0]["place"] == "lower right"
    assert len(json.dumps(found)) < 40_000


def test_an_empty_answer_has_numbers_too():
    look = make_look((), None)
    run = to_json(look)["runs"][0]
    assert run["words"] == []
    assert run["heads"]["image_centric"] == []
    assert set(run["mass_by_group"].values()) == {None}


def test_odd_values_become_plain():
    odd = {1: np.float32(np.nan), "a": np.arange(2), "b": {3, 1}, "c": np.bool_(True), "d": (1.5, None), "e": object}
    assert plain(odd) == {"1": None, "a": [0, 1], "b": [1, 3], "c": True, "d": [1.5, None], "e": str(object)}


def test_infinite_phi_stays_out_of_the_json(look):
    phi = look.runs[0].phi.copy()
    phi[3, SINKS[0]] = np.inf
    json.dumps(to_json(replace(look, runs=(replace(look.runs[0], phi=phi),))), allow_nan=False)


def test_synthetic_rows_sum_to_the_masses(look):
    run = make_run(look.layout, ["a", "b"])
    image = run.masses[..., 2] + run.masses[..., 3]
    assert np.allclose(run.rows.astype(np.float32).sum(-1), image, atol=2e-3)
    assert np.allclose(run.masses.sum(-1), 1, atol=1e-5)

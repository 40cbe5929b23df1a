"""`look`: the answers are the model's own, every token is in one word, and what is recorded belongs to it."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline import hosts, scenes
from sightline.errors import HostError, InputError, ParameterError, SizeError
from sightline.loading import LVLM
from sightline.looking import _pieces, _words
from tests.tiny_hosts import TINY, picture

VAR = sl.steer.VAR(p=0.3, sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False)


def tiny(name: str = "llava") -> LVLM:
    host = TINY[name]()
    return LVLM(host.model, host.processor, hosts.find(host.model), name)


@pytest.mark.parametrize("name", TINY)
def test_look_on_every_host(name: str) -> None:
    lvlm = tiny(name)
    image = picture(100, 70)
    result = sl.look(image, "What is this?", model=lvlm, systems=[VAR], max_new_tokens=5)
    plain, steered = result.runs
    assert plain.answer == lvlm.ask(image, "What is this?", max_new_tokens=5)
    assert steered.answer == lvlm.ask(image, "What is this?", max_new_tokens=5, systems=[VAR])
    for run in result.runs:
        tokens, layers, heads, visual = run.rows.shape
        assert (tokens, visual) == (len(run.pieces), len(result.layout))
        assert run.masses.shape == (tokens, layers, heads, len(run.groups))
        np.testing.assert_allclose(run.masses.sum(-1), 1, atol=1e-5)
        image_mass = run.masses[..., [run.groups.index("image"), run.groups.index("visual sink")]].sum(-1)
        np.testing.assert_allclose(run.rows.astype(np.float32).sum(-1), image_mass, atol=2e-3)
        assert run.phi.shape == (layers, visual)
        assert all((run.phi[k, found] > run.tau).all() for k, found in enumerate(run.sinks))
        assert ((run.probability > 0) & (run.probability <= 1)).all()
    assert plain.label == "none"
    assert steered.label.startswith("var:p=0.3")
    assert "var" in steered.notes
    assert not plain.notes


def test_saved_and_shown(tmp_path) -> None:
    from rich.console import Console

    result = sl.look(scenes.draw(4, size=96).image, "Is there a dog?", model=tiny(), max_new_tokens=4)
    paths = result.save(tmp_path / "out")
    assert paths["report"].read_text(encoding="utf-8").count("<html") == 1
    assert json.dumps(result.to_json())
    console = Console(record=True, width=80)
    result.show(console)
    assert "Is there a dog?" in console.export_text()


def test_end_of_text_is_no_token_of_the_answer() -> None:
    lvlm = tiny()
    image = picture()
    first = sl.look(image, "What is this?", model=lvlm, max_new_tokens=6)
    lvlm.model.generation_config.eos_token_id = int(
        lvlm.model.generate(**lvlm.inputs(image, "What is this?"), max_new_tokens=6)[0, -4]
    )
    try:
        second = sl.look(image, "What is this?", model=lvlm, max_new_tokens=6)
    finally:
        lvlm.model.generation_config.eos_token_id = None
    assert len(second.runs[0].pieces) < 6
    assert first.runs[0].answer.startswith(second.runs[0].answer.rstrip("\ufffd"))


def test_same_seed_same_look() -> None:
    lvlm = tiny()
    first, second = (sl.look(picture(), "What?", model=lvlm, systems=[VAR], max_new_tokens=3) for _ in range(2))
    assert np.array_equal(first.runs[1].rows, second.runs[1].rows)


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_pieces_join_to_the_answer(text: str) -> None:
    tokenizer = TINY["llava"]().processor.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(_pieces(tokenizer, ids)) == answer


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from([" a", "b", " ", "cd", "\n", " e.", ""]), max_size=12))
def test_words_cover_the_answer(pieces: list[str]) -> None:
    words = _words(pieces)
    assert " ".join(w.text for w in words).split() == "".join(pieces).split()
    assert all(a.stop <= b.start for a, b in pairwise(words))
    assert all(word.stop <= len(pieces) for word in words)


def test_bad_requests_are_refused_before_work() -> None:
    lvlm = tiny()
    with pytest.raises(ParameterError, match="max_new_tokens=0"):
        sl.look(picture(), "What?", model=lvlm, max_new_tokens=0)
    with pytest.raises(InputError, match=r"nowhere\.png"):
        sl.look("nowhere.png", "What?", model=lvlm)
    host = hosts.Host(name="mine", classes=("Mine",))
    with pytest.raises(HostError, match="mine"):
        sl.look(picture(), "What?", model=LVLM(lvlm.model, lvlm.processor, host, "mine"))


def test_systems_are_a_list() -> None:
    for wrong in ("var", sl.steer.VAR(), None):
        with pytest.raises(ParameterError, match="give a list of systems"):
            sl.look(systems=wrong)


def test_a_model_is_a_name_or_loaded() -> None:
    with pytest.raises(ParameterError, match=r"model of type Linear: give what `sl\.load` returns"):
        sl.look(model=torch.nn.Linear(1, 1))


def test_whole_maps_too_large_are_refused_before_the_work() -> None:
    lvlm = tiny()
    recorder = sl.record(maps=True, limit_mb=0.01)
    with torch.no_grad(), sl.attach(lvlm.model, recorder), pytest.raises(SizeError, match=r"whole maps of 4 layers"):
        lvlm.model(**lvlm.inputs(picture(), "What?"))
    assert not recorder.seen.maps


def test_a_photograph_for_the_bundled_model_gets_one_plain_line() -> None:
    lvlm = tiny()
    bundled = LVLM(lvlm.model, lvlm.processor, lvlm.host, "tiny")
    photo = sl.look(picture(), "What?", model=bundled, max_new_tokens=2)
    drawing = sl.look(scenes.draw(1, size=64).image, "What?", model=bundled, max_new_tokens=2)
    assert len(photo.warnings) == 1
    assert "generated world" in photo.warnings[0]
    assert "--model" in photo.warnings[0]
    assert not drawing.warnings


def test_what_the_systems_warn_of_is_in_the_result() -> None:
    result = sl.look(picture(), "What?", model=tiny(), systems=[sl.steer.VAR(tau=5.5)], max_new_tokens=2)
    assert any("VAR changes nothing" in line for line in result.warnings)
    with pytest.raises(InputError, match="empty"):
        sl.look(picture(), "", model=tiny())

"""CCA's analyses: flow against whole maps, what a place tells, and the control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sightline.engine.attach import attach
from sightline.engine.tokens import Role
from sightline.errors import InputError, ParameterError
from sightline.explain.concentric import InformationFlow, Reversed, information_flow, pasted, spatial_probe, things
from sightline.explain.observing import prefill
from sightline.lvlm import LVLM
from sightline.steer import CCA
from tests.explain.tiny import batch, lvlm, whole


@pytest.mark.parametrize("systems", [(), (CCA(trained=True),)], ids=["plain", "cca"])
def test_flow_is_the_mean_over_instruction_rows(systems) -> None:
    model, asked = lvlm(), batch()
    found = information_flow(model, asked.images, asked.questions, layer=1, systems=systems, batch=2)
    for k in range(3):
        seen = whole(model, asked.images[k : k + 1], asked.questions[k : k + 1], *systems)
        role, visual = seen.tokens.role[0], seen.tokens.visual[0]
        rows = (role == int(Role.AFTER)).nonzero().flatten()[:-1]
        wanted = seen.maps[0][1][0].float().mean(0)[rows][:, visual].mean(0)
        np.testing.assert_allclose(found.flow[k], wanted.numpy(), atol=1e-6)
    assert found.grid().shape == (6, 6)
    assert -1 <= found.decay() <= 1


def test_maps_that_know_their_laws() -> None:
    layout = information_flow(lvlm(), batch().images[:1], batch().questions[:1]).layout
    raster = InformationFlow(layout, np.arange(36, dtype=np.float32)[None])
    assert raster.decay() == pytest.approx(1)
    i, j = np.mgrid[:6, :6]
    rings = np.minimum(np.minimum(i, j), np.minimum(5 - i, 5 - j)).astype(np.float32)
    assert InformationFlow(layout, rings.flatten()[None]).symmetry() == pytest.approx(1)
    assert raster.symmetry() < 0.5


def test_reversed_tokens() -> None:
    """Reversing twice is nothing; once, the decoder reads the pictures' tokens last first."""

    class Again(Reversed):
        pass

    model, asked = lvlm(), batch(2)
    inputs, seen = model.inputs(asked.images, asked.questions), []
    visual = inputs["input_ids"] == model.model.config.image_token_id
    for systems in ((), (Reversed(),), (Reversed(), Again())):
        layer = model.model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
        with attach(model.model, *systems):
            prefill(model, inputs)
        hook.remove()
    plain, once, twice = seen
    assert torch.equal(plain, twice)
    assert torch.equal(plain[~visual], once[~visual])
    for row in range(2):
        assert torch.equal(plain[row, visual[row]].flip(0), once[row, visual[row]])


def test_probing_counts_what_is_found_where(monkeypatch) -> None:
    """A mock that answers yes when the picture's left half differs from the empty place finds things on the left only."""
    model = lvlm()
    cut = list(things(2, 0, 56))
    asked: list = []

    def ask(self, pictures, questions, **options):
        asked.extend(questions)
        places = [np.asarray(place, int) for _, _, place in cut]
        answers = []
        for picture in pictures:
            gap = min(np.abs(np.asarray(picture, int)[:, :14] - place[:, :14]).max() for place in places)
            answers.append("Yes." if gap else "No.")
        return answers

    monkeypatch.setattr(LVLM, "ask", ask)
    found = spatial_probe(model, 2, cells=4, sizes=(0.2,), batch=7)
    assert found.found.shape == (1, 4, 4, 2)
    assert found.accuracy[0, :, 0].tolist() == [1.0] * 4
    assert found.accuracy[0, :, 2:].max() == 0
    assert not found.empty.any()
    assert len(asked) == 2 * 17
    assert {f"a {kind}" in q or f"an {kind}" in q for (_, kind, _), q in zip(cut, asked[::17], strict=True)} == {True}


def test_pasting_stays_inside() -> None:
    thing, _, place = next(things(1, 0, 112))
    assert place.size == (112, 112)
    for row, column in ((0, 0), (4, 4)):
        changed = (np.asarray(pasted(place, thing, 0.3, row, column, 5), int) != np.asarray(place, int)).any(-1)
        rows, columns = changed.nonzero()
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(0.3 * 112, abs=2)


def test_a_real_model_answers_and_bad_numbers_are_refused() -> None:
    model = lvlm()
    assert spatial_probe(model, 1, cells=2, sizes=(0.3,)).found.shape == (1, 2, 2, 1)
    for wrong in ({"n": 0}, {"cells": 1}, {"sizes": (2.0,)}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            spatial_probe(model, **wrong)
    with pytest.raises(ParameterError, match="layer"):
        information_flow(model, batch().images, batch().questions, layer=9)
    with pytest.raises(InputError):
        information_flow(model, batch().images, batch().questions[:1])


def test_the_command(monkeypatch) -> None:
    import json

    from typer.testing import CliRunner

    import sightline.loading
    from sightline.explain.commands import app

    monkeypatch.setattr(sightline.loading, "load", lambda *args, **options: lvlm())
    words = ["cca", "--n", "2", "--cells", "2", "--with", "cca:trained=true", "--reverse"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).output)
    assert np.shape(found["flow"]) == (6, 6)
    assert np.shape(found["found, size 0.2"]) == (2, 2)
    assert 0 <= found["yes to the empty place"] <= 1
    shown = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert f"decay: {found['decay']}" in shown

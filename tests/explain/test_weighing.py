"""Contributions against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sightline import explain
from sightline.engine.attach import attach
from sightline.errors import HostError
from sightline.explain import weighing
from sightline.hosts import get
from tests.explain.tiny import SINKS, batch, lvlm, sinks_of, text_rows, whole


def states(model, images, questions):
    """Per layer: the attention module, its value states (B, N, Hkv Dv), and what it returns (B, N, D)."""
    layers = get(get(model.model, model.host.decoder), model.host.layers)
    modules = [get(layer, model.host.attention) for layer in layers]
    values, outputs, hooks = {}, {}, []
    for i, module in enumerate(modules):
        hooks.append(module.v_proj.register_forward_hook(lambda m, a, out, i=i: values.__setitem__(i, out)))
        hooks.append(module.register_forward_hook(lambda m, a, out, i=i: outputs.__setitem__(i, out[0])))
    truth = whole(model, images, questions)
    for hook in hooks:
        hook.remove()
    return truth, modules, values, outputs


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_norms_are_those_of_the_written_out_sum(name):
    model, asked = lvlm(name), batch(2)
    found = explain.contribution(model, asked.images, asked.questions, **SINKS)
    truth, modules, values, outputs = states(model, asked.images, asked.questions)
    for b, one in enumerate(found):
        rows, visual = text_rows(truth, b), truth.tokens.visual[b]
        for layer, map_ in truth.maps[0].items():
            weight = modules[layer].o_proj.weight.detach().double()  # (D, H Dv)
            heads = map_.shape[1]
            part = weight.view(weight.shape[0], heads, -1)
            value = values[layer][b].detach().double().view(len(visual), -1, part.shape[-1])
            value = value.repeat_interleave(heads // value.shape[1], 1)  # (N, H, Dv)
            vectors = torch.einsum("hrj,jhd,ohd->rjo", map_[b][:, rows].double(), value, part)
            torch.testing.assert_close(vectors.sum(1).float(), outputs[layer][b, rows], atol=1e-4, rtol=1e-4)
            norms = vectors.norm(dim=-1)[:, visual].mean(0)
            np.testing.assert_allclose(one.norms[layer], norms, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(one.attention[layer], map_[b][:, rows][..., visual].mean((0, 1)), atol=1e-6)
            assert (one.sinks[layer] == sinks_of(truth, layer, b)[visual].numpy()).all()


def test_chunks_of_keys_give_the_same(monkeypatch):
    asked = batch(2)
    before = explain.contribution(lvlm(), asked.images, asked.questions, **SINKS)
    monkeypatch.setattr(weighing, "CHUNK_BYTES", 4 * 4 * 32 * 5)  # five keys at once
    after = explain.contribution(lvlm(), asked.images, asked.questions, **SINKS)
    np.testing.assert_allclose(after[1].norms, before[1].norms, rtol=1e-5)


def test_means_are_per_token_and_empty_groups_are_nan():
    one = weighing.Contribution(
        norms=np.array([[1.0, 2.0, 6.0], [1.0, 2.0, 3.0]]),
        attention=np.array([[0.5, 0.1, 0.3], [0.1, 0.1, 0.1]]),
        sinks=np.array([[True, False, False], [False, False, False]]),
    )
    means = one.means()
    assert means["sink norm"][0] == 1
    assert means["other norm"][0] == 4
    assert means["other attention"][0] == pytest.approx(0.2)
    assert np.isnan(means["sink norm"][1])
    assert means["other norm"][1] == 2


def test_a_host_without_its_own_projections_is_refused(monkeypatch):
    asked = batch(1)
    monkeypatch.setattr(weighing, "VALUE", ("qkv",))
    with pytest.raises(HostError, match="has no value projection of its own"):
        explain.contribution(lvlm(), asked.images, asked.questions, **SINKS)
    with attach(lvlm().model):  # nothing was left attached
        pass

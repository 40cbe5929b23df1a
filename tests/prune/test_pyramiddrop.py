"""PyramidDrop: the official code's numbers, exact counts, who ranks, and training through the drop."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.engine.shape import shape_of
from sightline.errors import ParameterError
from sightline.prune.pyramiddrop import PyramidDrop, asking_rows, kept, scores
from tests.prune import golden
from tests.tiny_hosts import picture


@pytest.mark.skipif(not golden.cases("pyramiddrop"), reason="golden arrays are not here")
@pytest.mark.parametrize("path", golden.cases("pyramiddrop"), ids=lambda p: p.stem)
def test_golden(path):
    """The whole forward of the official decoder: kept rows of every stage, cache lengths, final states."""
    case = golden.load(path)
    model = golden.llama(case, case["num_heads"])
    inputs, inject = golden.inputs(case)
    layers = tuple(case["layer_list"].tolist())
    system = PyramidDrop(layer_list=layers, image_token_ratio_list=tuple(case["ratios"].tolist()))
    with sl.attach(model, inject, system) as attached:
        found, cache = golden.states(model, inputs)
        cuts = attached_depths(cache)
    lengths = case["seq_len_per_layer"].tolist()
    assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
    rows = torch.arange(lengths[0])
    for stage, layer in enumerate(layers, 1):
        rows = rows[case[f"kept_rows_stage{stage}"].long()]
        left = cuts[layer].column[0] if cuts[layer] is not None else torch.arange(lengths[0])  # None: nothing went yet
        assert left.tolist() == rows.tolist()
    assert (found[:, rows] - case["last_hidden_state"]).abs().max() <= 2e-5
    assert attached.report()["pyramiddrop"]["layers"] == list(layers)


def attached_depths(cache):
    return cache._sightline.cuts.depths


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.0, 0.1, 0.125, 0.5, 0.75, 1.0]), count=st.integers(1, 40))
def test_counts_are_those_of_the_original(seed, ratio, count):
    """int(V rho) of every picture, text never touched, the best ones, and fewer at a smaller ratio."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((2, count + 7), -1)
    image[0, 2 : 2 + count] = 0
    image[1, 1 : 1 + count // 2] = 0
    image[1, 4 + count // 2 : 4 + count] = 1
    totals = torch.stack([(image == 0).sum(1), (image == 1).sum(1)], 1)
    found = kept(torch.rand(2, count + 7, generator=generator), image, totals, ratio)
    assert found[image < 0].all()
    for row in range(2):
        for picture_number in range(2):
            total = int(totals[row, picture_number])
            assert int((found & (image == picture_number))[row].sum()) == int(total * ratio)
    fewer = kept(torch.rand(2, count + 7, generator=torch.Generator().manual_seed(seed)), image, totals, ratio / 2)
    assert not (fewer & ~found).any()


def test_a_constant_on_the_logits_changes_nothing():
    logits = torch.randn(2, 4, 3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scores(logits.softmax(-1)), scores((logits + 5.0).softmax(-1)), atol=1e-6)
    half = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.allclose(scores(logits.softmax(-1), half)[0], logits.softmax(-1)[0, :, [0, 2]].mean((0, 1)), atol=1e-6)


def test_who_ranks_in_training():
    """The token before the first label of every answer; nobody where nothing is supervised; never padding."""
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7, -100], [-100] * 7, [-100, 4, 4, 4, 4, -100, 3]])
    real = torch.ones(3, 7, dtype=torch.bool)
    real[2, 0] = False
    assert asking_rows(labels, real).nonzero().tolist() == [[0, 1], [0, 4], [2, 5]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_training(side, tiny):
    """Loss and gradients flow; a row without any answer keeps all its tokens; answers do not change what is dropped."""
    host = tiny("llava")
    model = copy.deepcopy(host.model).train()
    inputs = host.inputs(["Is there a dog?", "How many?"], [[picture()], [picture(80, 64, 1)]], padding_side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    real = inputs["attention_mask"].bool()
    last = torch.where(real, torch.arange(real.shape[1]), -1).amax(1)
    labels[0, last[0] - 1 : last[0] + 1] = inputs["input_ids"][0, last[0] - 1 : last[0] + 1]
    with sl.attach(model, PyramidDrop(layer_list=(1, 2), image_token_ratio_list=(0.5, 0.25))) as attached:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    assert loss.isfinite()
    gradient = model.model.language_model.layers[3].mlp.up_proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    report = attached.report()["pyramiddrop"]
    assert report["image_tokens_before"] == [72, 18 + 36]
    assert report["image_tokens_after"] == [18 + 36, 9 + 36]


def test_pictures_are_ranked_apart_or_together(tiny):
    host = tiny("gemma3")
    inputs = host.inputs(["Both?"], [[picture(), picture(80, 64, 1)]])
    found = {}
    for apart in (True, False):
        with sl.attach(host.model, PyramidDrop((2,), (0.4,), per_image=apart)), torch.no_grad():
            tokens = attached_depths(made_cache(host.model(**inputs)))[2].tokens
        found[apart] = [int((tokens.image == k).sum()) for k in range(2)]
    assert found[True] == [3, 3]  # int(9 * 0.4)
    assert sum(found[False]) == 7  # int(18 * 0.4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_token_ratio_list": (0.5, 0.75)}, "must not rise"),
        ({"image_token_ratio_list": (1.5,)}, "out of range"),
        ({"layer_list": (2, 1), "image_token_ratio_list": (0.5, 0.25)}, "must rise"),
        ({"layer_list": (1,)}, "one layer for each"),
        ({"layer_list": (0, 1, 2)}, "out of range"),
    ],
)
def test_bad_parameters(options, match):
    with pytest.raises(ParameterError, match=match):
        PyramidDrop(**options)


def test_layers_that_do_not_suit_the_model(tiny):
    with pytest.raises(ParameterError, match=r"\[1, 3\]"):
        sl.attach(tiny("llava").model, PyramidDrop(layer_list=(8, 16, 24)))
    model = tiny("llava").model
    assert PyramidDrop().prepare(shape_of(model, sl.hosts.find(model))) == {
        1: 0.5,
        2: 0.25,
        3: 0.125,
    }

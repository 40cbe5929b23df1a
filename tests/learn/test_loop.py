from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.learn import loop
from sightline.learn.recipe import TOY, Plan, Recipe

PLAN = Plan(12, 4, 1e-2, warmup=3)


def job(folder, width=3, muon=0.0, **more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))
    plan = replace(PLAN, muon=muon)
    return net, loop.Trainer("job", loop.named("", net), plan, folder, save_every=2, **more)


def batches(first):
    for step in range(first, PLAN.steps):
        yield torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


class KilledError(Exception):
    pass


def run(net, trainer, die_at=None):
    def loss_of(x):
        if die_at is not None and trainer.step == die_at:
            raise KilledError
        return (net(x) - x.sum(1, keepdim=True)).pow(2).mean(), {"size": 1.0}

    trainer.run(batches, loss_of)


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_a_killed_run_resumes_to_the_same_weights_bit_by_bit(tmp_path, muon):
    whole, trainer = job(tmp_path / "whole", muon=muon)
    run(whole, trainer)
    broken, first = job(tmp_path / "parts", muon=muon)
    with pytest.raises(KilledError):
        run(broken, first, die_at=7)
    torch.manual_seed(99)
    resumed, second = job(tmp_path / "parts", muon=muon)
    assert second.step == 6
    run(resumed, second)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in trainer.curve] == [row["loss"] for row in second.curve]


def test_a_finished_run_is_not_run_again(tmp_path):
    run(*job(tmp_path))
    net, trainer = job(tmp_path)
    assert trainer.done
    run(net, trainer, die_at=12)
    assert trainer.step == 12


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    run(*job(tmp_path))
    with pytest.raises(InputError, match="another recipe"):
        job(tmp_path, width=4)


def test_minutes_end_the_stage_early_with_the_rate_at_its_floor(tmp_path):
    net, trainer = job(tmp_path, minutes=1e-9)
    run(net, trainer)
    assert trainer.step == 1
    assert trainer.done


def test_rate_warms_up_then_falls_to_the_floor():
    rates = [loop.rate(PLAN, step, step / PLAN.steps) for step in range(PLAN.steps + 1)]
    assert rates[0] < rates[1] < rates[2]
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(PLAN.lr * loop.FLOOR)


def test_weight_decay_spares_vectors(tmp_path):
    _, trainer = job(tmp_path)
    for group in trainer.optimizers[0].param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_takes_the_matrices_of_layers_and_nothing_else():
    names = {"decoder.embed_tokens.weight": (7, 4), "decoder.layers.0.q.weight": (4, 4), "decoder.norm.weight": (4,),
             "projector.linear_1.weight": (4, 4)}  # fmt: skip
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    adam, muon = loop.optimizers(parameters, replace(PLAN, muon=0.02, slow=0.3))
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(parameters["decoder.layers.0.q.weight"])]
    peaks = {id(p): g["peak"] for g in adam.param_groups for p in g["params"]}
    assert peaks[id(parameters["decoder.norm.weight"])] == PLAN.lr
    assert peaks[id(parameters["projector.linear_1.weight"])] == pytest.approx(0.3 * PLAN.lr)
    assert peaks[id(parameters["decoder.embed_tokens.weight"])] == pytest.approx(0.3 * PLAN.lr)
    (only,) = loop.optimizers(parameters, PLAN)
    assert isinstance(only, torch.optim.AdamW)


def test_precision_names():
    cpu = torch.device("cpu")
    assert loop.precision_of("bf16", cpu) is torch.bfloat16
    assert loop.precision_of("fp32", cpu) is None
    with pytest.raises(ParameterError, match="fp64"):
        loop.precision_of("fp64", cpu)


def test_recipe_scales_and_names_stages():
    assert Recipe().scaled(0.5).tower.steps == Recipe().tower.steps // 2
    assert TOY.with_steps("instruct", 7).instruct.steps == 7
    assert TOY.with_steps("instruct", 7) == replace(TOY, instruct=replace(TOY.instruct, steps=7, warmup=1))
    with pytest.raises(UnknownNameError, match="instruct"):
        Recipe().plan("instrct")
    with pytest.raises(ParameterError):
        Recipe().scaled(0)
    with pytest.raises(ParameterError):
        Recipe().with_steps("tower", 0)


def test_curves_are_drawn_one_panel_a_stage():
    figure = loop.draw_curves({"a": [{"step": 1, "loss": 2.0}], "b": [{"step": 1, "loss": 1.0}]})
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]

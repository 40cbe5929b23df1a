"""Thinking and preference: what is said is true, what is falsified differs by one fact, and the loss's laws."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from sightline import hosts, scenes
from sightline.learn import films, reasoning
from sightline.learn.reasoning import changed, falsified, response, tdpo_loss, weighted
from sightline.lvlm import LVLM
from tests.tiny_hosts import TINY


def test_thinking_is_true_and_its_twin_is_not() -> None:
    told = 0
    for number in range(25):
        seed, asked = films.question(0, number, ("motion", "presence"))
        assert films.question(0, number, ("motion", "presence")) == (seed, asked)
        film = scenes.film(seed, **films.GLANCE)
        text = response(film, asked)
        track = film.tracks[asked.about[0]]
        if track.direction in ("left", "right"):
            assert f"to the {track.direction}" in text
        assert text.endswith(f"Answer: {asked.answer}")
        twin = falsified(text, np.random.default_rng(number))
        if twin is not None:
            told += 1
            assert twin != text
            assert twin.split(" Answer:")[1] == text.split(" Answer:")[1]
    assert told > 15


def test_changed_tokens() -> None:
    first, second = changed([1, 2, 3, 4, 5], [1, 9, 3, 5])
    assert first.tolist() == [False, True, False, True, False]
    assert second.tolist() == [False, True, False, False]
    assert not changed([1, 2], [1, 2])[0].any()
    assert changed([], [7])[1].all()


def test_the_loss() -> None:
    logp = -torch.rand(3, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]] * 3).bool()
    none, some = torch.zeros_like(mask), torch.zeros_like(mask)
    some[:, 2] = True
    mean = weighted(logp, mask, none)
    assert torch.allclose(mean, logp[:, 1:5].mean(1))
    assert torch.equal(weighted(logp, mask, none, gamma=9), mean)  # gamma matters only where something changed
    assert torch.allclose(weighted(logp, mask, some, gamma=1), mean)
    five = (logp[:, 1] + 5 * logp[:, 2] + logp[:, 3] + logp[:, 4]) / 8
    assert torch.allclose(weighted(logp, mask, some, gamma=5), five)
    assert torch.allclose(weighted(logp, mask, none, normalise=False), logp[:, 1:5].sum(1))
    same = torch.randn(4, requires_grad=True)
    loss = tdpo_loss(same, same, torch.zeros(4), torch.zeros(4))
    assert math.isclose(float(loss.detach()), math.log(2), rel_tol=1e-6)
    loss.backward()
    assert same.grad.abs().max() == 0
    assert tdpo_loss(same + 1, same, same, same) < loss


@pytest.mark.parametrize("training", ["srft", "tdpo"])
def test_training(training, tmp_path) -> None:
    tiny = TINY["llava"]()
    lvlm = LVLM(deepcopy(tiny.model), tiny.processor, hosts.find(tiny.model), "llava")
    plan = reasoning.plan_for(training, steps=2, batch=2)
    before = {k: v.clone() for k, v in lvlm.model.state_dict().items()}
    trainer = getattr(reasoning, training)(lvlm, plan, tmp_path, frames=3, size=56)
    assert trainer.done
    if training == "tdpo":
        assert math.isclose(trainer.curve[0]["loss"], math.log(2), abs_tol=1e-4)  # the policy is the reference
    moved = {k for k, v in lvlm.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("language_model" in k for k in moved)
    assert not any("vision_tower" in k for k in moved)

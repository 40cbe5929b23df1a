"""VHR: laws of the divergence, and a reference made of hooks on the output projection of plain hosts."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline.errors import ParameterError
from sightline.hosts import find, get
from sightline.steer.vhr import VHR, default_layers, head_divergence, select_heads, without_outliers
from tests.engine.numerics import assert_close
from tests.engine.test_doors import words
from tests.engine.whole import forward, generate
from tests.tiny_hosts import picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), heads=st.integers(1, 9), scale=st.floats(0.1, 50))
def test_laws(seed: int, heads: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    seeing, blind = torch.randn(2, 3, heads, 5, generator=generator)
    divergence = head_divergence(seeing, blind)
    assert (divergence >= 0).all()
    assert (head_divergence(seeing, seeing) == 0).all()
    assert torch.allclose(head_divergence(seeing * scale, blind * scale), scale * divergence, rtol=1e-4)
    chosen = select_heads(divergence)
    assert (chosen.sum(-1) == heads // 2).all()  # without ties exactly the upper half, the median itself out
    others = torch.where(chosen, torch.inf, divergence)
    best = torch.where(chosen, divergence, -torch.inf)
    assert (
        heads == 1
        or (
            torch.where(chosen, divergence, torch.inf).amin(-1) > torch.where(chosen, -torch.inf, others).amax(-1)
        ).all()
    )
    assert heads == 1 or best.amax(-1).eq(divergence.amax(-1)).all()
    assert (select_heads(divergence, 0.25).sum(-1) <= select_heads(divergence, 0.75).sum(-1)).all()


def test_no_picture_and_ties_choose_nothing() -> None:
    assert not select_heads(torch.zeros(2, 8)).any()
    assert select_heads(torch.tensor([1.0, 2.0, 2.0, 2.0])).sum() == 0
    assert select_heads(torch.tensor([1.0, 1.0, 2.0, 3.0])).tolist() == [False, False, True, True]


def test_a_surge_without_the_picture_is_not_visual() -> None:
    """Heads 0 and 1 diverge as much; head 0 because it surges blind, head 1 because it falls silent. Head 2 is always loud."""
    seeing, blind = torch.ones(12, 3), torch.ones(12, 3)
    blind[0], seeing[1], blind[1], seeing[2:3], blind[2:3] = 9.0, 9.0, 1.0, 8.0, 8.0
    divergence = head_divergence(seeing, blind)
    found = without_outliers(divergence, blind)
    assert found[0] == 0
    assert divergence[0] == divergence[1] == found[1]
    assert torch.equal(found[1:], divergence[1:])
    one = torch.ones(2, 1)
    assert torch.equal(without_outliers(one, torch.ones(2, 1, 3)), one)


def test_layers() -> None:
    assert default_layers(32) == (1, *range(18, 32))
    assert default_layers(4) == (1, 2, 3)
    assert default_layers(1) == (0,)
    with pytest.raises(ParameterError, match="layers"):
        VHR(layers=(-1,))


def projections(model) -> list[torch.nn.Module]:
    layers = get(get(model, find(model).decoder), "layers")
    return [layer.self_attn.o_proj for layer in layers]


class ByHooks:
    """VHR on the inputs of the output projections, left-padded rows, written out: alpha, layers, chosen heads."""

    def __init__(self, host, alpha: float, layers: tuple[int, ...]) -> None:
        self.host, self.alpha, self.layers = host, alpha, layers
        self.blind: dict[int, torch.Tensor] = {}
        self.gain: dict[int, torch.Tensor] = {}

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, -1].view(len(x), 4, -1)

    def see_blind(self, layer: int, module, args) -> None:
        self.blind[layer] = self.split(args[0])

    def scale(self, layer: int, module, args):
        x = args[0]
        seeing, blind = self.split(x), self.blind[layer]
        if layer not in self.gain:
            divergence = (seeing - blind).norm(dim=-1)
            loud = blind.norm(dim=-1) ** 2
            far, surging = (x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) for x in (divergence, loud))
            score = torch.where(surging & far, 0.0, divergence)
            chosen = score > score.median(-1, keepdim=True).values  # the lower of two middle ones ...
            ordered = score.sort(-1).values
            chosen &= score > (ordered[:, 1:2] + ordered[:, 2:3]) / 2  # ... of four heads
            self.gain[layer] = torch.where(chosen, self.alpha, 1.0)
        last = (seeing * self.gain[layer][..., None]).flatten(1)
        return (torch.cat([x[:, :-1], last[:, None]], 1),)

    def hooked(self, hook) -> ExitStack:
        stack = ExitStack()
        for layer in self.layers:
            handle = projections(self.host.model)[layer].register_forward_pre_hook(partial(hook, layer))
            stack.callback(handle.remove)
        return stack


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm", "gemma3"])
def test_against_hooks(name: str, tiny) -> None:
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    reference = ByHooks(host, 2.5, (1, 3))
    with reference.hooked(reference.see_blind):
        forward(host.model, words(host))
    with reference.hooked(reference.scale):
        ids, steps = generate(host.model, inputs)
    with sl.attach(host.model, VHR(alpha=2.5, layers=(1, 3))) as attached:
        found, ours = generate(host.model, inputs)
    assert torch.equal(found, ids)
    assert_close("logits", ours, steps, 2e-5)
    report = attached.report()["vhr"]
    chosen = [int((reference.gain[layer] > 1).sum()) for layer in (1, 3)]
    assert report["layers"] == [1, 3]
    assert report["heads_chosen"] == chosen
    assert all(d > 0 for d in report["mean_divergence"])


def test_with_and_without_cache(tiny) -> None:
    """The heads chosen at the first token stay chosen."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    with sl.attach(host.model, VHR(alpha=3.0)):
        ids, steps = generate(host.model, inputs)
        again, whole = generate(host.model, inputs, use_cache=False)
    assert torch.equal(ids, again)
    assert_close("steps", steps, whole, 2e-5)


def test_only_the_answer_is_touched(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    plain = forward(host.model, inputs)
    with sl.attach(host.model, VHR(alpha=3.0)):
        found = forward(host.model, inputs)
    assert torch.equal(found[:, :-1], plain[:, :-1])
    assert (found[:, -1] - plain[:, -1]).abs().max() > 1e-2


def test_layers_beyond_the_model_are_refused(tiny) -> None:
    host = tiny("llava")
    with pytest.raises(ParameterError, match=r"layers=\(4,\).*\[0, 3\]"):
        sl.attach(host.model, VHR(layers=(4,)))

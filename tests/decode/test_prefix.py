"""Second prompts go on from what they share with the first: the same numbers, fewer positions read, and only where it holds."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline.decode import AGLA, LQCD, VDGD
from sightline.engine.prefix import Prefix, counted
from sightline.hosts import find, get
from tests.engine.numerics import assert_close
from tests.engine.whole import generate
from tests.tiny_hosts import picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [[picture()], [picture(80, 64, 1)]]
LEADING = LQCD(alpha=2.0, beta=0.0, lead="I think that the answer is yes.")
OPTIONS = {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}}


def inputs(host):
    return host.inputs(QUESTIONS, PICTURES)


def blocks(host, system, *more, **options) -> tuple[tuple, list[int]]:
    """What is generated, and the length of every block that the decoder reads."""
    decoder, lengths = get(host.model, find(host.model).decoder), []
    with sl.attach(host.model, system, *more):
        hook = decoder.register_forward_pre_hook(
            lambda m, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        try:
            return generate(host.model, inputs(host), **options), lengths
        finally:
            hook.remove()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "smolvlm"])
@pytest.mark.parametrize("system", [LEADING, VDGD(alpha=0.3, description_tokens=3)], ids=["lqcd", "vdgd"])
def test_what_is_shared_is_not_read_again(system, name, options, tiny, monkeypatch) -> None:
    host = tiny(name)
    found, short = blocks(host, system, **OPTIONS[options])
    monkeypatch.setattr(Prefix, "resume", lambda *_: None)
    wanted, long = blocks(host, system, **OPTIONS[options])
    assert torch.equal(found[0], wanted[0])
    both = found[1].isfinite()
    assert torch.equal(both, wanted[1].isfinite())
    assert_close("logits", found[1][both], wanted[1][both], 2e-5)
    later = [(a, b) for a, b in zip(short, long, strict=True) if b > 1][1:]
    assert later
    visual = int((inputs(host)["input_ids"] == host.model.config.image_token_id).sum(1).min())
    assert all(a <= b - visual for a, b in later), (later, visual)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_positions_of_three_axes_and_sliding_windows_are_read_whole(name, tiny) -> None:
    _, lengths = blocks(tiny(name), LEADING)
    first, second = (n for n in lengths if n > 1)
    assert second > first / 2


def test_other_pictures_and_other_systems_are_read_whole(tiny) -> None:
    host = tiny("llava")
    for systems in ((AGLA(alpha=2.0, beta=0.0, ratio=0.3),), (LEADING, sl.record())):
        _, lengths = blocks(host, *systems)
        first, second = (n for n in lengths if n > 1)
        assert second >= first


def test_positions_counted_from_the_first_token() -> None:
    real = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    assert counted(torch.tensor([[0, 0, 1], [0, 1, 2]]), real)
    assert counted(torch.arange(3)[None], real[1:])
    assert not counted(torch.arange(3)[None], real)
    assert not counted(None, real)
    assert not counted(torch.zeros(3, 2, 3), real)

"""MoH without a router: gates inside a real decoder, against the projection of its heads; what is refused."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline.errors import ParameterError
from sightline.mix.moh import norm_gates
from sightline.steer.moh_llm import MoHLLM
from tests.tiny_hosts import picture


@torch.no_grad()
def test_unpicked_heads_do_not_reach_the_projection(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?"], [[picture()]])
    attention = next(m for n, m in host.model.named_modules() if n.endswith("layers.0.self_attn") and "vision" not in n)
    heads, seen = host.model.config.get_text_config().num_attention_heads, {}
    hooks = [
        attention.q_proj.register_forward_hook(lambda _, __, out: seen.update(q=out)),
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    try:
        host.model(**inputs)
        plain = seen["heads"].unflatten(-1, (heads, -1))
        with sl.attach(host.model, MoHLLM(shared=0.5, routed=0.25)) as attached:
            host.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    gates = norm_gates(
        seen["q"].unflatten(-1, (heads, -1)), heads // 2, heads // 4
    )  # before the rotary embedding, as official
    assert (gates.sum(-1) == heads // 2 + heads // 4).all()
    torch.testing.assert_close(seen["heads"].unflatten(-1, (heads, -1)), plain * gates[..., None], rtol=1e-4, atol=1e-6)
    assert attached.report()


def test_equal_norms_pick_the_first_heads() -> None:
    gates = norm_gates(torch.ones(1, 1, 6, 4), 2, 1)
    assert gates.tolist() == [[[1, 1, 1, 0, 0, 0]]]


@pytest.mark.parametrize("shares", [{"shared": 1.5}, {"routed": -0.1}])
def test_shares_out_of_range(shares) -> None:
    with pytest.raises(ParameterError, match="out of range"):
        MoHLLM(**shares)


def test_no_head_left(tiny) -> None:
    model = tiny("llava").model
    with pytest.raises(ParameterError, match="leave none"), sl.attach(model, MoHLLM(shared=0.1, routed=0.1)):
        pass

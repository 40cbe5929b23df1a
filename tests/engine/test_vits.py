"""Attention of vision towers: plain transformers (timm's fused kernel, transformers' interface) and those of LVLMs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sightline as sl
from sightline.engine.attention import Edit, Probe
from sightline.errors import HostError
from tests.engine.numerics import assert_close
from tests.engine.test_traps import CLOSE, batch
from tests.engine.toys import look, toy
from tests.engine.whole import LAYERS, NAME, forward, times
from tests.tiny_hosts import TINY, TINY_VITS, picture

TIMM = [name for name in TINY_VITS if name.startswith("timm")]
TRANSFORMERS = [name for name in TINY_VITS if name not in TIMM]
PICTURES = [picture(), picture(80, 64, 1), picture(48, 48, 2)]
FACTOR = 4.0


def run(vit, model=None) -> torch.Tensor:
    model = vit.model if model is None else model
    inputs = vit.inputs(PICTURES)
    if isinstance(inputs, torch.Tensor):
        return model.forward_features(inputs)
    return model(**inputs).last_hidden_state


def first_key(layer: int = 1):
    """The first key of a layer gets FACTOR times the attention of every query."""

    def attention(site):
        if site.layer != layer:
            return None
        return Edit(groups=torch.ones(1, 1, 1), factors=lambda masses, first: torch.full_like(masses, FACTOR))

    return toy(vision_attention=attention)


def with_whole_maps(model: nn.Module, modules: list[nn.Module], edited: int = 1, **target) -> nn.Module:
    """The copied model with the same edit on whole maps; `modules` are its tower's attention modules."""
    model.set_attn_implementation(target or NAME)
    for layer, module in enumerate(modules):
        module.layer_idx = LAYERS[0] if layer == edited else -1
        module.change, module.columns = times(FACTOR), torch.ones(1, 1, dtype=torch.bool)
    return model


@pytest.mark.parametrize("name", TINY_VITS)
def test_looking_changes_no_bit(name, tiny_vit):
    vit = tiny_vit(name)
    with torch.no_grad():
        plain = run(vit)
        with sl.attach(vit.model, look(lambda *_: None, "vision_attention"), toy(pixels=lambda site, x: None)):
            assert torch.equal(run(vit), plain)
        assert torch.equal(run(vit), plain)


@pytest.mark.parametrize("name", TIMM)
def test_timm_rows_are_those_of_the_unfused_model(name, tiny_vit):
    vit = tiny_vit(name)
    unfused, wanted, seen = copy.deepcopy(vit.model), {}, {}
    for i, block in enumerate(unfused.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out, i=i: wanted.__setitem__(i, out))
    with torch.no_grad():
        run(vit, unfused)
        with sl.attach(vit.model, look(lambda site, w, first: seen.__setitem__(site.layer, w), "vision_attention")):
            run(vit)
    assert list(seen) == [0, 1]
    for layer, rows in seen.items():
        assert rows.shape == (3, 4, 36 + vit.model.num_prefix_tokens, 36 + vit.model.num_prefix_tokens)
        assert_close(f"layer {layer}", rows, wanted[layer], CLOSE)


@pytest.mark.parametrize("name", TIMM)
def test_timm_edits_and_their_gradients(name, tiny_vit):
    vit = tiny_vit(name)
    unfused = copy.deepcopy(vit.model)
    scale = torch.ones(36 + vit.model.num_prefix_tokens)
    scale[0] = FACTOR
    for block in unfused.blocks:
        block.attn.fused_attn = False
    unfused.blocks[1].attn.attn_drop.register_forward_hook(lambda m, args, out: out * scale)
    model = copy.deepcopy(vit.model)
    with sl.attach(model, first_key()):
        found = run(vit, model)
        found.square().mean().backward()
    wanted = run(vit, unfused)
    wanted.square().mean().backward()
    assert_close("features", found, wanted, CLOSE)
    assert (found - run(vit, model)).abs().max() > 1e-2
    for (key, p), (_, q) in zip(model.named_parameters(), unfused.named_parameters(), strict=True):
        if q.grad is not None and q.grad.abs().max() > 1e-6:
            assert_close(key, p.grad, q.grad, 1e-4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_rows_are_those_of_the_eager_model(name, tiny_vit):
    vit = tiny_vit(name)
    eager, seen = copy.deepcopy(vit.model), {}
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = eager(**vit.inputs(PICTURES), output_attentions=True).attentions
        with sl.attach(vit.model, look(lambda site, w, first: seen.__setitem__(site.layer, w), "vision_attention")):
            run(vit)
    assert len(wanted) == len(seen) == 2
    for layer, rows in seen.items():
        assert_close(f"layer {layer}", rows, wanted[layer], CLOSE)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_edits(name, tiny_vit):
    vit = tiny_vit(name)
    with torch.no_grad():
        with sl.attach(vit.model, first_key()) as attached:
            found = run(vit)
            paths = [p for p, m in vit.model.named_modules() if m in attached.tower_attention()]
        oracle = copy.deepcopy(vit.model)
        oracle = with_whole_maps(oracle, [oracle.get_submodule(p) for p in paths])
        assert_close("features", found, run(vit, oracle), CLOSE)
        assert (found - run(vit)).abs().max() > 1e-2


@pytest.mark.parametrize("name", TINY)
def test_towers_of_language_models(name, tiny):
    """The same edit in the tower of every family: crops as rows, packed pictures, windows."""
    host = tiny(name)
    inputs = batch(host)
    with sl.attach(host.model, first_key(layer=0)) as attached:  # LLaVA drops the last layer of its tower
        found = forward(host.model, inputs)
        paths = [p for p, m in host.model.named_modules() if m in attached.tower_attention()]
    oracle = copy.deepcopy(host.model)
    oracle = with_whole_maps(oracle, [oracle.get_submodule(p) for p in paths], edited=0, vision_config=NAME)
    real = inputs["attention_mask"].bool()
    assert_close("logits", found[real], forward(oracle, inputs)[real], CLOSE)
    assert (found - forward(host.model, inputs))[real].abs().max() > 1e-3


def test_one_query_of_a_tower(tiny_vit):
    """The row of the class token alone, as pruners want it, is asked for by position."""
    vit = tiny_vit("clip")
    seen = []
    probe = toy(vision_attention=lambda site: Probe(lambda w, first: seen.append((first, tuple(w.shape))), stop=1))
    with torch.no_grad(), sl.attach(vit.model, probe):
        run(vit)
    assert seen == [(0, (3, 4, 1, 37))] * 2


def test_timm_without_the_fused_kernel_is_refused(tiny_vit):
    model = copy.deepcopy(tiny_vit("timm").model)
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(HostError, match=r"fused_attn is False.*TIMM_FUSED_ATTN"):
        sl.attach(model, first_key())
    assert not any("_sightline" in key for m in model.modules() for key in m.__dict__)


def test_timm_in_training_with_dropout_is_refused(tiny_vit):
    model = copy.deepcopy(tiny_vit("timm").model).train()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.1
    with sl.attach(model, first_key()), pytest.raises(HostError, match=r"dropout.*eval\(\)"):
        run(tiny_vit("timm"), model)


def test_timm_after_an_exception_torch_is_itself_again(tiny_vit):
    vit = tiny_vit("timm")

    def fail(site):
        raise ZeroDivisionError

    with sl.attach(vit.model, toy(vision_attention=fail)), pytest.raises(ZeroDivisionError):
        run(vit)
    assert torch.overrides._len_torch_function_stack() == 0 if hasattr(torch.overrides, "_len_torch_function_stack") else (
        torch._C._len_torch_function_stack() == 0
    )  # fmt: skip


def test_timm_masks_of_two_and_three_axes(tiny_vit):
    """timm hands a mask on as it is: (N, N), (B, N, N) or (B, 1, N, N)."""
    vit = tiny_vit("timm")
    attention, x = vit.model.blocks[1].attn, torch.randn(3, 37, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(37, 37, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = True
    with torch.no_grad(), sl.attach(vit.model, first_key()):
        four = attention(x, attn_mask=mask.expand(3, 1, -1, -1))
        assert_close("two axes", attention(x, attn_mask=mask), four, 1e-6)
        assert_close("three axes", attention(x, attn_mask=mask.expand(1, -1, -1)), four, 1e-6)

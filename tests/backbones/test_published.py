"""Published variants: parameters, operations, checkpoint layouts; counted and loaded on the meta device."""

from __future__ import annotations

import pytest
import torch

from sightline import backbones
from sightline.backbones import VARIANTS, counting, create
from sightline.errors import UnknownNameError
from tests.backbones.published import checkpoint, layouts

LAYOUTS = layouts()
BIG = ("davit_giant", "davit_huge", "volo_d5_224", "volo_d4_224")


def rounded(found: float, published: float, unit: float) -> bool:
    """Within 1 per cent, or within what the publication's last digit leaves open."""
    return abs(found - published) <= max(0.01 * published, unit / 2)


def last_digit(value: float) -> float:
    text = f"{value:g}"
    return 10.0 ** -len(text.partition(".")[2])


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in BIG])
def test_parameters(name) -> None:
    variant = VARIANTS[name]
    count = counting.parameters(create(name, device="meta"))
    if variant.parameters is not None:
        assert count == variant.parameters
    elif variant.millions is not None:
        assert rounded(count / 1e6, variant.millions, last_digit(variant.millions))
    assert variant.parameters or variant.millions


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_parameters_of_the_big(name) -> None:
    assert counting.parameters(create(name, device="meta")) == VARIANTS[name].parameters


QUICK = ("biformer_tiny", "litv2_small", "agent_deit_tiny", "agent_pvt_tiny", "inline_swin_tiny", "inline_cswin_tiny")
WITH_MACS = [n for n, v in VARIANTS.items() if v.macs]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WITH_MACS])
def test_operations(name) -> None:
    variant = VARIANTS[name]
    found = counting.macs(create(name, device="meta"), variant.size) / 1e9
    assert rounded(found, variant.macs, last_digit(variant.macs))


def test_operations_of_one_convolution_and_of_the_deformable_one() -> None:
    from sightline.backbones.litv2 import DeformableMerging

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merge = DeformableMerging(3)

        def forward(self, x):
            return self.merge(x.movedim(1, -1))

    offsets, merged = 16 * 8 * 3 * 4, 16 * 6 * 3 * 4
    assert counting.macs(Alone(), 8) == offsets + merged


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_published_checkpoint_loads_strictly(name) -> None:
    create(name, device="meta").load_state_dict(checkpoint(LAYOUTS[name]))


@pytest.mark.parametrize("name", ["biformer_tiny", "agent_cswin_tiny"])
def test_a_checkpoint_that_lacks_or_adds_something_does_not(name) -> None:
    model = create(name, device="meta")
    for change in (lambda s: s.popitem(), lambda s: s.update({"stages.9": torch.zeros(1)})):
        state = checkpoint(LAYOUTS[name])
        change(state)
        with pytest.raises(RuntimeError, match="state_dict"):
            model.load_state_dict(state)


@pytest.mark.parametrize("name", ["agent_cswin_tiny", "inline_cswin_tiny"])
def test_keys_of_cswin_land_where_they_belong(name) -> None:
    state = checkpoint(LAYOUTS[name], "cpu")
    model = create(name)
    model.load_state_dict(state)
    whole, stripes = model.stage2[1].attn, model.stage3[4].attn
    assert torch.equal(whole.qkv.weight, state["stage2.1.qkv.weight"])
    assert torch.equal(whole.proj.bias, state["stage2.1.proj.bias"])
    inner = whole.dwc if name.startswith("agent") else whole.get_v
    assert torch.equal(inner.weight, state["stage2.1.attns.0.get_v.weight"])
    assert torch.equal(stripes.get_v[1].weight, state["stage3.4.attns.1.get_v.weight"])
    assert torch.equal(stripes.qkv.bias, state["stage3.4.qkv.bias"])
    again = create(name)
    again.load_state_dict(model.state_dict())  # and our own state dict loads as well
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_buffers_of_swin_checkpoints_are_computed_not_loaded() -> None:
    state = checkpoint(LAYOUTS["agent_swin_tiny"]) | {"layers.3.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    create("agent_swin_tiny", device="meta").load_state_dict(state)
    assert "layers.3.blocks.1.attn_mask" in state  # the given dict is left as it was


def test_names() -> None:
    import timm

    assert timm.is_model("biformer_t")
    assert timm.is_model("agent_swin_s_288")
    assert backbones.variant("inline_cswin_b_384") is VARIANTS["inline_cswin_base_384"]
    assert {v.system for v in VARIANTS.values()} >= {
        "biformer",
        "hilo",
        "moh",
        "agent",
        "inline",
        "flowformer",
        "davit",
    }
    assert len(backbones.of_family("agent")) == 18
    with pytest.raises(UnknownNameError, match="biformer_tiny"):
        create("biformer_tinny")
    with pytest.raises(UnknownNameError, match="litv2"):
        backbones.variant("litv3")

"""timm's interface, the same for every family: any input, features, heads, gradients. Networks with one block per stage."""

from __future__ import annotations

import pytest
import torch

from sightline.backbones import create
from sightline.errors import ParameterError

ONE = {"depths": (1, 1, 1, 1)}
SMALL: dict[str, dict] = {
    "biformer_tiny": {**ONE, "widths": (32, 32, 32, 64), "topks": (1, 4, 16, 0)},
    "biformer_stl": {**ONE, "widths": (32, 32, 32, 64)},
    "litv2_small": {**ONE, "dim": 32},
    "flowformer": {**ONE, "widths": (24, 24, 24, 36)},
    "moh_transnext_small_80": {**ONE, "widths": (48, 48, 72, 96), "shared": (2, 2, 1, 2), "routed": (0, 0, 1, 1)},
    "agent_deit_tiny": {"dim": 32, "heads": 2, "depth": 5, "agents": 9, "agent_blocks": 3},
    "agent_pvt_tiny": ONE,
    "agent_swin_tiny": {"depths": (2, 2, 2, 2), "dim": 16, "heads": 1, "mixed": (2, 1, 0, 0)},
    "agent_cswin_tiny": {**ONE, "dim": 32},
    "inline_deit_tiny": {"dim": 32, "heads": 2, "depth": 4},
    "inline_pvt_tiny": ONE,
    "inline_swin_tiny": {"depths": (2, 2, 2, 2), "dim": 16, "heads": 1, "mixed": (2, 1, 0, 0)},
    "inline_cswin_tiny": {**ONE, "dim": 32},
    "halonet_h0": {"l3": 1},
}
every = pytest.mark.parametrize("name", list(SMALL))


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return create(name, **SMALL[name], num_classes=7, **options).eval()


def picture(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@every
@torch.no_grad()
def test_parts_make_the_whole(name) -> None:
    model, x = make(name), picture()
    out = model(x)
    assert out.shape == (2, 7)
    assert out.isfinite().all()
    assert out.std() > 0
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), out)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.head(pooled), out)
    torch.testing.assert_close(model(x[1:]), out[1:], rtol=1e-4, atol=1e-5)


@every
@torch.no_grad()
def test_any_input(name) -> None:
    assert make(name)(picture(96, 70)).isfinite().all()
    assert make(name, img_size=64)(picture()).isfinite().all()


@every
@torch.no_grad()
def test_features(name) -> None:
    model = make(name, features_only=True)
    maps = model(picture())
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[-1] for m in maps] == model.feature_info.reduction()
    plain = make(name)
    last, chosen = plain.forward_intermediates(picture(), indices=[1], output_fmt="NHWC")
    assert torch.equal(last, plain.forward_features(picture()))
    assert chosen[0].shape[-1] == plain.feature_info[1]["num_chs"]


@every
def test_gradients_reach_everything(name) -> None:
    model = make(name).train()
    model(picture()).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []


@every
@torch.no_grad()
def test_a_new_head(name) -> None:
    model, x = make(name), picture()
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, global_pool="")
    assert model(x).shape == model.forward_features(x).shape
    with pytest.raises(ParameterError, match="global_pool"):
        model.reset_classifier(3, global_pool="max")


def test_bad_requests() -> None:
    model = make("litv2_small")
    with pytest.raises(ParameterError, match="output_fmt"):
        model.forward_intermediates(picture(), output_fmt="NLC")
    with pytest.raises(ParameterError, match="norm"):
        model.forward_intermediates(picture(), norm=True)


@torch.no_grad()
def test_the_size_built_for_matters_not_where_nothing_is_learned_by_place() -> None:
    """Position embeddings and biases of another size are resized: at their own size nothing changes."""
    for name in ("agent_swin_tiny", "flowformer"):
        big, small = make(name, img_size=128), make(name, img_size=64)
        assert any(a.shape != b.shape for a, b in zip(big.parameters(), small.parameters(), strict=True))
        assert big(picture()).shape == small(picture()).shape


def test_drop_path_grows_to_its_rate() -> None:
    model = make("agent_swin_tiny", drop_path_rate=0.7)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates[0] < rates[-1] == pytest.approx(0.7)


def test_bf16_autocast() -> None:
    model = make("moh_transnext_small_80")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = model(picture()).float()
    with torch.no_grad():
        assert (low - model(picture())).abs().max() < 0.05

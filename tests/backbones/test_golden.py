"""Whole networks against golden arrays: weights and logits of the official classes at small sizes."""

from __future__ import annotations

import torch

from sightline.backbones import create
from tests.mix.numbers import cases, error, load


def check(name: str, case: dict, weights: dict, **options) -> None:
    """A network with one block per stage, unless the weights say otherwise."""
    model = create(name, num_classes=case["out"].shape[-1], img_size=case["x"].shape[-1], **options).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        assert error(model(case["x"]), case["out"]) <= 1e-4


def depths(weights: dict, blocks: str) -> list[int]:
    """Blocks by stage, counted from keys that begin with `blocks` (with {} for the stage)."""
    return [len({key.split(".")[place] for key in keys}) for keys, place in _keys(weights, blocks)]


def _keys(weights: dict, blocks: str):
    for stage in range(4):
        start = blocks.format(stage)
        yield [key for key in weights if key.startswith(start)], start.count(".")


def said(case: dict, name: str, plain: list) -> list:
    """A list of the case, or what its description says."""
    return case[name].tolist() if name in case else plain


@cases("biformer", "tiny_net*")
def test_biformer(path) -> None:
    case, weights = load(path)
    widths = [len(weights[f"stages.{i}.0.norm1.weight"]) for i in range(4)]
    check(
        "biformer_tiny",
        case,
        weights,
        depths=depths(weights, "stages.{}."),
        widths=widths,
        topks=[max(k, 0) for k in said(case, "topks", [1, 2, 4, -2])],
        mlp_ratio=len(weights["stages.0.0.mlp.0.weight"]) / widths[0],
        regions=case.get("n_win", 2),
    )


@cases("hilo", "litv2_tiny_net*")
def test_litv2(path) -> None:
    case, weights = load(path)
    dim = len(weights["patch_embed.proj.weight"])
    check(
        "litv2_small",
        case,
        weights,
        depths=depths(weights, "layers.{}.blocks."),
        dim=dim,
        windows=said(case, "local_ws", [0, 0, 2, 1]),
        alpha=case.get("alpha", 0.9),
        heads=said(case, "num_heads", [1, 2, 4, 4]),
        mlp_ratio=len(weights["layers.0.blocks.0.mlp.fc1.weight"]) / dim,
    )

"""Positions of a token's patches in the tower: a token changes exactly when one of them does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sightline import hosts
from tests.hosts.squares import grey, make_local, patch_tokens, visual_tokens
from tests.tiny_hosts import TINY, TINY_VITS


class Watch:
    """Keeps what enters a layer of the tower, as (B, N, d)."""

    def __init__(self, model: torch.nn.Module, layer: int) -> None:
        host = hosts.find(model)
        layers = hosts.get(model, f"{host.tower}.{host.tower_layers}".strip("."))
        layers[layer].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.hidden = hidden.detach() if hidden.dim() == 3 else hidden.detach()[None]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", list(TINY))
def test_tokens_follow_their_patches(name: str, layer: int) -> None:
    tiny = TINY[name]()
    make_local(tiny.model)
    watch = Watch(tiny.model, layer)
    sizes, square = [(64, 48), (200, 150), (90, 100)], (48, 40, 62, 47)
    plain, inputs = visual_tokens(tiny, [[grey(sizes[0])], [grey(s) for s in sizes[1:]]])
    before = watch.hidden
    found = hosts.layouts(tiny.model, tiny.processor, inputs, sizes)
    positions = hosts.tower_positions(tiny.model, found)
    for k, size in enumerate(sizes):
        images = [grey(s, square if s == size else None) for s in sizes]
        bright, _ = visual_tokens(tiny, [images[:1], images[1:]])
        moved = ((watch.hidden - before).abs().amax(-1) > 0).numpy()  # (B, N)
        changed = np.split((bright - plain).abs().amax(-1).numpy() > 0, np.cumsum([len(p) for p in positions])[:-1])
        for j, (place, token) in enumerate(zip(positions, changed, strict=True)):
            assert token.any() == (j == k)
            real = (place >= 0).all(axis=-1)
            assert (token == (moved[place[..., 0], place[..., 1]] & real).any(axis=1)).all()


def test_shrunk_tokens_read_stitched_tiles() -> None:
    """OneVision's shrunk tokens mix patches of several tiles: their rows in the tower's batch follow."""
    tiny = TINY["llava_onevision"]()
    make_local(tiny.model)
    watch = Watch(tiny.model, 0)
    size = (200, 150)
    plain, inputs = visual_tokens(tiny, [[grey(size)]])
    before = watch.hidden
    (layout,) = hosts.layouts(tiny.model, tiny.processor, inputs, [size])
    (place,) = hosts.tower_positions(tiny.model, [layout])
    assert layout.patch_grids[1] != layout.grids[1]
    rng = np.random.default_rng(0)
    for x, y in zip(rng.integers(0, 190, 12), rng.integers(0, 140, 12), strict=True):
        bright, _ = visual_tokens(tiny, [[grey(size, (int(x), int(y), int(x) + 9, int(y) + 9))]])
        moved = ((watch.hidden - before).abs().amax(-1) > 0).numpy()
        token = (bright - plain).abs().amax(-1).numpy() > 0
        real = (place >= 0).all(axis=-1)
        assert (token == (moved[place[..., 0], place[..., 1]] & real).any(axis=1)).all()


@pytest.mark.parametrize("name", list(TINY_VITS))
def test_vit_patches_stand_behind_the_prefix(name: str) -> None:
    tiny = TINY_VITS[name]()
    make_local(tiny.model)
    watch = Watch(tiny.model, 1)
    plain, inputs = patch_tokens(tiny, [grey((64, 48)), grey((64, 48))])
    before = watch.hidden
    positions = hosts.tower_positions(tiny.model, hosts.layouts(tiny.model, tiny.processor, inputs, [(64, 48)] * 2))
    bright, _ = patch_tokens(tiny, [grey((64, 48)), grey((64, 48), (30, 20, 34, 24))])
    moved = ((watch.hidden - before).abs().amax(-1) > 0).numpy()
    assert not moved[0].any()
    token = (bright - plain).abs().amax(-1).numpy() > 0
    assert (moved[positions[1][..., 0], positions[1][..., 1]].any(axis=1) == token[36:]).all()
    assert not moved[:, : hosts.prefix(tiny.model, hosts.find(tiny.model))].any()


def test_class_token_of_strategy_full_is_a_separator() -> None:
    """LLaVA with strategy "full" keeps the class token: it stands for no place and has no patch."""
    tiny = TINY["llava"]()
    tiny.model.config.vision_feature_select_strategy = tiny.processor.vision_feature_select_strategy = "full"
    plain, inputs = visual_tokens(tiny, [[grey((48, 48))]])
    (layout,) = hosts.layouts(tiny.model, tiny.processor, inputs, [(48, 48)])
    assert len(layout) == len(plain) == 37
    assert layout.crop[0] == -1
    assert np.isnan(layout.boxes[0]).all()
    (place,) = hosts.tower_positions(tiny.model, [layout])
    assert (place[0] == -1).all()
    assert place[1].tolist() == [[0, 1]]

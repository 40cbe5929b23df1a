"""A bright square in the picture is found at the right visual token, and back: every host, through its real processor."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from sightline import hosts
from sightline.hosts.geometry import Layout
from tests.hosts.squares import Sight, grey, inner_square, make_local, overlaps, patch_tokens, slack, visual_tokens
from tests.tiny_hosts import TINY, TINY_VITS, TinyHost, TinyViT

SIZES = [(64, 48), (48, 64), (100, 30), (30, 100), (48, 48), (20, 20), (200, 150), (301, 67), (97, 211), (13, 90)]
CELL = {"smolvlm": 24, "llava": 8, "llava_next": 8, "llava_onevision": 8}  # processed pixels along a token; others 16
RESIZES = {"idefics3": 3, "smolvlm": 3}  # the picture is resized that often in a row


@lru_cache
def local_host(name: str) -> TinyHost:
    tiny = TINY[name]()
    make_local(tiny.model)
    return tiny


@lru_cache
def local_vit(name: str) -> TinyViT:
    tiny = TINY_VITS[name]()
    make_local(tiny.model)
    return tiny


def squares(layout: Layout, seed: int) -> list[tuple[int, int, int, int]]:
    """Squares well inside some tokens (of any crop), and some anywhere."""
    rng = np.random.default_rng(seed)
    boxes = layout.visible_boxes()
    seen = np.flatnonzero(~np.isnan(boxes[:, 0]))
    inside = [inner_square(boxes[t], layout.size) for t in rng.permutation(seen)[:8]]
    width, height = layout.size
    corners = [(int(rng.integers(0, width - 4)), int(rng.integers(0, height - 4))) for _ in range(3)]
    return [s for s in inside if s] + [(x, y, x + 4, y + 4) for x, y in corners]


def verify(sight: Sight, may: np.ndarray, must: np.ndarray) -> None:
    layout, square = sight.layout, sight.square
    assert not (must & ~sight.seen).any(), f"square {square}: tokens {np.flatnonzero(must & ~sight.seen)} must change"
    assert not (sight.seen & ~may).any(), f"square {square}: tokens {np.flatnonzero(sight.seen & ~may)} must not change"
    if not must.any():
        return
    x, y = (square[0] + square[2]) / 2, (square[1] + square[3]) / 2
    within = (layout.boxes[:, :2] <= square[:2]).all(axis=1) & (layout.boxes[:, 2:] >= square[2:]).all(axis=1)
    for token in np.flatnonzero(within & must):  # one token of a crop holds the whole square: it changes most
        mine = np.flatnonzero(layout.crop == layout.crop[token])
        assert layout.token_at(x, y, int(layout.crop[token])) == token == mine[sight.change[mine].argmax()]
    finest = layout.token_at(x, y)
    if finest >= 0:
        areas = np.prod(layout.boxes[:, 2:] - layout.boxes[:, :2], axis=1)
        assert areas[finest] <= np.nanmin(areas[layout.tokens_in((x, y, x + 1e-3, y + 1e-3))]) * 1.001


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", list(TINY))
def test_square_is_found_at_its_token(name: str, size: tuple[int, int]) -> None:
    tiny = local_host(name)
    plain, inputs = visual_tokens(tiny, [[grey(size)]])
    (layout,) = hosts.layouts(tiny.model, tiny.processor, inputs, [size])
    assert len(layout) == len(plain)
    tests = squares(layout, seed=sum(size))
    bright, _ = visual_tokens(tiny, [[grey(size, square)] for square in tests])
    mixed = len(layout.grids) == 2 and layout.patch_grids[1] != layout.grids[1] and name == "llava_onevision"
    resample = tiny.processor.image_processor.resample
    for square, tokens in zip(tests, bright.view(len(tests), *plain.shape), strict=True):
        sight = Sight(layout, square, (tokens - plain).norm(dim=1).numpy())
        may = overlaps(layout, square, slack(layout, CELL.get(name, 16), resample, RESIZES.get(name, 1), mixed))
        must = overlaps(layout, square) & ((layout.crop == 0) | (not mixed))
        verify(sight, may, must)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", list(TINY_VITS))
def test_square_is_found_at_its_patch(name: str, size: tuple[int, int]) -> None:
    tiny = local_vit(name)
    plain, inputs = patch_tokens(tiny, [grey(size)])
    (layout,) = hosts.layouts(tiny.model, tiny.processor, inputs, [size])
    assert len(layout) == len(plain) == 36
    tests = squares(layout, seed=sum(size))
    bright, _ = patch_tokens(tiny, [grey(size, square) for square in tests])
    for square, tokens in zip(tests, bright.view(len(tests), *plain.shape), strict=True):
        sight = Sight(layout, square, (tokens - plain).norm(dim=1).numpy())
        resample = 3 if tiny.processor is None else tiny.processor.resample
        verify(sight, overlaps(layout, square, slack(layout, 8, resample)), overlaps(layout, square))


@pytest.mark.parametrize("name", list(TINY))
def test_pictures_of_a_batch_do_not_mix(name: str) -> None:
    """Rows with one, no and two pictures; a square in one of the three changes tokens of that picture's layout only."""
    tiny = local_host(name)
    sizes = [(64, 48), (100, 30), (50, 90)]
    for changed in range(3):
        squared = [grey(s, (38, 22, 46, 29) if k == changed else None) for k, s in enumerate(sizes)]
        greys = [grey(s) for s in sizes]
        plain, inputs = visual_tokens(tiny, [greys[:1], [], greys[1:]])
        bright, _ = visual_tokens(tiny, [squared[:1], [], squared[1:]])
        found = hosts.layouts(tiny.model, tiny.processor, inputs, sizes)
        change = torch.split((bright - plain).norm(dim=1), [len(layout) for layout in found])
        for k, (layout, part) in enumerate(zip(found, change, strict=True)):
            assert layout.size == sizes[k]
            assert bool(part.max() > 0) == (k == changed)
        assert change[changed].argmax() in found[changed].tokens_in((38, 22, 46, 29))


def test_pixels_outside_the_centre_belong_to_no_token() -> None:
    """LLaVA-1.5 cuts out the centre square: a square in the margin changes nothing and has no token."""
    tiny = local_host("llava")
    size, square = (120, 48), (4, 10, 24, 30)
    plain, inputs = visual_tokens(tiny, [[grey(size)]])
    bright, _ = visual_tokens(tiny, [[grey(size, square)]])
    (layout,) = hosts.layouts(tiny.model, tiny.processor, inputs, [size])
    assert torch.equal(plain, bright)
    assert layout.token_at(14, 20) == -1
    assert len(layout.tokens_in(square)) == 0
    assert layout.token_at(36.5, 0) == 0


def test_padded_square_of_llava() -> None:
    """With `do_pad` the whole picture is seen and the padding's tokens lie outside it."""
    tiny = TINY["llava"]()
    make_local(tiny.model)
    tiny.processor.image_processor.do_pad = True
    size, square = (120, 48), (2, 10, 14, 22)
    plain, inputs = visual_tokens(tiny, [[grey(size)]])
    bright, _ = visual_tokens(tiny, [[grey(size, square)]])
    (layout,) = hosts.layouts(tiny.model, tiny.processor, inputs, [size])
    change = (bright - plain).norm(dim=1).numpy()
    assert set(np.flatnonzero(change > 1e-4 * change.max())) <= set(np.flatnonzero(overlaps(layout, square, 6)))
    assert change.argmax() == layout.token_at(8, 16)
    assert np.isnan(layout.visible_boxes()[0]).all()
    assert np.isnan(layout.visible_boxes()[:, 0]).sum() == 2 * 6  # 36 of 120 pixels above: one row and a half of 20

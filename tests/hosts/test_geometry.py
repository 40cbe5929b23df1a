"""Laws of canvases and layouts, on grids made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import InputError, ParameterError
from sightline.hosts.canvas import Canvas, grid, join, separators
from sightline.hosts.geometry import Layout

sides = st.integers(5, 120)


def two_crops(size: tuple[int, int]) -> Layout:
    """The whole picture in 2 x 3 tokens, its left half in 4 x 2 behind it, each row of which ends with a separator."""
    whole = Canvas(*size).resize(60, 40)
    half = Canvas(*size).resize(80, 80).crop(0, 0, 40, 80)
    fine = grid(half, 1, 4, 2, (20, 20))
    return join(size, [grid(whole, 0, 2, 3, (20, 20)), fine, separators(2)], [(2, 3), (4, 2)], [(2, 3), (4, 2)])


@given(size=st.tuples(sides, sides), to=st.tuples(sides, sides), box=st.tuples(sides, sides))
def test_canvas_undoes_its_steps(size: tuple[int, int], to: tuple[int, int], box: tuple[int, int]) -> None:
    """Corners of the picture are where they were, whatever was done in between."""
    canvas = Canvas(*size).pad_square().resize(*to).pad(3, 4, 5, 6).crop(2, 1, *box).resize(to[1], to[0])
    sx, sy = max(size) / to[0], max(size) / to[1]  # original pixels per pixel after the first resize
    left, top = (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
    assert canvas.bx == pytest.approx((2 - 3) * sx - left, abs=1e-6)
    assert canvas.by == pytest.approx((1 - 4) * sy - top, abs=1e-6)
    assert canvas.bx + canvas.ax * canvas.width == pytest.approx((2 - 3 + box[0]) * sx - left, rel=1e-6, abs=1e-6)
    assert canvas.by + canvas.ay * canvas.height == pytest.approx((1 - 4 + box[1]) * sy - top, rel=1e-6, abs=1e-6)


def test_grid_merges_patches_row_major() -> None:
    part = grid(Canvas(8, 4), 0, 1, 2, (4, 4), merge=2)
    assert part.patches == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert part.cell.tolist() == [[0, 0], [0, 1]]
    assert part.boxes.tolist() == [[0, 0, 4, 4], [4, 0, 8, 4]]


@given(size=st.tuples(sides, sides), x=st.floats(0, 0.999), y=st.floats(0, 0.999))
def test_point_is_in_the_box_of_its_token(size: tuple[int, int], x: float, y: float) -> None:
    layout = two_crops(size)
    px, py = x * size[0], y * size[1]
    for crop in (None, 0, 1):
        token = layout.token_at(px, py, crop)
        if token < 0:
            assert crop == 1
            assert x >= 0.499
            continue
        x0, y0, x1, y1 = layout.boxes[token]
        assert x0 <= px < x1
        assert y0 <= py < y1
        assert token in layout.tokens_in((px, py, px + 1e-3, py + 1e-3))
    if x < 0.499:
        assert layout.crop[layout.token_at(px, py)] == 1  # the finer crop wins


def test_points_and_boxes_out_of_range() -> None:
    layout = two_crops((60, 40))
    for point in ((-1, 3), (60, 3), (3, 40)):
        with pytest.raises(InputError, match="outside the picture of 60 x 40"):
            layout.token_at(*point)
    with pytest.raises(InputError, match="empty"):
        layout.tokens_in((5, 5, 5, 9))


def test_tokens_in_a_box_are_those_that_overlap_it() -> None:
    layout = two_crops((60, 40))
    assert layout.tokens_in((0, 0, 20, 20)).tolist() == [0, 6, 7, 8, 9]
    assert layout.tokens_in((19.9, 0, 20.1, 1)).tolist() == [0, 1, 7]
    assert layout.tokens_in((0, 0, 60, 40)).tolist() == list(range(14))


def test_visible_boxes_are_cut_to_the_picture() -> None:
    padded = join((10, 10), [grid(Canvas(10, 10).pad(15, 0, 5, 0), 0, 1, 3, (10, 10))], [(1, 3)], [(1, 3)])
    assert padded.boxes[:, 0].tolist() == [-15, -5, 5]
    seen = padded.visible_boxes()
    assert np.isnan(seen[0]).all()
    assert seen[1:].tolist() == [[0, 0, 5, 10], [5, 0, 10, 10]]
    assert np.isnan(two_crops((60, 40)).visible_boxes()[-1]).all()
    assert padded.boxes[0, 0] == -15  # the layout itself is left alone


def brute(layout: Layout, values: np.ndarray, size: tuple[int, int], crops: set[int], fine: int = 4) -> np.ndarray:
    """The heat map by sampling fine x fine points of every pixel."""
    width, height = size
    xs = (np.arange(width * fine) + 0.5) / fine * layout.size[0] / width
    ys = (np.arange(height * fine) + 0.5) / fine * layout.size[1] / height
    heat, weight = np.zeros((height * fine, width * fine)), np.zeros((height * fine, width * fine))
    for token, (x0, y0, x1, y1) in enumerate(layout.boxes):
        if layout.crop[token] in crops:
            inside = ((ys >= y0) & (ys < y1))[:, None] & ((xs >= x0) & (xs < x1))[None, :]
            heat += inside * values[token] / ((x1 - x0) * (y1 - y0))
            weight += inside / ((x1 - x0) * (y1 - y0))
    heat, weight = (a.reshape(height, fine, width, fine).mean((1, 3)) for a in (heat, weight))
    return np.divide(heat, weight, out=np.zeros_like(heat), where=weight > 0)


@pytest.mark.parametrize(("crops", "meant"), [("all", {0, 1}), ("base", {0}), ("detail", {1})])
@pytest.mark.parametrize("size", [(60, 40), (30, 20), (45, 50)])
def test_heatmap_is_exact(crops: str, meant: set[int], size: tuple[int, int]) -> None:
    layout, values = two_crops((60, 40)), np.random.default_rng(0).normal(size=16)
    wanted = brute(layout, values, size, meant, fine=12)
    found = layout.heatmap(values, size, crops)
    assert found.shape == (size[1], size[0])
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < (1e-5 if size != (45, 50) else 0.05)


@settings(deadline=None)
@given(size=st.tuples(sides, sides), out=st.tuples(sides, sides), crops=st.sampled_from(["all", "base"]))
def test_constant_stays_constant(size: tuple[int, int], out: tuple[int, int], crops: str) -> None:
    layout = two_crops(size)
    assert np.allclose(layout.heatmap(np.full(16, 0.3), out, crops), 0.3, atol=1e-6)


@settings(deadline=None)
@given(size=st.tuples(sides, sides), seed=st.integers(0, 99))
def test_heatmap_is_linear_and_keeps_the_mean(size: tuple[int, int], seed: int) -> None:
    """The base map's mean is the tokens' mean, for its tokens share the picture equally."""
    layout, rng = two_crops(size), np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 16))
    both = layout.heatmap(2 * a - b)
    assert np.allclose(both, 2 * layout.heatmap(a) - layout.heatmap(b), atol=1e-5)
    assert layout.heatmap(a, crops="base").mean() == pytest.approx(a[:6].mean(), abs=1e-5)


def test_heatmap_is_zero_where_no_token_looks() -> None:
    layout = two_crops((60, 40))
    detail = layout.heatmap(np.ones(16), crops="detail")
    assert (detail[:, :30] == 1).all()
    assert (detail[:, 30:] == 0).all()


def test_detail_of_a_single_crop_is_the_crop() -> None:
    layout = join((6, 6), [grid(Canvas(6, 6), 0, 2, 2, (3, 3))], [(2, 2)], [(2, 2)])
    values = np.arange(4.0)
    assert (layout.heatmap(values, crops="detail") == layout.heatmap(values, crops="base")).all()
    assert layout.heatmap(values)[:, 0].tolist() == [0, 0, 0, 2, 2, 2]


def test_heatmap_refuses_what_it_cannot_draw() -> None:
    layout = two_crops((60, 40))
    with pytest.raises(InputError, match=r"\(16,\)"):
        layout.heatmap(np.ones(15))
    with pytest.raises(ParameterError, match="'base'"):
        layout.heatmap(np.ones(16), crops="fine")
    with pytest.raises(ParameterError, match="at least"):
        layout.heatmap(np.ones(16), size=(0, 4))

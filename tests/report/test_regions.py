from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.report.regions import place, regions

from .synthetic import crops_layout, grid_layout


def test_one_blob_gives_its_box_and_share():
    layout = grid_layout((100, 60), 6, 10)
    values = np.full((6, 10), 0.001)
    values[0:2, 2:4] = 0.1
    (found,) = regions(layout, values.ravel())
    assert found.box == (20, 0, 40, 20)
    assert found.place == "upper left"
    assert found.share == pytest.approx(0.4 / values.sum())
    assert found.tokens == (2, 3, 12, 13)


def test_regions_that_meet_at_a_corner_stay_apart_and_the_larger_comes_first():
    layout = grid_layout((100, 100), 10, 10)
    values = np.zeros((10, 10))
    values[0, 0] = values[1, 1] = 1.0
    values[1, 2] = 0.5
    found = regions(layout, values.ravel(), total=5.0)
    assert [r.box for r in found] == [(10, 10, 30, 20), (0, 0, 10, 10)]
    assert [r.share for r in found] == pytest.approx([0.3, 0.2])


def test_overlapping_crops_make_one_region():
    layout = crops_layout((80, 80), [((0, 0, 80, 80), 4, 4), ((0, 0, 80, 80), 8, 8)])
    values = np.where(np.isnan(layout.boxes[:, 0]), 0.0, 0.001)
    inside = (layout.boxes[:, 0] >= 60) & (layout.boxes[:, 1] >= 60)
    values[inside] = 1.0
    (found,) = regions(layout, values)
    assert found.box == (60, 60, 80, 80)
    assert found.place == "lower right"
    assert set(found.tokens) == set(np.flatnonzero(inside))


def test_padding_has_no_box_and_separators_are_left_out():
    layout = crops_layout((100, 100), [((0, -50, 100, 150), 8, 4)])
    values = np.zeros(len(layout))
    values[0] = 1.0  # wholly above the picture
    values[4] = 50.0  # a separator
    (found,) = regions(layout, values)
    assert found.box is None
    assert found.place == "padding"
    assert found.tokens == (0,)


@pytest.mark.parametrize("values", [np.zeros(16), np.full(16, 0.3)])
def test_even_attention_has_no_region(values):
    assert regions(grid_layout((40, 40), 4, 4), values) == []


@given(st.lists(st.floats(0, 1), min_size=30, max_size=30))
def test_regions_are_disjoint_inside_the_picture_and_sorted(numbers):
    layout = grid_layout((97, 41), 5, 6)
    found = regions(layout, np.array(numbers), top=30)
    tokens = [t for r in found for t in r.tokens]
    assert len(tokens) == len(set(tokens))
    assert sum(r.share for r in found) <= 1 + 1e-9
    assert [r.share for r in found] == sorted((r.share for r in found), reverse=True)
    for r in found:
        x0, y0, x1, y1 = r.box
        assert 0 <= x0 < x1 <= 97
        assert 0 <= y0 < y1 <= 41


@pytest.mark.parametrize(
    ("box", "name"),
    [
        ((0, 0, 20, 20), "upper left"),
        ((40, 40, 60, 60), "centre"),
        ((80, 45, 100, 55), "right"),
        ((45, 80, 55, 100), "bottom"),
        ((0, 0, 100, 20), "across the top"),
        ((0, 45, 90, 55), "across the middle"),
        ((80, 0, 100, 100), "full height, right"),
        ((45, 0, 55, 100), "full height, middle"),
        ((0, 0, 99, 99), "most of the picture"),
        (None, "padding"),
    ],
)
def test_places(box, name):
    assert place(box, (100, 100)) == name

"""The selector against loops in plain Python, and its laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.engine import select
from sightline.errors import InputError, ParameterError

NAN = math.nan
rows = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=12)  # few values: many ties
few = settings(max_examples=60, deadline=None)


def naive_order(scores: list[float], valid: list[bool], protect: list[bool]) -> list[int]:
    """Best first; Python's sort is stable."""
    return sorted(range(len(scores)), key=lambda j: (not valid[j], not protect[j], -scores[j]))


def flags(data, length: int) -> list[bool]:
    return data.draw(st.lists(st.booleans(), min_size=length, max_size=length))


@few
@given(scores=rows, data=st.data())
def test_best_is_the_head_of_the_order(scores, data):
    valid, protect = flags(data, len(scores)), flags(data, len(scores))
    count = data.draw(st.integers(0, len(scores) + 2))
    order = naive_order(scores, valid, protect)
    wanted = {j for j in order[:count] if valid[j]} | {j for j in order if valid[j] and protect[j]}
    found = select.best(torch.tensor([scores]), count, valid=torch.tensor([valid]), protect=torch.tensor([protect]))
    assert set(found[0].nonzero().flatten().tolist()) == wanted
    tensor = select.best(torch.tensor([scores]), torch.tensor([count]), valid=torch.tensor([valid]))
    assert torch.equal(tensor, select.best(torch.tensor([scores]), count, valid=torch.tensor([valid])))


@few
@given(scores=rows, share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), data=st.data())
def test_mass_is_the_fewest_that_hold_it(scores, share, data):
    valid = flags(data, len(scores))
    order = [j for j in naive_order(scores, valid, [False] * len(scores)) if valid[j]]
    total, held, wanted = sum(scores[j] for j in order), 0.0, []
    for j in order:
        if wanted and share < 1 and held >= share * total:
            break
        wanted.append(j)
        held += scores[j]
    found = select.mass(torch.tensor([scores]), share, valid=torch.tensor([valid]))
    assert found[0].nonzero().flatten().tolist() == sorted(wanted)


@few
@given(scores=rows, data=st.data())
def test_parts_are_chosen_one_by_one(scores, data):
    part = data.draw(st.lists(st.integers(-1, 2), min_size=len(scores), max_size=len(scores)))
    counts = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
    wanted = []
    for p, count in enumerate(counts):
        mine = [j for j in range(len(scores)) if part[j] == p]
        wanted += sorted(mine, key=lambda j: -scores[j])[:count]
    found = select.best_in_parts(torch.tensor([scores]), torch.tensor([part]), torch.tensor([counts]))
    assert found[0].nonzero().flatten().tolist() == sorted(wanted)


def test_rows_are_independent_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    assert select.best(scores, 3).tolist() == [[True, True, True, False], [True, True, True, False]]
    assert select.best(scores, torch.tensor([1, 0])).tolist() == [[False, True, False, False], [False] * 4]
    assert select.best(torch.tensor([NAN, -math.inf, 0.0]), 1).tolist() == [False, False, True]
    many = torch.zeros(5000)  # so many equal ones that an unstable sort would mix them
    assert select.best(many, 100).nonzero().flatten().tolist() == list(range(100))
    outside = torch.tensor([False, True])  # an invalid token never stands in for a valid one, however bad that is
    assert select.best(torch.tensor([9.0, NAN]), 1, valid=outside).tolist() == [False, True]


def test_above():
    scores = torch.tensor([[0.1, 0.2, 0.3]])
    assert select.above(scores, 0.2).tolist() == [[False, True, True]]
    assert select.above(scores, 0.2, strict=True).tolist() == [[False, False, True]]
    protect = torch.tensor([[True, False, False]])
    assert select.above(scores, 0.3, protect=protect).tolist() == [[True, False, True]]


def test_split_floors_caps_and_spreads_evenly_without_weights():
    assert select.split(10, torch.tensor([1.0, 2.0, 4.0])).tolist() == [1, 2, 5]
    assert select.split(10, torch.tensor([1.0, 2.0, 4.0]), caps=3).tolist() == [1, 2, 3]
    assert select.split(10, torch.zeros(2, 4)).tolist() == [[2] * 4] * 2
    assert select.split(torch.tensor([4, 8]), torch.tensor([[1.0, 1.0], [3.0, 1.0]])).tolist() == [[2, 2], [6, 2]]


def test_whole_lines():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.5, 0.9, 0.9]])
    assert select.best_lines(scores, (3, 2), 1).tolist() == [[False] * 4 + [True] * 2]
    with pytest.raises(InputError, match="6 scores do not fill a grid of 2 x 2"):
        select.best_lines(scores, (2, 2), 1)


def test_fraction():
    assert [select.fraction(9, r) for r in (0, 0.1, 0.25, 0.5, 1)] == [1, 1, 2, 4, 9]
    assert select.fraction(9, 0.0, least=0) == 0
    assert select.fraction(0, 0.5) == 0
    with pytest.raises(ParameterError, match=r"choose ratio in \[0, 1\]"):
        select.fraction(9, 1.5)
    with pytest.raises(ParameterError, match="count=-1"):
        select.best(torch.zeros(3), -1)


def test_columns_are_sorted_and_padded():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert select.columns(mask).tolist() == [[0, 2, 3], [-1, -1, 1]]
    assert select.columns(mask, pad="right").tolist() == [[0, 2, 3], [1, -1, -1]]
    assert select.columns(mask, width=4).tolist() == [[-1, 0, 2, 3], [-1, -1, -1, 1]]
    assert select.columns(mask, pad="right", width=4).tolist() == [[0, 2, 3, -1], [1, -1, -1, -1]]
    assert select.columns(torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 0)


def test_take():
    x = torch.arange(24.0).view(2, 3, 4)
    index = torch.tensor([[0, 2], [-1, 1]])
    assert torch.equal(select.take(x, index)[0], x[0, [0, 2]])
    assert torch.equal(select.take(x, index)[1], torch.stack([torch.zeros(4), x[1, 1]]))
    assert torch.equal(
        select.take(x, index, dim=2), torch.stack([x[0][:, [0, 2]], x[1][:, [1, 1]] * torch.tensor([0, 1])])
    )
    assert select.take(torch.ones(2, 3), index, fill=7).tolist() == [[1, 1], [7, 1]]


@pytest.mark.parametrize("form", ["contiguous", "heads behind tokens", "expanded", "one wide"])
@pytest.mark.parametrize("filled", [True, False])
def test_take_is_a_gather_in_every_layout(form, filled):
    """The same entries and gradients as entry by entry, for all layouts that attention meets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 1 if form == "one wide" else 4, generator=generator)  # (B, H, N, D)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if form == "heads behind tokens" else x
    x = x[:1].expand(3, -1, -1, -1) if form == "expanded" else x
    x.requires_grad_()
    index = torch.randint(0, 5, (3, 7), generator=generator)
    index = index.masked_fill(torch.rand(3, 7, generator=generator) < 0.3, -1) if filled else index
    found = select.take(x, index, dim=2, fill=9.0, filled=filled)
    weight = torch.randn(found.shape, generator=generator)
    wanted = torch.zeros_like(x)
    for b, h, k in itertools.product(range(3), range(2), range(7)):
        i = int(index[b, k])
        assert torch.equal(found[b, h, k], torch.full_like(found[b, h, k], 9.0) if i < 0 else x[b, h, i])
        if i >= 0:
            wanted[b, h, i] += weight[b, h, k]
    got = torch.autograd.grad((found * weight).sum(), x)[0]
    assert torch.allclose(got, wanted, atol=1e-6)


@few
@given(seed=st.integers(0, 1000), count=st.integers(1, 5))
def test_merging_keeps_the_sum(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 7, 3, generator=generator)
    target = torch.randint(-1, count, (2, 7), generator=generator)
    sizes = torch.randint(1, 4, (2, 7), generator=generator).float()
    merged, total = select.merge(x, target, count, sizes=sizes)
    left = (target >= 0)[..., None] * sizes[..., None] * x
    assert torch.allclose((merged * total[..., None]).sum(1), left.sum(1), atol=1e-5)
    assert torch.equal(total.sum(1), (sizes * (target >= 0)).sum(1))
    for b in range(2):
        for m in range(count):
            mine = target[b] == m
            mean = (x[b, mine] * sizes[b, mine, None]).sum(0) / sizes[b, mine].sum() if mine.any() else torch.zeros(3)
            assert torch.allclose(merged[b, m], mean, atol=1e-6)


def test_entropy_of_nothing_is_nothing():
    assert select.entropy(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).tolist() == pytest.approx([0, math.log(2)])
    valid = torch.tensor([[True, True, False]])
    assert select.entropy(torch.tensor([[1.0, 1.0, 5.0]]), valid=valid).tolist() == pytest.approx([math.log(2)])

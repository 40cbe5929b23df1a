"""The token ledger against a ledger written down position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline.engine.tokens import Role, Tokens
from sightline.errors import InputError
from sightline.hosts.geometry import Layout

I, PAD_ID = 1, 0  # noqa: E741
FIELDS = ("role", "image", "index", "position")


def ledger(*rows: str, **options) -> Tokens:
    """A ledger from pictures of rows: `.` padding, `I` image token, letters text."""
    ids, mask = parse(*rows)
    return Tokens.from_ids(ids, I, mask, **options)


def parse(*rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[{".": PAD_ID, "I": I}.get(c, ord(c)) for c in row] for row in rows])
    return ids, torch.tensor([[c != "." for c in row] for row in rows]).long()


def naive(ids: list[int], mask: list[int], counts: list[int] | None = None, prompt: int | None = None):
    """(role, image, index) of every position of one row; counts: of the images of this row."""
    role, image, index = [], [], []
    started, seen, number, place, previous = False, False, -1, 0, False
    for column, (token, real) in enumerate(zip(ids, mask, strict=True)):
        visual = bool(real) and token == I and (prompt is None or column < prompt)
        if visual:
            new = not previous if counts is None else number < 0 or place + 1 == counts[number]
            number, place = (number + 1, 0) if new else (number, place + 1)
            seen = True
        if not real:
            role.append(Role.PAD)
        elif prompt is not None and column >= prompt:
            role.append(Role.GENERATED)
        elif visual:
            role.append(Role.IMAGE)
        elif not started:
            role.append(Role.START)
        else:
            role.append(Role.AFTER if seen else Role.BEFORE)
        started, previous = started or bool(real), visual
        image.append(number if visual else -1)
        index.append(place if visual else -1)
    return role, image, index


def same(a: Tokens, b: Tokens) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype, name


def roles(tokens: Tokens) -> list[str]:
    return ["".join(".SBIAG"[r] for r in row) for row in tokens.role.tolist()]


@pytest.mark.parametrize(
    ("row", "role", "image", "index"),
    [
        ("abIIIcd", "SBIIIAA", "--000--", "--012--"),
        ("..abIIc", ".." + "SBIIA", "----00-", "----01-"),  # left padding
        ("abIIc..", "SBIIA..", "--00---", "--01---"),  # right padding
        ("ab.II.c", "SB.II.A", "---00--", "---01--"),  # holes
        ("aIIbIIc", "SIIAIIA", "-00-11-", "-01-01-"),  # two images
        ("IIa", "IIA", "00-", "01-"),  # begins with an image: no start token
        ("abc", "SBB", "---", "---"),  # no image
        ("...", "...", "---", "---"),  # an empty row
    ],
)
def test_roles_by_hand(row, role, image, index):
    tokens = ledger(row)
    assert roles(tokens) == [role]
    assert "".join("-" if i < 0 else str(i) for i in tokens.image[0].tolist()) == image
    assert "".join("-" if i < 0 else str(i) for i in tokens.index[0].tolist()) == index
    assert tokens.position.tolist() == [list(range(len(row)))]
    assert tokens.shape == (1, len(row))


def test_adjacent_images_are_told_apart_by_their_counts():
    tokens = ledger("aIIIIIb", counts=[2, 3])
    assert tokens.image.tolist() == [[-1, 0, 0, 1, 1, 1, -1]]
    assert tokens.index.tolist() == [[-1, 0, 1, 0, 1, 2, -1]]
    assert ledger("aIIIIIb").image.tolist() == [[-1, 0, 0, 0, 0, 0, -1]]


def test_counts_number_images_per_row():
    tokens = ledger("aIIIIb", "..aIIb", "abcdef", "IIIIII", counts=[1, 3, 2, 3, 3])
    assert tokens.image.tolist()[0] == [-1, 0, 1, 1, 1, -1]
    assert tokens.image.tolist()[1] == [-1, -1, -1, 0, 0, -1]
    assert tokens.image.tolist()[3] == [0, 0, 0, 1, 1, 1]
    assert tokens.index.tolist()[3] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("counts", [[3, 3], [3, 5], []])
def test_counts_that_do_not_fit_are_refused(counts):
    """[3, 5] has the right sum, but its second image would begin in one row and end in the next."""
    with pytest.raises(InputError, match="visual tokens"):
        ledger("aIIIIb", "cIIIId", counts=counts)


def test_generated_positions_of_a_forward_without_cache():
    tokens = ledger(".abIIcxIy", prompt=6)
    assert roles(tokens) == [".SBIIAGGG"]
    assert tokens.image.tolist() == [[-1, -1, -1, 0, 0, -1, -1, -1, -1]]


def test_first_after_and_has_image():
    assert ledger("abIIcd", ".aIIcd").first_after == 4
    assert ledger("abIIcd", "aIIcde").first_after == 3
    assert ledger("abcd").first_after == 4
    assert ledger("aII").first_after == 3
    assert not ledger("abcd").has_image
    assert ledger("abcd", "abIc").has_image


@pytest.mark.parametrize("known", [False, True])
def test_generated_appends_one_position_per_row(known):
    tokens = ledger("abIIc", ".aIIc")
    if known:  # what the prompt knew is carried along without looking at the device again
        assert (tokens.has_image, tokens.first_after) == (True, 4)
    grown = tokens.generated().generated(2)
    assert roles(grown) == ["SBIIAGGG", ".SIIAGGG"]
    assert grown.position.tolist() == [list(range(8))] * 2
    assert grown.image[:, 5:].eq(-1).all()
    assert (grown.has_image, grown.first_after) == (True, 4)
    assert all(getattr(grown, name).dtype == getattr(tokens, name).dtype for name in FIELDS)


@pytest.mark.parametrize("known", [False, True])
def test_first_after_counts_generated_tokens(known):
    tokens = ledger("aII")
    assert not known or tokens.first_after == 3
    assert tokens.generated().generated().first_after == 3


def test_a_second_question_on_the_same_picture():
    tokens = ledger("abIIc", "..aII").generated(2).extend(ledger("de", ".f"))
    assert roles(tokens) == ["SBIIAGGAA", "..SIIGG.A"]
    assert tokens.position.tolist() == [list(range(9))] * 2


def test_a_second_question_with_a_new_picture():
    tokens = ledger("abIIc", "abcde").extend(ledger("dIIIe", "fIIIg"))
    assert roles(tokens) == ["SBIIAAIIIA", "SBBBBBIIIA"]  # row 1: text stays before its first image
    assert tokens.image.tolist()[0] == [-1, -1, 0, 0, -1, -1, 1, 1, 1, -1]
    assert tokens.image.tolist()[1] == [-1] * 6 + [0, 0, 0] + [-1]
    assert tokens.index[:, 6:9].tolist() == [[0, 1, 2]] * 2


def test_extending_by_an_image_first():
    assert roles(ledger("ab").extend(ledger("IIc"))) == ["SBIIA"]


def test_a_row_that_begins_in_a_later_chunk_keeps_its_start():
    assert roles(ledger("abc", "...").extend(ledger("de", ".f"))) == ["SBBBB", "....S"]


def test_crop():
    tokens = ledger("abIIcd", "..aIIb").generated(3)
    same(tokens.crop(6), ledger("abIIcd", "..aIIb"))
    same(tokens.crop(20), tokens)


def test_select_keeps_original_numbers():
    kept = ledger("abIIIIcd").select(torch.tensor([[0, 1, 3, 5, 6, 7]]))
    assert roles(kept) == ["SBIIAA"]
    assert kept.index.tolist() == [[-1, -1, 1, 3, -1, -1]]
    assert kept.position.tolist() == [[0, 1, 3, 5, 6, 7]]


def test_select_ragged():
    kept = ledger("aIIIb", "aIIIb").select(torch.tensor([[0, 1, 2, 4], [-1, 0, 3, 4]], dtype=torch.int32))
    assert roles(kept) == ["SIIA", ".SIA"]
    assert kept.image.tolist() == [[-1, 0, 0, -1], [-1, -1, 0, -1]]
    assert kept.index.tolist() == [[-1, 0, 1, -1], [-1, -1, 2, -1]]
    assert kept.position.tolist() == [[0, 1, 2, 4], [-1, 0, 3, 4]]


def test_positions_after_pruning_continue_where_the_prompt_ended():
    """The original column of a generated token is not the length of what pruning left."""
    kept = ledger("aIIIIb", "aIIIIb").select(torch.tensor([[0, 2, 5], [-1, 0, 5]]))
    assert kept.generated(2).position[:, 3:].tolist() == [[6, 7]] * 2
    assert kept.extend(ledger("cd", "cd")).position[:, 3:].tolist() == [[6, 7]] * 2
    assert kept.select(torch.tensor([[0, 2], [1, 2]])).generated().position[:, 2:].tolist() == [[6]] * 2


def test_what_select_fills_up_is_nothing():
    kept = ledger("IIab").select(torch.tensor([[-1, -1, 0, 2]]))
    assert roles(kept) == ["..IA"]
    assert [getattr(kept, name)[0, :2].tolist() for name in ("image", "index", "position")] == [[-1, -1]] * 3


@pytest.mark.parametrize("keep", [torch.tensor([0, 1]), torch.tensor([[0, 1], [0, 1]])])
def test_select_refuses_other_shapes(keep):
    with pytest.raises(InputError, match="keep has shape"):
        ledger("aIIb").select(keep)


def layout(rows: int, columns: int, separators: int = 0) -> Layout:
    n = rows * columns
    cell = np.array([[r, c] for r in range(rows) for c in range(columns)] + [[-1, -1]] * separators)
    crop = np.array([0] * n + [-1] * separators)
    boxes = np.zeros((n + separators, 4), np.float32)
    return Layout((8, 8), boxes, crop, cell, ((rows, columns),), tuple((i,) for i in range(n)) + ((),) * separators)


def test_cells_survive_pruning():
    tokens = ledger("aIIIIIb", "aIIbIII", counts=[5, 2, 3])
    tokens = tokens.with_layouts([[layout(2, 2, 1)], [layout(1, 2), layout(3, 1)]])
    assert tokens.cells(0).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [-1, -1, -1]]
    assert tokens.cells(1, 1).tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0]]
    kept = tokens.select(torch.tensor([[0, 2, 5, 6], [1, 5, 6, -1]])).generated()
    assert kept.cells(0).tolist() == [[0, 0, 1], [-1, -1, -1]]
    assert kept.cells(1, 0).tolist() == [[0, 0, 0]]
    assert kept.cells(1, 1).tolist() == [[0, 1, 0], [0, 2, 0]]


def test_layouts_that_do_not_fit_are_refused():
    tokens = ledger("aIIb", "aIIb")
    with pytest.raises(InputError, match="row 1, image 0: the layout has 3 tokens, the prompt has 2"):
        tokens.with_layouts([[layout(1, 2)], [layout(1, 3)]])
    with pytest.raises(InputError, match="2 rows"):
        tokens.with_layouts([[layout(1, 2)]])
    with pytest.raises(InputError, match="row 1"):
        tokens.with_layouts([[layout(1, 2)], []])
    with pytest.raises(InputError, match="no layouts"):
        tokens.cells(0)


def test_rows_take_their_layouts_along():
    tokens = ledger("aIIb", ".aIb").with_layouts([[layout(1, 2)], [layout(1, 1)]])
    picked = tokens.rows(torch.tensor([1, 0, 1]))
    assert roles(picked) == [".SIA", "SIIA", ".SIA"]
    assert [len(row[0]) for row in picked.layouts] == [1, 2, 1]


# -- laws ---------------------------------------------------------------------------------------------------------

ROW = st.text(alphabet="abII.", min_size=1, max_size=12)


@st.composite
def batches(draw, rows: int = 3) -> list[str]:
    width = draw(st.integers(1, 12))
    return draw(st.lists(st.text(alphabet="abII.", min_size=width, max_size=width), min_size=1, max_size=rows))


@given(batches(), st.data())
def test_ledger_equals_the_naive_one(rows, data):
    ids, mask = parse(*rows)
    prompt = data.draw(st.none() | st.integers(1, ids.shape[1]))
    counts, per_row = None, [None] * len(rows)
    if data.draw(st.booleans()):
        visual = (ids == I) & mask.bool()
        totals = visual[:, :prompt].sum(1).tolist()
        per_row = [_partition(data, total) for total in totals]
        counts = [c for row in per_row for c in row]
    tokens = Tokens.from_ids(ids, I, mask, prompt=prompt, counts=counts)
    for b in range(len(rows)):
        role, image, index = naive(ids[b].tolist(), mask[b].tolist(), per_row[b], prompt)
        assert tokens.role[b].tolist() == role
        assert tokens.image[b].tolist() == image
        assert tokens.index[b].tolist() == index


def _partition(data, total: int) -> list[int]:
    parts = []
    while total:
        parts.append(data.draw(st.integers(1, total)))
        total -= parts[-1]
    return parts


@given(batches())
def test_every_real_position_has_one_role_and_every_image_counts_up(rows):
    ids, mask = parse(*rows)
    tokens = Tokens.from_ids(ids, I, mask)
    one_hot = torch.stack([tokens.where(role) for role in Role])
    assert (one_hot.sum(0) == 1).all()
    assert torch.equal(tokens.role != int(Role.PAD), mask.bool())
    assert torch.equal(tokens.image >= 0, tokens.visual)
    for b in range(len(rows)):
        for k in range(int(tokens.image[b].max()) + 1):
            index = tokens.index[b][tokens.image[b] == k]
            assert index.tolist() == list(range(len(index)))
            assert len(index) > 0


@given(batches())
def test_selecting_all_columns_is_the_identity(rows):
    tokens = ledger(*rows)
    every = torch.arange(tokens.shape[1]).expand(tokens.shape)
    same(tokens.select(every), tokens)
    same(tokens.rows(torch.arange(tokens.shape[0])), tokens)
    same(tokens.crop(tokens.shape[1]), tokens)


@given(batches(), st.data())
def test_two_chunks_equal_the_whole(rows, data):
    """Where no image is cut in two: an image that ends at a chunk's edge cannot be told from one that goes on."""
    ids, mask = parse(*rows)
    k = data.draw(st.integers(0, ids.shape[1]))
    visual = (ids == I) & mask.bool()
    cut = 0 < k < ids.shape[1] and bool((visual[:, k - 1] & visual[:, k]).any())
    if k in (0, ids.shape[1]) or cut:
        return
    first, second = (Tokens.from_ids(i, I, m) for i, m in ((ids[:, :k], mask[:, :k]), (ids[:, k:], mask[:, k:])))
    same(first.extend(second), Tokens.from_ids(ids, I, mask))


@given(batches(), st.data())
def test_selecting_twice_equals_selecting_once(rows, data):
    tokens = ledger(*rows)
    n = tokens.shape[1]
    first = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    second = sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1)))
    a = torch.tensor([first]).expand(len(rows), -1)
    b = torch.tensor([second]).expand(len(rows), -1)
    same(tokens.select(a).select(b), tokens.select(a.gather(1, b)))

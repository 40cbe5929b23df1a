"""Which keys a query of a grid sees: the window rule of (generalized) neighborhood attention, one axis at a time.

Axis of length L, query i, dilation d: group g = i mod d, place p = i div d in it, group length Lg = ceil((L - g) / d).
Stride s: queries p of one stride group (p div s) share the window of their leader l.

    not causal:  l = min((p div s) s + s div 2, Lg - 1)      start = clamp(l - w div 2, 0, Lg - w)   end = start + w
    causal:      l = min((p div s) s + s - 1,   Lg - 1)      start = max(l - (w - 1), 0)             end = p + 1

Keys: positions j d + g for start <= j < end. Near a border the window is shifted, not cut (a causal one is cut).
Several axes: the product of the axes' windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.errors import ParameterError
from sightline.mix.parts.base import per_axis
from sightline.mix.parts.groups import Axis


@dataclass(frozen=True)
class Window:
    """The rule on one axis."""

    size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def span(self, place: int, length: int) -> tuple[int, int]:
        """[start, end) of the query at `place` of a dilation group of `length`, in places of that group."""
        group, after = place // self.stride * self.stride, self.stride - 1 if self.causal else self.stride // 2
        leader = min(group + after, length - 1)
        if self.causal:
            return max(leader - (self.size - 1), 0), place + 1
        start = min(max(leader - self.size // 2, 0), length - self.size)
        return start, start + self.size


def windows_of(
    axes: int,
    size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[Window, ...]:
    """One rule per axis; ParameterError where a value is out of range whatever the grid."""
    values = [per_axis(n, v, axes) for n, v in _named(size, stride, dilation, causal)]
    rules = tuple(Window(*of_axis) for of_axis in zip(*values, strict=True))
    for rule in rules:
        if rule.size < 2 or rule.dilation < 1 or not 1 <= rule.stride <= rule.size:
            raise ParameterError(
                f"window={rule.size}, stride={rule.stride}, dilation={rule.dilation}: "
                "need window >= 2, 1 <= stride <= window, dilation >= 1 on every axis"
            )
    return rules


def _named(size, stride, dilation, causal):
    return ("window", size), ("stride", stride), ("dilation", dilation), ("causal", causal)


def check_fit(rules: Sequence[Window], grid: Sequence[int]) -> None:
    """Raise ParameterError unless every window fits the grid: window * dilation <= length."""
    for rule, length in zip(rules, grid, strict=True):
        if rule.size * rule.dilation > length:
            raise ParameterError(
                f"window={rule.size} with dilation={rule.dilation} needs an axis of at least "
                f"{rule.size * rule.dilation} positions, the grid {tuple(grid)} has one of {length}"
            )


def axis_mask(rule: Window, length: int) -> Tensor:
    """(L, L) bool: which keys each query sees. Readable truth, position by position."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        group, place = i % rule.dilation, i // rule.dilation
        start, end = rule.span(place, -(-(length - group) // rule.dilation))
        mask[i, start * rule.dilation + group : (end - 1) * rule.dilation + group + 1 : rule.dilation] = True
    return mask


def grid_mask(rules: Sequence[Window], grid: Sequence[int]) -> Tensor:
    """(N, N) bool over the row-major grid: the Kronecker product of the axes' masks."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for rule, length in zip(rules, grid, strict=True):
        mask = torch.kron(mask, axis_mask(rule, length))
    return mask


def tile_of(rule: Window) -> int:
    """Queries per tile: whole stride groups, about half a window (a whole one up to 8, where copies cost more than work)."""
    return max(1, max(rule.size // 2 + 1, min(rule.size, 8)) // rule.stride) * rule.stride


def window_axis(rule: Window, length: int, tile: int, device: torch.device | None = None) -> Axis:
    """Tiles of `tile` queries with the keys that some query of the tile sees; a mask only where they differ."""
    groups = [-(-(length - g) // rule.dilation) for g in range(rule.dilation)]  # lengths of the dilation groups
    tiles = [(g, at) for g, size in enumerate(groups) for at in range(0, size, tile)]
    spans = [_tile_span(rule, at, min(at + tile, groups[g]), groups[g]) for g, at in tiles]
    width = max(end - start for start, end in spans)
    exact = all(_uniform(rule, at, min(at + tile, groups[g]), groups[g], width) for g, at in tiles)
    group = torch.tensor([g for g, _ in tiles], device=device)[:, None]
    size = torch.tensor([groups[g] for g, _ in tiles], device=device)[:, None]
    low = torch.tensor([max(0, min(s, groups[g] - width)) for (g, _), (s, _) in zip(tiles, spans, strict=True)])
    place = torch.tensor([at for _, at in tiles], device=device)[:, None] + torch.arange(tile, device=device)
    place = torch.minimum(place, size - 1)  # (G, S)
    key = low.to(place.device)[:, None] + torch.arange(width, device=device)  # (G, K), beyond a short group: masked
    mask = None
    if not exact:
        start, end = _spans(rule, place, size)
        mask = (key[:, None] >= start[..., None]) & (key[:, None] < end[..., None])
    queries = place * rule.dilation + group
    keys = torch.minimum(key, size - 1) * rule.dilation + group
    i = torch.arange(length, device=device)
    counts = [-(-size // tile) for size in groups]  # tiles before each dilation group
    before = torch.tensor([sum(counts[:g]) for g in range(rule.dilation)], device=device)
    return Axis(queries, keys, mask, before[i % rule.dilation] * tile + i // rule.dilation)


def _spans(rule: Window, place: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """`Window.span` of many places at once."""
    after = rule.stride - 1 if rule.causal else rule.stride // 2
    leader = torch.minimum(place // rule.stride * rule.stride + after, length - 1)
    if rule.causal:
        return (leader - (rule.size - 1)).clamp(min=0), place + 1
    start = torch.minimum((leader - rule.size // 2).clamp(min=0), length - rule.size)
    return start, start + rule.size


def _tile_span(rule: Window, first: int, stop: int, length: int) -> tuple[int, int]:
    """Smallest range that holds the windows of places first..stop-1 (starts and ends never fall along an axis)."""
    return rule.span(first, length)[0], rule.span(stop - 1, length)[1]


def _uniform(rule: Window, first: int, stop: int, length: int, width: int) -> bool:
    """True when every query of the tile sees exactly the same `width` keys."""
    spans = rule.span(first, length), rule.span(stop - 1, length)
    return spans[0] == spans[1] and spans[0][1] - spans[0][0] == width

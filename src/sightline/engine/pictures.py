"""The pictures of one encoding: which patches of the tower every visual token is made of, and what systems noted there.

A host encodes all pictures of a batch at once (`get_image_features`), in `generate` even before the prompt is read. Here
what was seen in the tower, per row and patch, is brought into the order of the visual tokens, and onto their columns in
the prompt: also when beams repeat the prompt's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sightline.engine.select import Keep
from sightline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.system import Site
    from sightline.hosts.geometry import Layout

SMALL = (
    "image_sizes",
    "image_grid_thw",
    "batch_num_images",
    "video_grid_thw",
)  # arguments of the encoding that its geometry depends on


@dataclass(frozen=True)
class Places:
    """Where the V visual tokens of a batch come from, in their order. Separators (newlines) come from nowhere: -1."""

    layouts: tuple[Layout, ...]  # per picture
    row: Tensor  # (V, k) int64: row of the tower's batch of each of a token's patches; -1 fills
    patch: Tensor  # (V, k) int64: which patch of that row (class token and registers not counted); -1 fills
    image: Tensor  # (V,) int64: which picture
    view: Tensor  # (V,) int64: which view (whole picture or tile), counted over all pictures; -1
    line: Tensor  # (V,) int64: which row of its view's token grid; -1
    views: tuple[int, ...]  # views per picture
    base: tuple[int, ...]  # per picture, the view that shows it whole

    @cached_property
    def real(self) -> Tensor:
        """(V,) bool: tokens that stand for a place, no separators."""
        return self.view >= 0

    def pool(self, values: Tensor) -> Tensor:
        """Mean over every token's patches: (R, N) per patch of the tower -> (V,) fp32; 0 at separators."""
        there = self.row >= 0
        found = values.float()[self.row.clamp(min=0), self.patch.clamp(min=0)].masked_fill(~there, 0.0)
        return found.sum(1) / there.sum(1).clamp(min=1)

    @classmethod
    def of(cls, layouts: Sequence[Layout], positions: Sequence[np.ndarray], before: int, device: Any) -> Places:
        """From layouts and `hosts.tower_positions`; `before`: class token and registers in front of a row's patches."""
        width = max(p.shape[1] for p in positions)
        wide = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=-1) for p in positions]
        table = torch.from_numpy(np.concatenate(wide)).to(device)  # (V, k, 2)
        views = [len(layout.grids) for layout in layouts]
        first = np.concatenate([[0], np.cumsum(views)])[:-1]
        view = [np.where(at.crop >= 0, at.crop + begin, -1) for at, begin in zip(layouts, first, strict=True)]
        image = [np.full(len(layout), k) for k, layout in enumerate(layouts)]
        flat = (
            torch.from_numpy(np.concatenate(x)).to(device) for x in (image, view, [at.cell[:, 0] for at in layouts])
        )
        patch = torch.where(table[..., 1] >= 0, table[..., 1] - before, -1)
        base = tuple(int(begin) + layout.base for layout, begin in zip(layouts, first, strict=True))
        return cls(tuple(layouts), table[..., 0], patch, *flat, tuple(views), base)


@dataclass
class Pictures:
    """One encoding: made when it starts, completed when it ends."""

    notes: list[dict[Any, Any]]  # per system: its memory of these pictures (`site.seen`)
    prefix: int = 0  # class token and registers before a row's patches
    pixels: Tensor | None = field(default=None, repr=False)  # as the host was given them
    parts: tuple[int, ...] = ()  # patches of every picture or group of frames, in towers that pack them into one row
    tower: tuple[int, int] | None = None  # (rows, tokens per row) of the tower's batch, class token included
    alive: list[Tensor] = field(
        default_factory=list
    )  # per layer that ran: (R, M) places of its tokens, if some were cut
    _make: Callable[[], Places] | None = None

    @cached_property
    def places(self) -> Places:
        """Where the visual tokens come from. Made when first asked for."""
        if self._make is None:
            raise InputError("these pictures were not encoded to the end: ask in the station `visual_tokens`")
        return self._make()

    def finish(self, make: Callable[[], Places]) -> None:
        """The encoding is over."""
        self._make = make


def key_of(given: Mapping[str, Any], tower: tuple[int, int] | None, tokens: int) -> tuple:
    """What the geometry of an encoding depends on, hashable: so that it is worked out once per shape."""
    small = [(name, _plain(given[name])) for name in SMALL if given.get(name) is not None]
    return (*small, tower, tokens)


def token_count(output: Any) -> int:
    """Visual tokens in what `get_image_features` returned."""
    found = getattr(output, "pooler_output", output)
    if isinstance(found, torch.Tensor):
        return found.shape[0] * found.shape[1] if found.dim() == 3 else found.shape[0]
    return sum(len(part) for part in found)


def columns_of(count: int, visual: Tensor) -> Tensor:
    """Which visual token of the encoding stands at every visual position of a block.

    Args:
        count: V, tokens encoded. visual: (B, Q) bool.

    Returns:
        (total,) int64, in row-major order of the block's visual positions.

    Raises:
        InputError: the block holds other pictures than those encoded.
    """
    counts = visual.sum(1).tolist()
    total = sum(counts)
    times = total // count if count else 0
    bases = counts[::times] if times else []
    repeated = [c for c in bases for _ in range(times)]  # beams: every row `times` times
    if total == 0 or total != times * count or repeated != counts:
        raise InputError(
            f"{total} image tokens in this block of the prompt, {count} were encoded: systems that drop visual tokens need "
            "the whole prompt with its pictures in one forward (no prefill_chunk_size, no pictures encoded beforehand)"
        )
    order, begin = [], 0
    for length in bases:
        order += [torch.arange(begin, begin + length)] * times
        begin += length
    return torch.cat(order).to(visual.device)


def keep_visual(site: Site, chosen: Tensor, positions: str = "renumber") -> Keep:
    """The cut that leaves all text and, of the visual tokens of the encoding, those `chosen` (V,) bool."""
    visual = site.tokens.visual[:, site.start :]
    stay = ~visual
    stay[visual] = chosen.to(visual.device)[columns_of(len(chosen), visual)]
    return Keep(stay, positions)


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value

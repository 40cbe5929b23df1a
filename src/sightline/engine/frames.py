"""The frames of a block: which of its columns are the token grid of which picture, in the order of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sightline.engine.pictures import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sightline.engine.system import Site


@dataclass(frozen=True)
class Frame:
    """One frame (or picture) of one row of the batch; columns count within the block."""

    columns: Tensor  # (n,) int64: its token grid, row-major; of a picture in tiles, the view of the whole
    separators: Tensor  # (s,) int64: its newlines and the like
    shape: tuple[int, int]  # (rows, columns) of the grid, n = rows * columns


def frames_of(site: Site) -> list[list[Frame]]:
    """Per row of the block its frames, in time.

    Raises:
        InputError: the block does not hold exactly the pictures that were encoded.
    """
    places = site.pictures.places
    visual = site.tokens.visual[:, site.start :]  # (B, Q)
    source = columns_of(len(places.image), visual).cpu()  # (total,) encoded token at every visual column
    row, column = (index.cpu() for index in visual.nonzero(as_tuple=True))
    picture = places.image.cpu()[source]
    first = torch.searchsorted(places.image.cpu(), torch.arange(len(places.layouts)))
    found: list[list[Frame]] = [[] for _ in range(len(visual))]
    edges = torch.nonzero((picture.diff() != 0) | (row.diff() != 0)).flatten() + 1
    for part in torch.tensor_split(torch.arange(len(source)), edges):
        if len(part) == 0:
            continue
        layout = places.layouts[int(picture[part[0]])]
        crop = torch.as_tensor(layout.crop)[source[part] - first[picture[part]]]
        mine = column[part].to(visual.device)
        here, apart = (mask.to(visual.device) for mask in (crop == layout.base, crop < 0))
        found[int(row[part[0]])].append(Frame(mine[here], mine[apart], layout.grids[layout.base]))
    return found


def places(shape: tuple[int, int], new: Sequence[int]) -> Tensor:
    """Which tokens of a grid give their places to fewer new ones: the nearest, evenly spread.

    Args:
        shape: (rows, columns) of the grid. new: (h, w) of the new grid, none larger, or (m,) of tokens in a row.

    Returns:
        (h * w,) or (m,) int64, increasing.
    """
    if len(new) == 1:
        return torch.linspace(0, shape[0] * shape[1] - 1, new[0]).long()
    rows, columns = (((torch.arange(k) + 0.5) * n / k).long() for k, n in zip(new, shape, strict=True))
    return (rows[:, None] * shape[1] + columns).flatten()

"""Cuts inside vision towers that pack the patches of all pictures into one row (Qwen2-VL, Qwen2.5-VL).

The tower hands every layer the arguments of the whole row; a layer behind a cut gets those of the patches still there. Its
merger makes one visual token of k patches that stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def cut_arguments(given: dict[str, Any], width: int, alive: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments after a cut.

    Args:
        given: for the whole row: tensors with one entry per patch (N, ...), also in tuples, and borders `cu_seqlens`
            (P + 1,) between what attends to each other. width: N. alive: (M,) rising places of the patches left.
    """
    if len(alive) == width:
        return given

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(name, one) for one in value)
        if not isinstance(value, Tensor):
            return value
        if name == "cu_seqlens":
            left = torch.searchsorted(alive, value.to(alive.dtype))  # patches left before every border
            return left.unique_consecutive().to(value.dtype)
        return value[alive] if value.dim() and value.shape[0] == width else value

    return {name: cut(name, value) for name, value in given.items()}


def merged_places(alive: Tensor, count: int) -> Tensor:
    """(count,) where among the tokens of the whole row the merged ones belong, made of `alive` (M,) patches, k each.

    At their own places as long as every group of k is whole; the first places when single patches were dropped and groups
    are of patches that were no neighbours.
    """
    group = alive.view(count, -1) // (len(alive) // count)
    whole = bool((group == group[:, :1]).all())
    return group[:, 0] if whole else torch.arange(count, device=alive.device)


def parts_of(given: Mapping[str, Any]) -> tuple[int, ...]:
    """Patches of every picture, or group of frames, in such a row; empty when the arguments do not tell."""
    grids = given.get("image_grid_thw", given.get("video_grid_thw"))
    return () if grids is None else tuple(h * w for t, h, w in grids.tolist() for _ in range(t))

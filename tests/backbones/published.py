"""Layouts of published checkpoints: key and shape of every entry, from `layouts.txt`.

`a.[0-2,5].b 3 4` stands for a.0.b, a.1.b, a.2.b, a.5.b, each of shape (3, 4).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by key, by network."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in (Path(__file__).parent / "layouts.txt").read_text().splitlines():
        if line.startswith("== "):
            current = found.setdefault(line[3:], {})
            continue
        key, *shape = line.split()
        for one in _expand(key):
            current[one] = tuple(map(int, shape))
    return found


def checkpoint(layout: dict[str, tuple[int, ...]], device: str = "meta") -> dict[str, Tensor]:
    """A state dict of that layout; on "cpu" every entry has random numbers of its own."""
    generator = torch.Generator().manual_seed(0) if device == "cpu" else None
    return {key: torch.randn(shape, generator=generator, device=device) for key, shape in layout.items()}


def _expand(key: str) -> Iterator[str]:
    found = re.search(r"\[([\d,-]+)\]", key)
    if found is None:
        yield key
        return
    for span in found[1].split(","):
        first, _, last = span.partition("-")
        for i in range(int(first), int(last or first) + 1):
            yield f"{key[: found.start()]}{i}{key[found.end() :]}"

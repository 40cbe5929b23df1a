"""What reducers that judge tokens in the vision tower share: looking at its attention, and cutting before the decoder.

A tower runs its pictures and tiles as rows of one batch, (R, N) patches; or packs all of them into one row, some layers
in windows, so that one layer makes several attention calls. What is noted here has one entry per patch either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline.engine.attention import Probe
from sightline.engine.pictures import keep_visual
from sightline.engine.select import Keep
from sightline.engine.system import Shape, Site, System
from sightline.errors import HostError


class Chooser(System):
    """Base of systems that choose, from what the tower saw, the visual tokens that enter the language model."""

    def conflicts(self, other: System) -> str | None:
        if isinstance(other, Chooser):
            return "both choose which visual tokens enter the language model"
        return None

    def choose(self, site: Site, chosen: Tensor, separators: bool = False) -> Keep:
        """The cut that keeps the visual tokens `chosen` (V,) bool.

        separators: newlines and the like stay; else they go as soon as any token goes.
        """
        real = site.pictures.places.real
        chosen = (chosen & real) | (~real & separators) | (chosen | ~real).all()
        site.tally.setdefault("counts", []).append(torch.stack([chosen.sum(), torch.full_like(chosen, True).sum()]))
        return keep_visual(site, chosen)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        found = torch.stack(tally.get("counts", [torch.zeros(2, dtype=torch.long)])).sum(0).tolist()
        kept, total = (int(x) for x in found)
        return {"visual_tokens": total, "kept": kept, "share_kept": kept / total if total else 1.0}


def require_cls(name: str, shape: Shape, instead: str) -> None:
    """HostError when the tower has no class token; `instead`: what to do then."""
    if shape.tower_prefix == 0:
        raise HostError(
            f"{name} ranks patches by the attention of the tower's class token, and this tower has none: {instead}"
        )


def see_cls(site: Site, prefix: int) -> Probe:
    """Notes what the class token gives to every patch, mean over heads: (R, N) in `site.seen[layer]`."""
    pieces = site.seen.setdefault(site.layer, [])
    return Probe(lambda weights, first: pieces.append(weights[:, :, 0, prefix:].mean(1)), stop=1)


def see_sums(site: Site, prefix: int) -> Probe:
    """Notes what every patch gets from, and gives to, all patches, mean over heads: (R, 2, N) in `site.seen[layer]`.

    Softmax is over all keys; rows and columns of the class token are then left out. Queries come in chunks of bounded
    size, so that no (N, N) map exists.
    """
    pieces = site.seen.setdefault(site.layer, [])
    received: list[Tensor] = []
    given: list[Tensor] = []

    def see(weights: Tensor, first: int) -> None:  # (R, H, rows, K)
        rows = weights[:, :, max(prefix - first, 0) :, prefix:].mean(1)
        received[:] = [rows.sum(1) + received[0]] if received else [rows.sum(1)]
        given.append(rows.sum(-1))
        if sum(g.shape[1] for g in given) == weights.shape[-1] - prefix:
            pieces.append(torch.stack([received[0], torch.cat(given, 1)], 1))

    return Probe(see)


def noted(site: Site, layer: int) -> Tensor:
    """What the calls of one layer noted, put together along the patches: (R, ..., N)."""
    return torch.cat(site.seen[layer], -1)

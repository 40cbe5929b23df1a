"""Mitigating Object Hallucination via Concentric Causal Attention (CCA).

NeurIPS 2024, arXiv 2410.15926. Official code: xing0047/cca-llava (Apache-2.0), weights xing0047/cca-llava-1.5-7b.

Rotary positions decay with distance, and raster order puts most of a picture far from the question. CCA numbers visual
tokens by concentric rings, border first, and orders the causal mask inside the picture by ring. A grid of h x w tokens
that begins at position s, R = ceil(min(h, w) / 2) rings:

    r(i, j)      = min(i, j, h-1-i, w-1-j)                    0 at the border, R-1 in the centre
    position     = s + r(i, j)                                the text after the picture goes on at s + R
    q may see k  iff r(k) <= r(q)                             both in the same grid; all other pairs as ever

Positions and mask replace the host's, in the prompt and in training; a generated token's position is past - h w + R. No
parameter. **Weights must have been trained with it**: on others it is off their distribution, and answers get worse.

Against the official code: (1) it keeps the last sample's positions and masks the first sample only when there are several;
here per sample. (2) It knows one square of 24 x 24; here the same formula for any grid, each view (tile, crop, picture) of
a prompt being a grid of its own; newline tokens are its last column. (3) Where rotary positions have three axes, all three get the ring's position.

Cost: one (B, 1, Q, Q) boolean mask per prompt, shared by the layers of a kind, and the fast kernel with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.pictures import columns_of
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.engine.views import grids
from sightline.errors import InputError, warn


def ring_map(rows: int, columns: int) -> Tensor:
    """(rows, columns) ring of every cell: 0 at the border."""
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return torch.minimum(torch.minimum(i, rows - 1 - i), torch.minimum(j, columns - 1 - j))


def rings(rows: int, columns: int) -> int:
    """How many rings a grid has, which is how many positions it takes."""
    return -(-min(rows, columns) // 2)


def concentric_positions(length: int, begin: int, rows: int, columns: int) -> Tensor:
    """(length,) position ids of a sequence whose columns from `begin` on are a grid."""
    count = rows * columns
    before, after = torch.arange(begin), torch.arange(length - begin - count) + begin + rings(rows, columns)
    return torch.cat([before, begin + ring_map(rows, columns).flatten(), after])


def next_position(past: int, rows: int, columns: int) -> int:
    """Position of a generated token when `past` tokens are in the cache."""
    return past - rows * columns + rings(rows, columns)


def concentric_mask(length: int, begin: int, rows: int, columns: int) -> Tensor:
    """(length, length) bool, True where the query (row) may attend to the key."""
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    ring = ring_map(rows, columns).flatten()
    block = slice(begin, begin + len(ring))
    allowed[block, block] = ring[None] <= ring[:, None]
    return allowed


@dataclass(frozen=True)
class Block:
    """The views of one block of the prompt. B rows, Q columns."""

    view: Tensor  # (B, Q) number of the view among the batch's; -1: no visual token
    ring: Tensor  # (B, Q) 0 outside views
    advance: Tensor  # (B, Q) positions that a token takes: 1 for text, 0 for padding, R at the end of a view
    has: Tensor  # (B, 1) whether the row has a picture


def block_of(visual: Tensor, real: Tensor, grids: Sequence[tuple[int, int]], order: Tensor | None = None) -> Block:
    """Lay grids onto a block of a prompt.

    Args:
        visual: (B, Q) bool, visual tokens. real: (B, Q) bool, no padding.
        grids: (rows, columns) of all views of the batch, one after the other.
        order: (n,) which of the grids' cells stands at each visual token, read row by row; None: one after the other.
    """
    view, ring, advance = (torch.zeros(visual.shape, dtype=torch.long, device=visual.device) for _ in range(3))
    view.fill_(-1)
    advance[~visual & real] = 1
    if grids:
        sizes = torch.tensor([rows * columns for rows, columns in grids])
        steps = torch.zeros(int(sizes.sum()), dtype=torch.long)
        steps[sizes.cumsum(0) - 1] = torch.tensor([rings(*grid) for grid in grids])
        flat = (
            torch.repeat_interleave(torch.arange(len(grids)), sizes),
            torch.cat([ring_map(*grid).flatten() for grid in grids]),
            steps,
        )
        for table, values in zip((view, ring, advance), flat, strict=True):
            values = values.to(visual.device)
            table[visual] = values if order is None else values[order]
    return Block(view, ring, advance, visual.any(1, keepdim=True))


@system(
    "cca",
    kind="steer",
    paper=Paper(
        title="Mitigating Object Hallucination via Concentric Causal Attention",
        authors="Xing, Yun and Li, Yiheng and Laptev, Ivan and Lu, Shijian",
        venue="NeurIPS",
        year=2024,
        arxiv="2410.15926",
        code="xing0047/cca-llava",
        licence="Apache-2.0",
    ),
    summary="numbers and masks visual tokens by rings from the border inwards; for weights trained with it",
    needs=("image_tokens", "trained weights"),
    published=(
        ("POPE COCO random, accuracy / F1, LLaVA-1.5-7B 83.29 / 81.33", "88.03 / 86.65 (paper, table 1)"),
        ("CHAIR greedy 512 tokens, C_S / C_I, LLaVA-1.5-7B 46.2 / 12.9", "43.0 / 11.5 (paper)"),
    ),
)
@dataclass(frozen=True)
class CCA(System):
    """Concentric causal attention. For weights trained with it; train them with `sightline train ... --with cca`."""

    positions_by_ring: bool = param(True, "number visual tokens by ring")
    mask_by_ring: bool = param(True, "order the mask inside a picture by ring")
    trained: bool = param(False, "the weights were trained with it: do not warn")

    everywhere = True
    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return not (self.positions_by_ring or self.mask_by_ring)

    def prepare(self, shape: Shape) -> None:
        if not self.trained and not self.idle():
            warn(
                "cca changes positions and mask: only weights trained with it answer well under it "
                "(xing0047/cca-llava-1.5-7b, or your own; cca:trained=true says that these are)",
            )

    def visual_tokens(self, site: Site, embeddings: Tensor) -> None:
        """Find the block's views; this station comes before the positions and the mask."""
        tokens, begin = site.tokens, site.start
        visual = tokens.visual[:, begin:]
        real = tokens.role[:, begin:] != int(Role.PAD)
        if not bool(visual.any()):
            site.state["block"] = block_of(visual, real, [])
            return
        if site.pictures is None:
            raise InputError("the pictures were encoded before the systems were attached: give pixel_values")
        places = site.pictures.places
        order = columns_of(len(places.view), visual)
        site.state["block"] = block_of(visual, real, grids(places.layouts), order)

    def positions(self, site: Site, positions: Tensor) -> Tensor | None:
        if not self.positions_by_ring or not site.tokens.has_image:
            return None
        state = site.state
        if not site.prefill:
            if "next" not in state:
                return None
            has, places = state["has"], state["next"] + (site.start - state["width"])  # (B, 1)
            return torch.where(has, places, positions)
        block = _whole(site)
        first = site.start == 0 or "next" not in state
        begin = positions[0, :, :1] if site.start else torch.zeros_like(positions[0, :, :1])
        if not first:  # a later block of the same sequence; generated tokens came in between
            begin = torch.where(state["has"], state["next"] + (site.start - state["width"]), begin)
        ends = block.advance.cumsum(1)
        places = begin + ends - block.advance + block.ring  # (B, Q)
        has = block.has if first else block.has | state["has"]
        plain_next = positions.amax(0)[:, -1:] + 1  # of rows that have had no picture so far
        state["next"] = torch.where(has, begin + ends[:, -1:], plain_next)
        state["has"], state["width"] = has, site.tokens.shape[1]
        return torch.where(has, places, positions)

    def mask(self, site: Site, allowed: Tensor) -> Tensor | None:
        if not self.mask_by_ring or not site.tokens.has_image:
            return None
        block = _whole(site)
        site.tally["views"] = site.tally.get("views", 0) + 1
        same = (block.view[:, :, None] == block.view[:, None]) & (block.view >= 0)[:, :, None]
        inner = block.ring[:, None] <= block.ring[:, :, None]  # key's ring <= query's: (B, Q, Q)
        allowed = allowed.expand(len(same), -1, -1, -1)
        here = torch.where(same[:, None], inner[:, None], allowed[..., site.start :])
        return torch.cat([allowed[..., : site.start], here], -1)

    def report(self, tally: dict[Any, Any], setup: None) -> dict[str, Any]:
        return {"masks_made": tally.get("views", 0)}


def _whole(site: Site) -> Block:
    """The block's views; InputError when some of its tokens were dropped since."""
    here = site.tokens.role[:, site.start :]
    if site.start and not bool((here == int(Role.IMAGE)).any()):  # a later question about the same pictures
        return block_of(torch.zeros_like(here, dtype=torch.bool), here != int(Role.PAD), [])
    block: Block = site.state["block"]
    if block.view.shape[1] != site.queries:
        raise InputError(
            "cca numbers whole pictures, but another system drops visual tokens before the decoder: use one"
        )
    return block

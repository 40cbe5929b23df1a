"""HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models.

AAAI 2025, arXiv 2408.10945. Official code: hasanar1f/HiRED (MIT).

A picture seen as a whole and in T tiles has P = 1 + T views of N patches. A budget is split between the whole and the tiles,
and among the tiles by how much an early tower layer's class token finds where they are; a late layer's class token then
picks the tokens:

    e, t         (P, N)  attention of the class token, summed over heads, in the early and the late layer
    total        = int(P N r),  full = min(int(total alpha), N),  sub = min(total - full, T N)
    whole        the `full` largest t[0]
    content      the int(N (1 - alpha)) largest e[0];  n_i = how many of them lie in the region of tile i
    tile i       the min(int(n_i / sum(n) sub), N) largest t[1+i]
    one view     the int(N r) largest t[0]  (LLaVA-1.5; hosts that do not tell which tiles make a picture)

Tokens are then packed as the host packs them, rows and columns of padding cut off, and positions are consecutive.

Against the official code: (1) its `region` of a tile is one of T strips of consecutive rows of the whole view, not the block
that the tile covers, as the paper says; published figures rest on that: region="strips" is the default, "grid" the paper.
(2) Strips are cut evenly where T does not divide N. (3) Without any content (alpha 1) the tiles share evenly, instead of
0 / 0. (4) Newline tokens are dropped as there; `newlines=True` keeps those of the tiles' rows. (5) Batches and several
pictures work. (6) Padding that is cut off takes its tokens out of the budget, as there: never more than `total` stay.
(7) Layers are 0 and the one that is projected (22 of CLIP-L's 24). (8) Equal scores: the lower index stays. (9) Its fork of the
host swaps rows and columns of tiles where it packs (and unpads) them; here tokens stand where the host has them.

Cost: two rows of attention per view, O(P N C); no N x N map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.pictures import Places
from sightline.engine.select import Keep, best, split
from sightline.engine.system import Shape, Site
from sightline.errors import ParameterError
from sightline.prune.parts.tower import Chooser, noted, require_cls, see_cls


def tile_budgets(early: Tensor, tiles: tuple[int, int], budget: int, alpha: float, region: str = "strips") -> Tensor:
    """How many tokens every tile may keep.

    Args:
        early: (N,) attention of the early layer's class token on the whole view, row-major.
        tiles: (rows, columns) of tiles. budget: of all tiles. region: "strips" or "grid".

    Returns:
        (T,) int64, each at most N.
    """
    count, total = len(early), tiles[0] * tiles[1]
    content = best(early, int(count * (1 - alpha)))
    place = torch.arange(count, device=early.device)
    if region == "strips":
        where = place * total // count
    else:
        side = round(count**0.5)
        where = (place // side * tiles[0] // side) * tiles[1] + place % side * tiles[1] // side
    found = torch.zeros(total, device=early.device).scatter_add(0, where, content.float())
    return split(budget, found, caps=count)


def token_mask(
    early: Tensor,
    late: Tensor,
    rate: float,
    alpha: float,
    tiles: tuple[int, int] | None = None,
    region: str = "strips",
) -> Tensor:
    """Which patches of one picture stay.

    Args:
        early, late: (P, N) attention of the class token; view 0 is the whole picture, then the tiles, row-major.
        rate, alpha: share of all P N patches that stays, and of these the share of the whole view.
        tiles: (rows, columns) of the P - 1 tiles; None: there are none.

    Returns:
        (P, N) bool.
    """
    views, count = late.shape
    if views == 1:
        return best(late, min(count, int(count * rate)))
    total = int(views * count * rate)
    full = min(int(total * alpha), count)
    rest = min(total - full, (views - 1) * count)
    counts = late.new_zeros(views, dtype=torch.long)
    counts[0] = full
    if rest > 0:
        counts[1:] = tile_budgets(early[0], tiles, rest, alpha, region)
    return best(late, counts)


@system(
    "hired",
    kind="prune",
    paper=Paper(
        title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
        authors="Arif, Kazi Hasan Ibn and Yoon, JinYi and Nikolopoulos, Dimitrios S. and Vandierendonck, Hans and "
        "John, Deepu and Ji, Bo",
        venue="AAAI",
        year=2025,
        arxiv="2408.10945",
        code="hasanar1f/HiRED",
        licence="MIT",
    ),
    summary="splits a token budget over a picture and its tiles, by two layers' attention of the tower's class token",
    needs=("image_tokens", "cls"),
    published=(
        ("LLaVA-NeXT-7B at 20 % on a Tesla P40: throughput, time to first token, memory", "x4.7, -15 s, -2.3 GB"),
        (
            "LLaVA-NeXT-7B, VQAv2 / ChartQA / TextVQA, all -> 20 %, measured by ZipVL",
            "80.3/54.8/64.8 -> 77.5/42.0/61.4",
        ),
    ),
)
@dataclass(frozen=True)
class HiRED(Chooser):
    """A budget of visual tokens for pictures seen in tiles. No training."""

    token_budget_rate: float = param(0.2, "share of all patches that stays; 1 changes nothing", low=0, high=1)
    alpha: float = param(0.5, "share of the budget that goes to the view of the whole picture", low=0, high=1)
    early_layer: int = param(0, "tower layer (0-based) that judges where content is", low=0)
    late_layer: int | None = param(None, "tower layer that picks tokens; none: the one that is projected", low=0)
    region: Literal["strips", "grid"] = param(
        "strips",
        "what of the whole view counts for a tile; strips: as released; grid: the block it covers, as published",
    )
    newlines: bool = param(False, "keep the newline tokens of the tiles' rows")

    drafts = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.token_budget_rate == 1

    def prepare(self, shape: Shape) -> dict[str, int | bool]:
        require_cls("hired", shape, "choose fopru, or vtc-cls:score=mean-received")
        late = shape.feature_layer if self.late_layer is None else self.late_layer
        for name, layer in (("early_layer", self.early_layer), ("late_layer", late)):
            if layer > shape.feature_layer:
                raise ParameterError(
                    f"hired: {name}={layer} is behind the layer that is projected: choose {name} in "
                    f"[0, {shape.feature_layer}]"
                )
        return {"late": late, "prefix": shape.tower_prefix, "merged": shape.merged}

    def vision_attention(self, site: Site) -> Probe | None:
        return see_cls(site, site.setup["prefix"]) if site.layer in (self.early_layer, site.setup["late"]) else None

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        places = site.pictures.places
        early, late = noted(site, self.early_layer), noted(site, site.setup["late"])  # (R, N)
        if site.setup["merged"]:  # every view has the same number of tokens, each of several patches
            early, late = (places.pool(x).view(len(x), -1) for x in (early, late))
        mask = torch.cat(self._masks(early, late, places))
        chosen = mask.flatten() if site.setup["merged"] else places.pool(mask) > 0
        return self.choose(site, chosen, self.newlines)

    def _masks(self, early: Tensor, late: Tensor, places: Places) -> list[Tensor]:
        """(P, N) bool for every picture of the batch."""
        found, begin = [], 0
        for layout, views in zip(places.layouts, places.views, strict=True):
            mine = slice(begin, begin + views)
            found.append(
                token_mask(early[mine], late[mine], self.token_budget_rate, self.alpha, layout.tiles, self.region)
            )
            begin += views
        return found

"""Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (MustDrop).

2024, arXiv 2411.10803. Official code: liuting20/MustDrop (README: Apache-2.0; no licence file).

Three stages over a visual token's life. Patches (R, N, C) in windows of w = 9, tokens (B, M, D) in the decoder:

A  after tower layer 0, in windows of `window` patches:   m = mean of the w (w - 1) off-diagonal cosine similarities
   r = min over the batch of #{m >= merge_threshold};     the r most similar windows become their mean, one token each
   key set: the ceil(keep_rate N') patches that the class token attends most in the last layer; immune in B and C
B  in decoder layers `prune_layers`, over the text t after the image, A_tj = mean_h attention   (T, V), never whole
   g_j = sum_t A_tj,  m_j = max_t A_tj;                   j goes iff g_j < tau_g sum(g) and m_j < tau_i and j is not key
   the layer's output loses these tokens; positions close up
C  after the prompt, the caches of layers prune_layers[0] .. prune_layers[-1] keep only what was left at the end; new
   tokens take the next position after what each layer's cache holds

Against the official code: (1) a merged window stands where its middle patch stood, in the picture's order; the code puts
merged windows before all others (`merge` does that, and is checked against it). (2) Batches, padding, several pictures and
grouped heads work; the text is all text after the first picture of a row. (3) The code's defaults (1.0, 0.0) drop nothing;
here those of its script for 192 tokens. (4) `prune_layers` none scales 2, 6, 10, 14 of 32 layers to the depth. (5) A key
set of one token works. (6) Every row of pictures has its own key set, as there.

Cost: 9 x 9 cosines per window, one row of tower attention, and rows T of attention in four layers; no M x M map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.pictures import columns_of, keep_visual
from sightline.engine.select import Keep, best
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import HostError, ParameterError
from sightline.prune.parts.tower import require_cls


def windows(patches: Tensor, window: tuple[int, int]) -> Tensor:
    """(R, N) indices 0..N-1 of a square grid as (W, w): the patches of every window, row-major.

    Raises:
        ParameterError: the grid is not square, or the windows do not tile it.
    """
    count, (high, wide) = patches.shape[1], window
    side = math.isqrt(count)
    if side * side != count or side % high or side % wide:
        raise ParameterError(
            f"mustdrop: windows of {high} x {wide} do not tile {count} patches: choose a window that divides the side of a "
            "square grid, or merge_threshold=none"
        )
    place = torch.arange(count, device=patches.device).view(side // high, high, side // wide, wide)
    return place.transpose(1, 2).reshape(-1, high * wide)


def similarity(patches: Tensor, members: Tensor) -> Tensor:
    """(R, N, C), (W, w) -> (R, W): mean cosine similarity of different patches of a window."""
    x = patches[:, members].float()  # (R, W, w, C)
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    size = members.shape[1]
    same = (x * x).sum(-1).sum(-1)
    return ((x.sum(2).square().sum(-1)) - same) / (size * (size - 1))


def similar(patches: Tensor, members: Tensor, threshold: float) -> Tensor:
    """(R, r) windows that are merged, the most similar first; r is the batch's smallest count."""
    found = similarity(patches, members)
    count = int((found >= threshold).sum(1).min())
    return found.argsort(dim=1, descending=True, stable=True)[:, :count]


def merge(x: Tensor, threshold: float = 0.8, window: tuple[int, int] = (3, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """Stage A as the official code orders it.

    Args:
        x: (R, 1 + N, C), class token first.

    Returns:
        (R, M, C) class token, merged windows by falling similarity, the others in raster order; (R, M, 1) how many tokens
        each stands for; (R, M, 1 + N) 0/1 which ones.
    """
    members = windows(x[:, 1:], window)
    chosen = similar(x[:, 1:], members, threshold)  # (R, r)
    rows, total = x.shape[0], x.shape[1]
    inside = F.one_hot(members, total - 1).sum(1).to(x.dtype)  # (W, N)
    merged = inside[chosen]  # (R, r, N)
    alone = 1 - merged.sum(1)  # (R, N)
    order = (-alone).argsort(dim=1, stable=True)[:, : total - 1 - members.shape[1] * chosen.shape[1]]
    source = torch.cat([merged, F.one_hot(order, total - 1).to(x.dtype)], 1)
    source = torch.cat([F.pad(source.new_zeros(rows, 1, total - 1), (1, 0), value=1.0), F.pad(source, (1, 0))], 1)
    sizes = source.sum(-1, keepdim=True)
    return source @ x / sizes, sizes, source


def dropped(total: Tensor, largest: Tensor, tau_g: float, tau_i: float) -> Tensor:
    """Stage B: which visual tokens get too little attention, both in sum (..., V) and at most (..., V)."""
    return (total < total.sum(-1, keepdim=True) * tau_g) & (largest < tau_i)


@system(
    "mustdrop",
    kind="prune",
    paper=Paper(
        title="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
        authors="Liu, Ting and Shi, Liangtao and Hong, Richang and Hu, Yue and Yin, Quanjun and Zhang, Linfeng",
        venue="arXiv",
        year=2024,
        arxiv="2411.10803",
        code="liuting20/MustDrop",
        licence="Apache-2.0",
    ),
    summary="merges alike patches in the tower, drops unattended tokens in the decoder, then thins the earlier caches",
    published=(("LLaVA, abstract: FLOPs saved at a compression of 92.2 %", "88.5 %"),),
)
@dataclass(frozen=True)
class MustDrop(System):
    """Multi-stage vision token dropping. No training."""

    tau_g: float = param(0.001, "a token goes if its share of the text's attention is below this ...", low=0, high=1)
    tau_i: float = param(0.001, "... and no text token gives it this much; 0 in either keeps all", low=0, high=1)
    prune_layers: tuple[int, ...] | None = param(
        None, "decoder layers (0-based) after which tokens are dropped, rising; none: 2/6/10/14 of 32, scaled", low=0
    )
    merge_threshold: float | None = param(
        0.8, "merge windows of patches whose mean similarity is at least this; none: merge nothing", low=-1, high=1
    )
    window: tuple[int, int] = param((3, 3), "height and width of these windows, in patches", low=1)
    keep_rate: float = param(0.08, "share of the patches that is immune, by the class token's attention", low=0, high=1)

    def __post_init__(self) -> None:
        check_parameters(self)
        layers = self.prune_layers
        if layers is not None and (not layers or sorted(set(layers)) != list(layers)):
            raise ParameterError(f"mustdrop: prune_layers={layers} must rise, e.g. (2, 6, 10, 14)")
        if len(self.window) != 2 or self.window[0] * self.window[1] < 2:
            raise ParameterError(f"mustdrop: window={self.window} must be two numbers, and hold at least two patches")

    def idle(self) -> bool:
        return self.merge_threshold is None and 0 in (self.tau_g, self.tau_i)

    def conflicts(self, other: System) -> str | None:
        if self.merge_threshold is not None and "visual_tokens" in other.stations():
            return "both choose which visual tokens enter the language model"
        return super().conflicts(other)

    @property
    def in_tower(self) -> bool:
        """Whether anything is asked of the vision tower."""
        return self.merge_threshold is not None or self.keep_rate > 0

    def stations(self) -> tuple[str, ...]:
        tower = ("vision_hidden", "vision_attention", "visual_tokens") if self.in_tower else ()
        return (*tower, "cut", "attention", "cache")

    def prepare(self, shape: Shape) -> dict[str, Any]:
        if shape.heads == 0:
            return {}  # no language model: the engine says so
        if self.in_tower:
            require_cls("mustdrop", shape, "use merge_threshold=none,keep_rate=0 for its stages in the language model")
        if self.merge_threshold is not None and shape.merged:
            raise HostError(
                "mustdrop merges single patches, but this host makes a visual token of several: use merge_threshold=none"
            )
        scaled = sorted({round(layer * shape.layers / 32) for layer in (2, 6, 10, 14)})
        layers = scaled if self.prune_layers is None else list(self.prune_layers)
        if layers[-1] > shape.layers - 2:
            raise ParameterError(
                f"mustdrop: prune_layers={tuple(layers)}: the decoder has {shape.layers} layers, and the last one is too "
                f"late: choose layers in [0, {shape.layers - 2}]"
            )
        return {"layers": layers, "prefix": shape.tower_prefix, "last": shape.tower_layers - 1}

    # -- A: the tower ------------------------------------------------------------------------------------------------

    def vision_hidden(self, site: Site, hidden: Tensor) -> Keep | None:
        if site.layer != 1 or self.merge_threshold is None:
            return None
        prefix = site.setup["prefix"]
        patches = hidden[:, prefix:]
        members = windows(patches, self.window)
        chosen = members[similar(patches, members, self.merge_threshold)]  # (R, r, w)
        if chosen.shape[1] == 0:
            return None
        middle = chosen[..., members.shape[1] // 2]  # (R, r)
        stay = torch.ones(patches.shape[:2], dtype=torch.bool, device=hidden.device)
        stay = stay.scatter(1, chosen.flatten(1), False).scatter(1, middle, True)
        wide = chosen.flatten(1)[..., None].expand(-1, -1, hidden.shape[2])
        means = patches.gather(1, wide).view(*chosen.shape, -1).float().mean(2).to(hidden.dtype)
        patches = patches.scatter(1, middle[..., None].expand_as(means), means)
        states = torch.cat([hidden[:, :prefix], patches], 1)
        return Keep(F.pad(stay, (prefix, 0), value=True), states=states)

    def vision_attention(self, site: Site) -> Probe | None:
        if site.layer != site.setup["last"] or self.keep_rate == 0:
            return None

        def see(weights: Tensor, first: int) -> None:  # (R, H, 1, 1 + N')
            row = weights[:, :, 0, site.setup["prefix"] :].mean(1)
            site.seen["key"] = best(row, math.ceil(self.keep_rate * row.shape[1]))  # (R, N')

        return Probe(see, stop=1)

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep | None:
        """What was merged away never enters the decoder; which tokens are immune is written down by column."""
        pictures, prefix = site.pictures, site.setup["prefix"]
        alive = torch.arange(pictures.tower[1], device=embeddings.device).expand(pictures.tower)
        alive = (pictures.alive[-1] if pictures.alive else alive)[:, prefix:] - prefix  # (R, N')
        shape = (pictures.tower[0], pictures.tower[1] - prefix)
        keep = None
        if self.keep_rate > 0:
            key = torch.zeros(shape, dtype=torch.bool, device=embeddings.device).scatter(1, alive, site.seen["key"])
            key = pictures.places.pool(key) > 0  # (V,)
            visual, known = site.tokens.visual[:, site.start :], site.state.get("key")
            here = torch.zeros_like(visual)
            here[visual] = key[columns_of(len(key), visual)]
            site.state["key"] = here if known is None or site.start == 0 else torch.cat([known, here], 1)
        if alive.shape[1] < shape[1]:
            there = torch.zeros(shape, dtype=torch.bool, device=embeddings.device).scatter(1, alive, True)
            chosen = pictures.places.pool(there) > 0  # newlines and the like go
            site.tally.setdefault("tower", []).append(
                torch.stack([torch.tensor(len(chosen), device=chosen.device), chosen.sum()])
            )
            keep = keep_visual(site, chosen)
        return keep

    # -- B: the decoder ------------------------------------------------------------------------------------------------

    def attention(self, site: Site) -> Probe | None:
        if not site.prefill or site.layer not in site.setup["layers"] or not site.tokens.has_image:
            return None
        if 0 in (self.tau_g, self.tau_i):
            return None
        start = max(site.tokens.first_after - site.start, 0)
        if start >= site.queries:
            return None
        text = site.tokens.role[:, site.start :] == int(Role.AFTER)  # (B, Q)
        site.state[site.layer] = None

        def see(weights: Tensor, first: int) -> None:  # (B, H, R, K)
            rows = weights.mean(1) * text[:, first : first + weights.shape[2], None]
            total, largest, known = rows.sum(1), rows.amax(1), site.state[site.layer]
            site.state[site.layer] = (
                (total, largest) if known is None else (known[0] + total, torch.maximum(known[1], largest))
            )

        return Probe(see, start=start)

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        found = site.state.pop(site.layer - 1, None) if site.layer - 1 in site.setup["layers"] else None
        if found is None:
            return None
        visual = site.tokens.visual
        skip = visual.shape[1] - found[0].shape[1]  # columns that a sliding window does not show
        total, largest = (F.pad(x, (skip, 0)).masked_fill(~visual, 0.0) for x in found)  # (B, M)
        gone = dropped(total, largest, self.tau_g, self.tau_i) & visual
        if "key" in site.state:
            key = site.state["key"]
            column = site.tokens.position.long()
            gone = gone & ~(key.gather(1, column.clamp(0, key.shape[1] - 1)) & (column >= 0))
        before, after = visual[:, site.start :].sum(), (visual & ~gone)[:, site.start :].sum()
        site.tally.setdefault(site.layer - 1, []).append(torch.stack([before, after]))
        return Keep(~gone[:, site.start :])

    # -- C: the cache ----------------------------------------------------------------------------------------------------

    def cache(self, site: Site, cache: Any) -> None:
        layers = site.setup["layers"]
        last = site.cuts.tokens(layers[-1] + 1)
        if not site.prefill or last is site.whole:
            return
        width = int(site.whole.position.max()) + 2
        left = torch.zeros(last.shape[0], width, dtype=torch.bool, device=last.role.device)
        left = left.scatter(1, last.position.long() + 1, True)  # by original column; 0: filler
        left[:, 0] = False
        for layer in range(layers[0], layers[-1] + 1):
            keep = left.gather(1, site.cuts.tokens(layer).position.long() + 1)
            site.cuts.evict(layer, keep, site.cuts.shift(layers[-1] + 1))

    def report(self, tally: dict[Any, Any], setup: dict[str, Any]) -> dict[str, Any]:
        layers = sorted(k for k in tally if isinstance(k, int))
        counts = [torch.stack(tally[layer]).sum(0).tolist() for layer in layers]
        return {
            "visual_tokens_merged": torch.stack(tally["tower"]).sum(0).tolist()
            if "tower" in tally
            else [],  # before, after
            "layers": layers,  # after which tokens were dropped
            "image_tokens_before": [before for before, _ in counts],
            "image_tokens_after": [after for _, after in counts],
        }

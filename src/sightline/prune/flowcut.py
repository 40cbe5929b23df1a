"""FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models.

NeurIPS 2025, arXiv 2505.19536. Official code: TungChintao/FlowCut (Apache-2.0).

Patches are dropped step by step inside the vision tower. The class token is taken as the relay of the information flow: a
patch counts by its attention, by how its value resembles the class token's, and by the size of its value, with a moving
average over layers. How many go depends on how concentrated the attention is. With n patches alive and K wanted, S the
tower layer that is projected (LLaVA: the last but one), after layer i < S, s = S - i - 1 layers being left:

    a_j     = mean_h A[h, 0, j]                          A = softmax(q k^T / sqrt(d)), 0: the class token
    z_j     = mean_h softmax_j(v_h[0] . v_h[j])          over all 1 + n tokens, not scaled
    score_j = (a_j / sum(a) + z_j / sum(z)) |mean_h v_h[j]|_1            sums over patches
    cum     = score at first, then (cum + score) / 2     as long as n > K
    s even:   p = a / sum(a), rho = H(p) / ln(n);  r = round(max over the batch of (n - K) / sqrt(s) (1 - rho^2))
    s = 0:    r = n - K
    keep    the max(n - r, K) largest cum, in their order; the class token always stays

Layer S then runs on exactly 1 + K tokens. Pictures seen in tiles: int(K / 2) of every view in the tower; inside the language
model K of all visual tokens go on after decoder layer `llm_layer`, by the same score with the last prompt token as relay,
(softmax over visual tokens only, z scaled by 1 / sqrt(d) as well); caches of earlier layers keep all, positions close up.

Against the official code: (1) zero attention counts 0 log 0 = 0 instead of NaN. (2) Equal scores: the lower index stays.
(3) In the language model heads may be grouped and padding may be on any side. (4) The count is the batch's largest, as
there: all views of one encoding lose equally many tokens, so that pictures of a batch are not independent. (5) Newline
tokens are dropped with the first patch, as there.

Towers that pack all pictures into one row and merge k = 4 patches into a token (Qwen2-VL and 2.5) have no class token. As in
the official variant for Qwen2-VL, the mean query of a picture is its relay, S is the number of layers, 2 K tokens' patches
leave the tower (the last cut is behind its last layer), and K tokens go on after `llm_layer`, at their old positions:

    a_j = mean_h softmax_j(mean_i(q_h[i]) . k_h[j] / sqrt(d)),   score_j = a_j |mean_h v_h[j]|_1,   H with log(p + 1e-7)

That code drops single patches, so that its merger makes tokens of four patches that were no neighbours, and puts them at
the picture's first positions. `unit="patches"` does the same, one picture a forward; by default whole tokens go, by the
mean of their patches' cum, and stay where they are, and every picture of a forward is judged by itself.

Cost: one row of attention and one of values per layer, O(N C); the later layers of the tower get cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.select import Keep, best, entropy
from sightline.engine.system import Shape, Site
from sightline.engine.tokens import Role
from sightline.errors import HostError, InputError, ParameterError
from sightline.prune.parts.tower import Chooser, require_cls

UNITS = ("tokens", "patches")


def scores(attention: Tensor, semantic: Tensor, value: Tensor) -> Tensor:
    """Flow scores (..., n) from the relay's attention and value similarity (..., n) and mean values (..., n, d)."""
    share = attention / attention.sum(-1, keepdim=True) + semantic / semantic.sum(-1, keepdim=True)
    return share * value.norm(p=1, dim=-1)


def prune_count(attention: Tensor, left: int, target: int) -> int:
    """How many patches go after a layer: attention (B, n) of the class token, `left` layers to go, `target` wanted."""
    count = attention.shape[-1]
    if left == 0:
        return count - target
    even = entropy(attention) / math.log(count)
    return int(((count - target) / left**0.5 * (1 - even**2)).max().round())


def mean_scores(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention, score), each (n,) fp32, of a picture's patches with their mean query as relay; query ... (H, n, d)."""
    relay = query.mean(1, keepdim=True)
    attention = (relay @ key.transpose(-1, -2) * scale).float().softmax(-1).mean(0)[0]
    return attention, attention * value.mean(0).float().norm(p=1, dim=-1)


def mean_prune_count(attention: Tensor, left: int, target: int) -> int:
    """`prune_count` of the variant without a class token: attention (n,) that sums to 1."""
    count = len(attention)
    if left == 0:
        return count - target
    even = -(attention * (attention + 1e-7).log()).sum() / math.log(count)
    return int(((count - target) / left**0.5 * (1 - even**2)).round())


def semantics(value: Tensor, scale: float = 1.0) -> Tensor:
    """(B, N) mean over heads of softmax_j(scale v[0] . v[j]); value (B, H, N, d)."""
    return (value[:, :, :1] @ value.transpose(-1, -2) * scale).float().softmax(-1).mean(1)[:, 0]


def relay_scores(query: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Flow scores of visual tokens in the language model, by one relay.

    Args:
        query: (H, d) of the relay. value: (Hkv, d) of the relay. keys, values: (Hkv, n, d) of the visual tokens.

    Returns:
        (n,) fp32.
    """
    groups = len(query) // len(keys)
    relation = (query.unflatten(0, (len(keys), groups)) @ keys.transpose(-1, -2) * scale).float().softmax(-1)
    semantic = ((value[:, None] * values).sum(-1) * scale).float().softmax(-1)  # (Hkv, n): the same for its group
    return scores(relation.mean((0, 1)), semantic.mean(0), values.mean(0).float())


@system(
    "flowcut",
    kind="prune",
    paper=Paper(
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        authors="Tong, Jintao and Jin, Wenwei and Qin, Pengda and Li, Anqi and Zou, Yixiong and Li, Yuhong and Li, Yuhua and "
        "Li, Ruixuan",
        venue="NeurIPS",
        year=2025,
        arxiv="2505.19536",
        code="TungChintao/FlowCut",
        licence="Apache-2.0",
    ),
    summary="drops patches layer by layer inside the vision tower, by how information flows through its class token",
    needs=("image_tokens", "cls"),
    published=(
        ("LLaVA-1.5-7B with 64 of 576 tokens: against the best earlier method", "+1.6 %"),
        ("LLaVA-NeXT-7B with 160 of 2880 tokens: against the best earlier method; prefill", "+4.3 %; x3.2 faster"),
    ),
)
@dataclass(frozen=True)
class FlowCut(Chooser):
    """Progressive pruning inside the vision tower. No training."""

    target_num: int | None = param(128, "visual tokens of a picture that stay; none: all", low=1)
    ema: float = param(0.5, "weight of the newest score in the moving average", low=0, high=1)
    llm_layer: int = param(1, "decoder layer (0-based) behind which pictures seen in tiles are cut once more", low=0)
    every: int = param(2, "drop after every so many tower layers", low=1)
    unit: Literal["tokens", "patches"] = param(
        "tokens", "what goes where patches are merged: whole tokens; patches: single ones, as released for Qwen2-VL"
    )

    def __post_init__(self) -> None:
        check_parameters(self)
        if self.unit not in UNITS:
            raise ParameterError(f"flowcut: unit={self.unit!r}: choose one of {', '.join(UNITS)}")

    def idle(self) -> bool:
        return self.target_num is None

    def prepare(self, shape: Shape) -> dict[str, int | None]:
        if not shape.packed:
            require_cls("flowcut", shape, "choose fopru, or vtc-cls:score=mean-received")
            if shape.merged:
                raise HostError(
                    "flowcut drops single patches, but this host merges several into a visual token: choose vtc-cls"
                )
            if shape.feature_layer < 1:
                raise ParameterError("flowcut needs a tower layer before the one that is projected, and there is none")
        twice = shape.tiled or shape.packed  # cut again in the language model
        if twice and self.llm_layer + 1 >= shape.layers:
            raise ParameterError(
                f"flowcut: llm_layer={self.llm_layer} leaves no decoder layer behind it: choose llm_layer in "
                f"[0, {shape.layers - 2}]"
            )
        setup = {"prefix": shape.tower_prefix, "packed": shape.packed, "cut": self.llm_layer if twice else None}
        target = self.target_num or 0
        if shape.packed:
            return setup | {"last": shape.tower_layers, "target": 2 * target * shape.packed}
        return setup | {"last": shape.feature_layer, "target": max(1, target // 2) if shape.tiled else target}

    def vision_attention(self, site: Site) -> Probe | None:
        """Score the patches alive in this layer."""
        if site.setup["packed"]:  # one call per picture or window: scored when all are there
            site.seen.setdefault("calls", []).append((site.call.query, site.call.key, site.call.value))
            site.seen["scale"] = site.call.scale
            return None
        last, prefix, target = (site.setup[k] for k in ("last", "prefix", "target"))
        if site.layer >= last or site.call.keys - prefix <= target:
            return None
        value, seen = site.call.value, site.seen

        def see(weights: Tensor, first: int) -> None:  # (R, H, 1, N)
            attention = weights[:, :, 0].mean(1)[:, prefix:]
            new = scores(attention, semantics(value)[:, prefix:], value.mean(1)[:, prefix:].float())
            old = seen.get("cum")
            seen["attention"] = attention
            seen["cum"] = new if old is None else (1 - self.ema) * old + self.ema * new

        return Probe(see, stop=1)

    def vision_hidden(self, site: Site, hidden: Tensor) -> Keep | None:
        """Drop what the layer before this one found superfluous."""
        if site.setup["packed"]:
            return self._packed(site, hidden) if site.layer else None
        last, prefix, target = (site.setup[k] for k in ("last", "prefix", "target"))
        count, left = hidden.shape[1] - prefix, last - site.layer  # layers left behind the one before
        if site.layer == 0 or left < 0 or count <= target or left % self.every:
            return None
        kept = max(count - prune_count(site.seen["attention"], left, target), target)
        chosen = best(site.seen["cum"], kept)  # (R, n)
        site.seen["cum"] = site.seen["cum"][chosen].view(len(chosen), kept)
        return Keep(torch.nn.functional.pad(chosen, (prefix, 0), value=True))

    def _packed(self, site: Site, hidden: Tensor) -> Keep | None:
        """The same where all pictures are in one row, each for itself, after the layer before this one."""
        merged, target, seen = site.setup["packed"], site.setup["target"], site.seen
        calls, alive = seen.pop("calls"), site.pictures.alive[-1][0]  # (N,)
        query, key, value = (torch.cat(part, 2)[0].detach() for part in zip(*calls, strict=True))  # (H, N, d)
        if self.unit == "patches" and len(site.pictures.parts) > 1:
            raise InputError("flowcut: unit=patches takes one picture a forward, as the released code does")
        left, keep = site.setup["last"] - site.layer, torch.ones_like(alive, dtype=torch.bool)
        cum, first = seen.get("cum", torch.zeros(len(alive), device=alive.device)), "cum" not in seen
        borders = torch.tensor([0, *accumulate(site.pictures.parts)], device=alive.device)
        for mine in starmap(slice, pairwise(torch.searchsorted(alive, borders).tolist())):
            count = mine.stop - mine.start
            if count <= target:
                continue
            attention, new = mean_scores(query[:, mine], key[:, mine], value[:, mine], seen["scale"])
            cum[mine] = new if first else (1 - self.ema) * cum[mine] + self.ema * new
            if left % self.every == 0:
                wanted = max(count - mean_prune_count(attention, left, target), target)
                step = merged if self.unit == "tokens" else 1
                means = cum[mine].view(-1, step).mean(1)
                keep[mine] = best(means, -(-wanted // step)).repeat_interleave(step)
        seen["cum"] = cum[keep]
        return None if len(seen["cum"]) == len(keep) else Keep(keep[None])

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        pictures, merged = site.pictures, site.setup["packed"]
        if merged:
            alive = pictures.alive[-1][0]
            if self.unit == "patches":  # merged ones stand first in the tower's row
                return self.choose(site, pictures.places.patch[:, 0] // merged < len(alive) // merged)
            there = torch.zeros(1, pictures.alive[0].shape[1], dtype=torch.bool, device=alive.device)
            there[0, alive] = True
            return self.choose(site, pictures.places.pool(there) > 0)
        alive = torch.zeros(pictures.tower, dtype=torch.bool, device=embeddings.device)
        alive = alive.scatter(1, pictures.alive[-1], True)[:, site.setup["prefix"] :]  # (R, N)
        return self.choose(site, pictures.places.pool(alive) > 0)

    def attention(self, site: Site) -> None:
        """Of pictures seen in tiles, or packed: score the visual tokens by the last prompt token."""
        if site.layer != site.setup["cut"] or not site.prefill or not site.tokens.has_image:
            return
        call, tokens = site.call, site.tokens
        visual = tokens.visual.clone()
        visual[:, : site.start] = False
        real = (tokens.role != int(Role.PAD)) & (tokens.role != int(Role.GENERATED))
        order = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, order, -1).amax(1)  # (B,) column of the last prompt token
        keep = torch.ones_like(visual)
        for b in range(len(visual)):  # rows have different numbers of visual tokens
            mine = visual[b].nonzero().flatten()
            if len(mine) > self.target_num:
                at = int(last[b])
                relay = call.query[b, :, at - site.start], call.value[b, :, at]
                found = relay_scores(*relay, call.key[b, :, mine], call.value[b, :, mine], call.scale)
                keep[b, mine] = best(found, self.target_num)
        site.state["keep"] = keep[:, site.start :]

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        if site.setup["cut"] is None or site.layer != site.setup["cut"] + 1:
            return None
        return Keep(site.state.pop("keep"), "keep" if site.setup["packed"] else "renumber")

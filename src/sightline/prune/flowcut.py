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
tokens are dropped with the first patch, as there. (6) The variant for Qwen2-VL, whose single patches break up its merged
groups of four, is not offered.

Cost: one row of attention and one of values per layer, O(N C); the later layers of the tower get cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.select import Keep, best, entropy
from sightline.engine.system import Shape, Site
from sightline.engine.tokens import Role
from sightline.errors import HostError, ParameterError
from sightline.prune.parts.tower import Chooser, require_cls


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

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.target_num is None

    def prepare(self, shape: Shape) -> dict[str, int | None]:
        require_cls("flowcut", shape, "choose fopru, or vtc-cls:score=mean-received")
        if shape.merged:
            raise HostError(
                "flowcut drops single patches, but this host merges several into a visual token: choose vtc-cls"
            )
        if shape.feature_layer < 1:
            raise ParameterError("flowcut needs a tower layer before the one that is projected, and there is none")
        target = self.target_num or 0
        target = max(1, target // 2) if shape.tiled else target
        if shape.tiled and self.llm_layer + 1 >= shape.layers:
            raise ParameterError(
                f"flowcut: llm_layer={self.llm_layer} leaves no decoder layer behind it: choose llm_layer in "
                f"[0, {shape.layers - 2}]"
            )
        cut = self.llm_layer if shape.tiled else None
        return {"last": shape.feature_layer, "prefix": shape.tower_prefix, "target": target, "cut": cut}

    def vision_attention(self, site: Site) -> Probe | None:
        """Score the patches alive in this layer."""
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
        last, prefix, target = (site.setup[k] for k in ("last", "prefix", "target"))
        count, left = hidden.shape[1] - prefix, last - site.layer  # layers left behind the one before
        if site.layer == 0 or left < 0 or count <= target or left % self.every:
            return None
        kept = max(count - prune_count(site.seen["attention"], left, target), target)
        chosen = best(site.seen["cum"], kept)  # (R, n)
        site.seen["cum"] = site.seen["cum"][chosen].view(len(chosen), kept)
        return Keep(torch.nn.functional.pad(chosen, (prefix, 0), value=True))

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        pictures = site.pictures
        alive = torch.zeros(pictures.tower, dtype=torch.bool, device=embeddings.device)
        alive = alive.scatter(1, pictures.alive[-1], True)[:, site.setup["prefix"] :]  # (R, N)
        return self.choose(site, pictures.places.pool(alive) > 0)

    def attention(self, site: Site) -> None:
        """Of pictures seen in tiles: score the visual tokens by the last prompt token."""
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
        return Keep(site.state.pop("keep"), "renumber")

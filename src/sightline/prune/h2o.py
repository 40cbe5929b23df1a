"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (SinkLoRA's cache at decoding).

NeurIPS 2023, arXiv 2306.14048. Official code: FMInference/H2O; SinkLoRA (arXiv 2406.05678) names it for its decoding and publishes
no code of it. Every key head h of every layer keeps a budget of its own tokens; with A the attention of its query heads,

    s_hj  = sum over all queries so far, of the prompt and generated, of A_hij          (B, Hkv, N)
    R     = the last `recent` n tokens,  n: tokens of the prompt
    T_h   = R and, of the others, the `heavy` n with the largest s_h (equal: the earlier token)
    the cache of head h drops what is not in T_h, after the prompt and after every generated token, for good

A dropped token's score stops mattering; positions stay those of the whole text. Scores are the keys' own sums, over the query
heads that share them. Layers with a sliding window keep their (bounded) cache. heavy = 0 is a window; shares of 1 or more
together drop nothing. Without a cache nothing is dropped.

Against the official code: shares are of every row's own prompt, where it takes the batch's padded length and sums the scores of
all its rows; a later prompt in the same cache makes the budget grow with the text.

Cost: the prompt's attention once more, in pieces of rows (never N x N), one row per generated token; scores of N numbers per
head. The cache holds (heavy + recent) n tokens instead of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Probe
from sightline.engine.select import best
from sightline.engine.system import Site, System
from sightline.engine.tokens import Role


def kept(scores: Tensor, real: Tensor, heavy: Tensor, recent: Tensor) -> Tensor:
    """(B, Hkv, N) bool: what every head keeps.

    Args:
        scores: (B, Hkv, N), -inf for what it dropped before. real: (B, N) bool, no padding.
        heavy, recent: (B,) how many tokens of each kind.
    """
    held = real[:, None] & (scores > -torch.inf)
    behind = real.flip(1).cumsum(1).flip(1)  # real tokens from here to the end
    fresh = held & (behind <= recent[:, None])[:, None]
    count = (heavy + recent)[:, None] - fresh.sum(-1)  # so every head keeps as many, also where a window has grown
    return fresh | best(scores, count, valid=held & ~fresh)


@system(
    "h2o",
    kind="prune",
    paper=Paper(
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        authors="Zhang, Zhenyu and Sheng, Ying and Zhou, Tianyi and Chen, Tianlong and Zheng, Lianmin and Cai, Ruisi "
        "and Song, Zhao and Tian, Yuandong and Re, Christopher and Barrett, Clark and Wang, Zhangyang and Chen, Beidi",
        venue="NeurIPS",
        year=2023,
        arxiv="2306.14048",
        code="FMInference/H2O",
    ),
    summary="every head caches the tokens that gathered most attention, and the recent ones",
    needs=(),
    published=(
        ("throughput of OPT-6.7B and 30B over Hugging Face Accelerate, 20 % heavy hitters (abstract)", "up to 29x"),
    ),
)
@dataclass(frozen=True)
class H2O(System):
    """Heavy hitters and recent tokens in the cache, per head. No training."""

    heavy: float = param(0.1, "heavy hitters, as a share of the prompt's tokens", low=0, high=1)
    recent: float = param(0.1, "recent tokens, as a share of the prompt's tokens; one at least", low=0, high=1)

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.heavy + self.recent >= 1

    def conflicts(self, other: System) -> str | None:
        if "cache" in other.stations() and type(other) is not type(self):
            return "both take tokens out of the cache"
        return super().conflicts(other)

    def attention(self, site: Site) -> Probe:
        role = site.tokens.role  # (B, N)
        asking = (role[:, site.start :] != int(Role.PAD)).float()  # (B, Q)
        heads_kv, state = site.call.key.shape[1], site.state
        scores = state.get(("scores", site.layer))
        if scores is None:
            scores = role.new_zeros(role.shape[0], heads_kv, 0, dtype=torch.float32)
        order = site.cuts.order(site.layer)
        scores = scores if order is None else scores[order]
        scores = F.pad(scores, (0, role.shape[1] - scores.shape[2]))
        state["scores", site.layer] = scores

        def see(weights: Tensor, first: int) -> None:  # (B, H, R, K)
            rows = asking[:, None, first : first + weights.shape[2], None]
            given = (weights * rows).sum(2).unflatten(1, (heads_kv, -1)).sum(2)  # (B, Hkv, K)
            scores.add_(F.pad(given, (scores.shape[2] - given.shape[2], 0)))

        return Probe(see)

    def cache(self, site: Site, cache: Any) -> None:
        for layer in range(site.layers):
            if site.cuts.loose(layer) is None:
                continue
            scores, tokens = site.state["scores", layer], site.cuts.tokens(layer)
            real = tokens.role != int(Role.PAD)
            if site.prefill:
                count = real.sum(1)
                heavy, recent = (self.heavy * count).long(), (self.recent * count).long().clamp(min=1)
                site.state["budget", layer] = heavy, recent, int((heavy + recent).max())
            heavy, recent, most = site.state["budget", layer]
            keep = kept(scores, real, heavy, recent)
            site.state["scores", layer] = scores.masked_fill(~keep, -torch.inf)
            site.cuts.evict(layer, keep, most=most)
            site.tally[layer] = most

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        return {"cached_tokens_per_head": [tally[layer] for layer in sorted(tally)]}

"""ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification (v1: ... and KV Cache Compression).

ICCV 2025, arXiv 2410.08584. No official code was found; the quantiser is that of the authors' ZipCache. Not checked against
published arrays; numbers of probes and bits are from memory of the paper.

Each decoder layer finds how many tokens hold a share tau of its attention, and works on that many alone. On the prompt, with
probe rows P (the last `recent` tokens and `random` others), A = softmax(q k^T / sqrt(d)) (B, H, |P|, N), mean over heads:

    s_j  = sum_{i in P} A_ij                              sum_j s_j = |P|
    p    = min{ p : the p largest s sum to tau |P| }      so p / N adapts to layer and question
    n_j  = s_j / #{i in P that see j}                     early tokens have no advantage
    T    = the p largest n, in their order;               O[T] = attention among T,  O[others] = 0

All tokens compete, text too, and hidden states keep their length. `cache="quantise"` (v1) then holds T in `bits_high` and
the others in `bits_low`; "evict" (v2) keeps T only; "keep" leaves the cache alone. Every `interval` generated tokens the new
ones are sorted the same way, by what they gave each other, and compressed.

Choices where the paper is silent: random probes are drawn one from each of `random` equal stretches of the text before the
recent ones, so that a row's probes do not depend on its batch; layers with a sliding window keep their (bounded) cache at
full precision when quantising; generated tokens ask one by one, so all of an interval are probes.

Cost: |P| rows of attention per layer, summed some heads at a time, then (p / N)^2 of the dense attention; projections and MLP
are unchanged. The number p is read from the device, once per layer of a prompt. A compressed cache is restored layer by layer
when used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Only, Probe, sums_of, visible
from sightline.engine.select import best, columns, mass
from sightline.engine.system import Site, System
from sightline.engine.tokens import Role
from sightline.errors import ParameterError


def important(sums: Tensor, seen: Tensor, tau: float, valid: Tensor | None = None) -> Tensor:
    """(B, N) bool: the tokens T.

    Args:
        sums: (B, N) s, the attention that every token got from all probes, mean over heads.
        seen: (B, N) how many probes may see each token.
        tau: share of the attention that T would hold by plain sums.
        valid: (B, N) bool, tokens that are no padding.
    """
    count = mass(sums, tau, valid=valid).sum(-1)  # (B,)
    return best(sums / seen.clamp(min=1), count, valid=valid)


def probes(real: Tensor, recent: int, random: int, draws: Tensor) -> Tensor:
    """(B, N) bool: the last `recent` real tokens of every row, and one from each of `random` stretches before them.

    draws: (random,) in [0, 1), where in its stretch every one lies.
    """
    place = real.long().cumsum(1) - 1  # (B, N)
    rest = (real.sum(1, keepdim=True) - recent).clamp(min=0)  # (B, 1)
    chosen = real & (place >= rest)
    stretch = (torch.arange(random, device=real.device) + draws) / max(random, 1)  # (random,)
    picks = (stretch * rest).long()  # (B, random), distinct when there are more tokens than stretches
    hit = torch.zeros(real.shape[0], real.shape[1] + 1, dtype=torch.bool, device=real.device)
    hit = hit.scatter(1, picks, True).gather(1, place.clamp(min=0))
    earlier = real & (place < rest)
    return chosen | (earlier & (hit | (rest <= random)) if random else torch.zeros_like(real))


@system(
    "zipvl",
    kind="prune",
    paper=Paper(
        title="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification",
        authors="He, Yefei and Chen, Feng and Liu, Jing and Shao, Wenqi and Zhou, Hong and Zhang, Kaipeng and Zhuang, Bohan",
        venue="ICCV",
        year=2025,
        arxiv="2410.08584",
    ),
    summary="attends among as many tokens per layer as hold most of the attention, and compresses the cache by the same split",
    published=(
        ("LLaVA-1.5-7B, tau 0.975 (52.8 % of tokens): VQAv2 / GQA / TextVQA", "76.6/61.9/46.1 -> 76.4/61.7/45.7"),
        ("LongVA-7B, Video-MME, 128 frames: attention FLOPs", "-82.3 %"),
    ),
)
@dataclass(frozen=True)
class ZipVL(System):
    """Dynamic token sparsification with a mixed-precision or thinned cache. No training."""

    tau: float = param(0.975, "share of a layer's attention that the important tokens hold; 1: all are", low=0, high=1)
    cache_mode: Literal["quantise", "evict", "keep"] = param(
        "quantise", "the cache: important tokens in more bits (v1), only these (v2), or left alone"
    )
    bits_high: int = param(4, "bits of important tokens: 2, 4, 8 or 16 (as they are)", low=2, high=16)
    bits_low: int = param(2, "bits of the others", low=2, high=16)
    recent: int = param(64, "the last tokens of the prompt that ask", low=1)
    random: int = param(64, "other tokens that ask", low=0)
    interval: int = param(100, "generated tokens after which these are compressed too", low=1)
    seed: int = param(0, "of the random probes", low=0)

    def __post_init__(self) -> None:
        check_parameters(self)
        for name in ("bits_high", "bits_low"):
            if getattr(self, name) not in (2, 4, 8, 16):
                raise ParameterError(f"zipvl: {name}={getattr(self, name)}: choose 2, 4, 8 or 16")
        if self.bits_low > self.bits_high:
            raise ParameterError(f"zipvl: bits_low={self.bits_low} exceeds bits_high={self.bits_high}: exchange them")

    def idle(self) -> bool:
        return self.tau == 1 and (self.cache_mode != "quantise" or self.bits_low == 16)

    def attention(self, site: Site) -> Only | Probe | None:
        if not site.prefill:
            return self._listen(site)
        role = site.tokens.role  # (B, N)
        real = role != int(Role.PAD)
        asking = real[:, site.start :] & (role[:, site.start :] != int(Role.GENERATED))
        generator = torch.Generator().manual_seed(self.seed * 1009 + site.layer)
        draws = torch.rand(self.random, generator=generator).to(role.device)
        queries = columns(probes(asking, self.recent, self.random, draws))  # (B, P)
        keys = site.call.keys
        shown = real[:, real.shape[1] - keys :]  # a sliding window shows the last columns only
        sums, seen = sums_of(site.call, queries), visible(site.call, queries).sum(1)
        chosen = important(sums, seen, self.tau, shown)  # (B, K)
        chosen = torch.nn.functional.pad(chosen, (real.shape[1] - keys, 0))
        chosen = chosen | (real & (role == int(Role.GENERATED)))  # repeated without a cache: as when each came alone
        site.state["high", site.layer] = chosen
        site.state.pop(("sums", site.layer), None)
        site.tally.setdefault(site.layer, []).append(torch.stack([chosen.sum(), real.sum()]))
        return None if self.tau == 1 else Only(chosen)

    def _listen(self, site: Site) -> Probe | None:
        """A generated token: add what it gives to the tokens generated since the last compression."""
        if self.cache_mode == "keep" or ("high", site.layer) not in site.state:
            return None
        known = site.state["high", site.layer].shape[1]  # columns already sorted

        def see(weights: Tensor, first: int) -> None:  # (B, H, 1, K)
            row = weights.mean(1)[:, 0]  # (B, K)
            count = min(row.shape[1], site.tokens.shape[1] - known)
            sums = site.state.get(("sums", site.layer))
            new = row[:, row.shape[1] - count :]
            old = 0 if sums is None else torch.nn.functional.pad(sums, (0, 1))[:, -count:]
            site.state["sums", site.layer] = new + old

        return Probe(see)

    def cache(self, site: Site, cache: Any) -> None:
        if self.cache_mode == "keep":
            return
        for layer in range(site.layers):
            high = site.state.get(("high", layer))
            tokens = site.cuts.tokens(layer)
            if high is None or (self.cache_mode == "quantise" and site.cuts.loose(layer) is None):
                continue
            new = tokens.shape[1] - high.shape[1]
            if not site.prefill:
                if new < self.interval:
                    continue
                high = self._sorted(site, layer, high, new)
            if self.cache_mode == "quantise":
                site.cuts.compress(layer, high, (self.bits_high, self.bits_low))
            elif self.tau < 1:
                site.cuts.evict(layer, high)

    def _sorted(self, site: Site, layer: int, high: Tensor, new: int) -> Tensor:
        """The split (B, M) with the last `new` generated tokens sorted in."""
        sums = site.state.pop(("sums", layer))  # (B, new)
        sums = torch.nn.functional.pad(sums, (new - sums.shape[1], 0))
        askers = torch.arange(new, 0, -1, device=sums.device)  # how many of them saw each
        count = mass(sums, self.tau).sum(-1)
        high = torch.cat([high, best(sums / askers, count)], 1)
        site.state["high", layer] = high
        return high

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        counts = {layer: torch.stack(tally[layer]).sum(0).tolist() for layer in sorted(tally)}
        shares = [chosen / total for chosen, total in counts.values()]
        if not shares:
            return {"share_of_tokens": [], "attention_flops_share": 1.0, "bits_per_number": 16.0}
        mean = sum(shares) / len(shares)
        bits = {"quantise": mean * self.bits_high + (1 - mean) * self.bits_low, "evict": 16.0 * mean, "keep": 16.0}
        return {
            "share_of_tokens": shares,  # per layer: important tokens of a prompt
            "attention_flops_share": sum(x * x for x in shares) / len(shares),  # of dense attention
            "bits_per_number": bits[self.cache_mode],  # of the cached prompt, on average, scales not counted
        }

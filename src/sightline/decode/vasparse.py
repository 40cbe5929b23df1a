"""VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification.

CVPR 2025, arXiv 2501.06553. Official code: mengchuang123/VASparse-github (no licence file).

Three parts, in every decoder layer with attention a, averaged over heads; I the n visual tokens of a row:

    r_j   = mean_q a_qj                        q: text behind the picture (`queries="all"`: every token, as the code)
    s_j   = W_j r_j^2 + lambda P_j             P: prior; the same for all without a detector, so that r decides
    keep  = the min(int(n mask_rate), n - 1) largest s; the others leave the cache once the prompt is read
    L*    = (1 + alpha) L - alpha L_sparse     L_sparse: the same prompt of which `mask_rate` of I, drawn at random, goes
                                               beyond layer `sparse_layer`; where L >= log(beta) + max L, else -inf
    c_j   = r_j of a text token relative to the mean of the row's text tokens
    a'_qj = a_qj / max(c_j, 1)^penalty         for generated tokens q, rows summing to 1 again: sinks on text weaken

`mode="release"` is what the released run does once its unbound flag is mended. With L_0 (B, V) the output head applied to the
embedding of the last token read, and s = log_softmax:

    K     = {v : s(L)_v >= max s(L) + log beta}
    L*    = log_softmax(s(L) - s(L_0) - alpha L_0) on K, -inf elsewhere        `dola=False`: log_softmax(L - alpha L_0), all v

Against the official code: the released run drops no token; its sparse pass returns before the first layer, and its score
function (`relation`, `score`, `keep_mask`), which is the one here to the number, is not reached. Against the paper: (1) it ranks
all tokens before the newest at every step, head by head, P of one being the softmax of its attention to the picture (equation
5), keeps 90 %, and merges the others into clusters; here the picture's tokens are ranked, once. (2) It takes L_sparse from the
output head on embeddings alone, without the decoder: `contrast_with="head"`, with the last token's embedding, as the code; the default
reads the thinned picture to the last layer. (3) Its penalty scales scores by 1 + b (1 - w_j), w the softmax over all tokens j of the
attention they received so far (equation 7), b = 0.1; the one here acts on what is above the text's mean. (4) The optional gate by
an object detector and the prior that needs it are left out; so is the merging of generated tokens, which a global counter
confines to layer 0 in the release. (5) The draw is the same for every row and every run (`seed`).

Cost: the probe of the text's rows at prefill, a second prefill, and two forwards per token, one of them with fewer tokens;
with `contrast_with="head"` or as released one more product with the output head per token instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.decode.contrast import plausible, weigh
from sightline.engine.attention import Edit, Probe
from sightline.engine.prompts import Prompt
from sightline.engine.select import Keep, best
from sightline.engine.streams import last_real
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import ParameterError


def relation(attention: Tensor, begin: int, count: int) -> Tensor:
    """(B, n) mean attention that visual tokens [begin, begin + count) receive, over heads and all queries of (B, H, Q, K)."""
    return attention.mean(1)[:, :, begin : begin + count].mean(1)


def score(received: Tensor, prior: Tensor | float = 1.0, *, lam: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
    """s (B, n) of visual tokens from the attention they receive and their prior."""
    return weight * received**2 + lam * prior


def keep_mask(scores: Tensor, ratio: float) -> Tensor:
    """(B, n) bool: the min(int(n ratio), n - 1) largest scores of every row."""
    count = min(int(scores.shape[-1] * ratio), scores.shape[-1] - 1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, dim=-1).indices, True)


def budget(visual: Tensor, ratio: float) -> Tensor:
    """(B,) the same number for rows whose visual tokens are marked in (B, N) bool; 0 for rows without."""
    counts = [
        max(0, min(int(n * ratio), n - 1)) for n in range(visual.shape[-1] + 1)
    ]  # int(n ratio) in double precision
    return torch.tensor(counts, device=visual.device)[visual.sum(-1)]


def sink_bias(received: Tensor, text: Tensor, penalty: float) -> Tensor:
    """(B, N) added to attention logits: -penalty log max(1, received / mean over text) on text tokens (B, N) bool, else 0."""
    mean = (received * text).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    relative = received / mean.clamp(min=torch.finfo(received.dtype).tiny)
    return -penalty * relative.clamp(min=1).log().masked_fill(~text, 0.0)


def released(logits: Tensor, embedded: Tensor, *, alpha: float = 0.1, beta: float = 0.1, dola: bool = True) -> Tensor:
    """(B, V) log-probabilities as released: scores of the last layer against those of the last token's embedding.

    Args:
        logits, embedded: (B, V) output head on the last layer's state and on the embedding of the last token read.
        alpha, beta: the code's `contrastive_rate` and `relative_top`. dola: its flag `DoLa_is_layer`.
    """
    if not dola:
        return (logits - alpha * embedded).log_softmax(-1)
    difference = logits.log_softmax(-1) - embedded.log_softmax(-1)
    return (
        (difference - alpha * embedded)
        .masked_fill(~plausible(logits.log_softmax(-1), beta), -torch.inf)
        .log_softmax(-1)
    )


@system(
    "vasparse",
    kind="decode",
    paper=Paper(
        title="VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification",
        authors="Zhuang, Xianwei and Zhu, Zhihong and Xie, Yuxin and Liang, Liming and Zou, Yuexian",
        venue="CVPR",
        year=2025,
        arxiv="2501.06553",
        code="mengchuang123/VASparse-github",
        licence="none stated",
    ),
    summary="keeps the visual tokens that text looks at, contrasts with a random half of them, weakens sinks on text",
    published=(("CHAIR_I, LLaVA-1.5, 64 tokens (plot)", "7.2 -> 5.8"),),
)
@dataclass(frozen=True)
class VASparse(System):
    """Visual-aware sparsification, sparse contrast and sink penalty. No training; a second stream."""

    mode: Literal["paper", "release"] = param("paper", "the paper's three parts, or what the released run does")
    mask_rate: float = param(
        0.5, "share of visual tokens kept, by score in the cache and at random in the contrast", low=0, high=1
    )
    alpha: float = param(0.1, "strength of the sparse contrast", low=0)
    beta: float = param(0.1, "tokens less likely than this share of the likeliest are cut; 0 cuts none", low=0, high=1)
    penalty: float = param(0.1, "strength of the penalty on text tokens that gather attention; 0: none", low=0)
    sparse_layer: int = param(3, "decoder layer before which the contrast's random visual tokens are dropped", low=1)
    queries: Literal["text", "all"] = param(
        "text", "whose attention counts: text behind the picture (paper), all (code)"
    )
    contrast_with: Literal["stream", "head"] = param(
        "stream",
        "paper: what is subtracted, a second stream's scores or the output head's on the last token's embedding",
    )
    seed: int = param(0, "of the random choice", low=0)
    dola: bool = param(True, "release: subtract the embedding's log-probabilities and cut the implausible")

    def __post_init__(self) -> None:
        check_parameters(self)

    def stations(self) -> tuple[str, ...]:
        head, stream = ("hidden", "logits"), ("cut", "second")
        own = head if self.mode == "release" else ("attention", "cache", *(head if self._by_head else stream))
        return tuple(station for station in super().stations() if station in own)

    @property
    def _by_head(self) -> bool:
        return self.contrast_with == "head"

    def idle(self) -> bool:
        if self.mode == "release":
            return self.alpha == 0 and not self.dola
        contrasts = self.beta > 0 or (self._by_head and self.alpha > 0)
        return self.mask_rate == 1 and self.penalty == 0 and not contrasts

    def conflicts(self, other: System) -> str | None:
        if "second" in other.stations() and "second" in self.stations() and type(other) is not type(self):
            return "both read a second prompt, and vasparse thins every second prompt"
        return super().conflicts(other)

    def prepare(self, shape: Shape) -> None:
        if "second" in self.stations() and self.sparse_layer >= shape.layers:
            raise ParameterError(
                f"vasparse: sparse_layer={self.sparse_layer} is out of range: choose one of 1..{shape.layers - 1}"
            )

    # -- the first stream: what text looks at stays in the cache, and sinks on text weaken -----------------------------

    def attention(self, site: Site) -> Edit | Probe | None:
        if site.second or not site.whole.has_image:
            return None
        if not site.prefill:
            bias = site.state.get((site.layer, "bias"))
            return None if bias is None or self.penalty == 0 else Edit(bias=bias[:, None, None])
        start = max(site.tokens.first_after - site.start, 0) if self.queries == "text" else 0
        if start >= site.queries:
            return None
        role = site.tokens.role
        asking = (
            role[:, site.start + start :] == int(Role.AFTER) if self.queries == "text" else role[:, site.start :] != 0
        )
        total = role.new_zeros(role.shape, dtype=torch.float32)

        def see(weights: Tensor, first: int) -> None:  # (B, H, R, K)
            rows = asking[:, first - start : first - start + weights.shape[2], None]
            seen = (weights.mean(1) * rows).sum(1)  # (B, K)
            total.add_(F.pad(seen, (total.shape[1] - seen.shape[1], 0)))

        site.state[site.layer, "received"] = (total, asking.sum(1, keepdim=True).clamp(min=1))
        return Probe(see, start=start)

    def cache(self, site: Site, cache: Any) -> None:
        """Once the prompt is read: decide, layer by layer."""
        if site.second or not site.prefill or not site.tokens.has_image:
            return
        for layer in range(site.layers):
            found = site.state.pop((layer, "received"), None)
            if found is None:
                continue
            tokens, received = site.cuts.tokens(layer), found[0] / found[1]
            text = tokens.where(Role.START, Role.BEFORE, Role.AFTER) & tokens.visual.any(1, keepdim=True)
            site.state[layer, "bias"] = sink_bias(received, text, self.penalty)
            if self.mask_rate < 1:
                ranked = score(received, 0.0)  # beside a prior of 1 fp32 would round small r^2 to ties
                stay = best(ranked, budget(tokens.visual, self.mask_rate), valid=tokens.visual)
                site.cuts.evict(layer, stay | ~tokens.visual)
                _count(site, stay, tokens.visual)

    # -- the second stream: the same prompt with a random part of the picture -------------------------------------------

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any] | None:
        if not prompt.tokens.has_image or (self.alpha == 0 and self.beta == 0):
            return None
        site.state["seeing"] = prompt.tokens.visual.any(1, keepdim=True)  # (B, 1)
        return prompt.ask(prompt.note.questions)

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        if not site.second or site.layer != self.sparse_layer or self.mask_rate == 1:
            return None
        visual = site.tokens.visual[:, site.start :]
        drawn = torch.rand(visual.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(hidden.device)
        place = (visual.int().cumsum(1) - 1).clamp(min=0)  # the k-th visual token of any row has the k-th draw
        return Keep(best(drawn[place], budget(visual, self.mask_rate), valid=visual) | ~visual, "keep")

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        new = weigh(logits, second, first_weight=1 + self.alpha, second_weight=-self.alpha, beta=self.beta)
        return torch.where(site.state["seeing"], new, logits)

    # -- with the head, in the paper's way or as released ---------------------------------------------------------------

    def hidden(self, site: Site, hidden: Tensor) -> None:
        """Keep the embedding of the last token read."""
        if site.layer == 0 and not site.stream:
            rows = torch.arange(len(hidden), device=hidden.device)
            site.state["embedding"] = hidden[rows, last_real(site.tokens) - site.start if site.prefill else -1]

    def logits(self, site: Site, logits: Tensor) -> Tensor | None:
        if self.mode == "paper" and self.alpha == 0 == self.beta:
            return None
        embedded = site.head(site.state["embedding"]).float()
        if self.mode == "paper":
            weights = {"first_weight": 1 + self.alpha, "second_weight": -self.alpha}
            new = weigh(logits.float(), embedded, **weights, beta=self.beta)
        else:
            new = released(logits.float(), embedded, alpha=self.alpha, beta=self.beta, dola=self.dola)
        return torch.where(site.tokens.visual.any(1)[:, None], new.to(logits.dtype), logits)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        kept, seen = (float(sum(x)) for x in zip(*tally.get("kept", [(0, 0)]), strict=True))
        return {"mean_share_kept": kept / seen if seen else None}


def _count(site: Site, stay: Tensor, visual: Tensor) -> None:
    site.tally.setdefault("kept", []).append((stay.sum(), visual.sum()))

"""Flowformer: Linearizing Transformers with Conservation Flows (Flow-Attention).

ICML 2022, arXiv 2202.06258. Official code: thuml/Flowformer (MIT).

Queries are sinks and keys sources of a flow network with capacities Q K^T. Fixing what comes in makes sources compete,
fixing what goes out gates the sinks; both are vectors of length N, so nothing is quadratic. Q = sigmoid(q), K = sigmoid(k):

    i_l  = 1 / ((Q_l + e) (sum_s K_s + e) + x)         o_s  = 1 / ((K_s + e) (sum_l Q_l + e) + x)           flows
    i'_l = (Q_l + e) (sum_s K_s o_s + e) + x           o'_s = (K_s + e) (sum_l Q_l i_l + e) + x             conserved
    a_l  = sigmoid(i'_l L / S)                         c_s  = S softmax_s(clamp(o'_s, -clamp, clamp))
    out_l = a_l i_l Q_l (sum_s K_s^T c_s v_s)          (D x M) first                   q (B, L, H, D), k, v (B, S, H, D)

Causal: every sum over tokens becomes a running sum up to t, with n_t = t + 1 tokens seen:

    i_t = n_t / ((Q_t + e) (cum K + e)_t)              i'_t = (Q_t + e) (cum(K o) + e)_t / n_t,  o, o' likewise
    a_t = sigmoid(i'_t)                                c_t  = n_t exp(clamp o'_t) / cum(exp(clamp o'))_t
    out_t = a_t (i_t / n_t) Q_t cum(K^T c v)_t         a source competes only with those before it

e = 1e-6 everywhere; x = 1e-6 in the vision file only, 0 elsewhere; clamp 1 (vision, core), 10 (RL), 5 (language), none
(time series). There is no positional term and no mask. Differences from the official code: the causal sum is taken in
chunks (N D M / chunk numbers instead of N D M); sums are in fp32 under autocast.

Cost: O(N D^2) per head. The effective weights a_l i_l (Q_l K_s) c_s are non-negative and do not sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import InputError
from sightline.mix.parts.base import Cost, Mixer, check_grid, flat_index, split_heads

EPS = 1e-6
CHUNK = 64  # tokens per chunk of the causal form


def flow_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, clamp: float | None = 1.0, extra: float = 0.0
) -> Tensor:
    """Flow-attention in linear time.

    Args:
        q: (B, L, H, D). k: (B, S, H, D). v: (B, S, H, M).
        causal: token t sees tokens <= t (needs L = S). clamp: bound of the conserved outgoing flow; None: no bound.
        extra: added to every flow (1e-6 in the vision code, 0 elsewhere).

    Returns:
        (B, L, H, M), of v's dtype.
    """
    qf, kf, gate, compete = _flows(q, k, causal, clamp, extra)
    values = v.to(kf.dtype) * compete[..., None]
    if causal:
        out = _causal_product(qf, kf, values)
    else:
        out = torch.einsum("blhd,bhdm->blhm", qf, torch.einsum("bshd,bshm->bhdm", kf, values))
    return (out * gate[..., None]).to(v.dtype)


def naive_flow_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, clamp: float | None = 1.0, extra: float = 0.0
) -> Tensor:
    """`flow_attention` from its whole matrix of weights (B, H, L, S)."""
    return torch.einsum("bhls,bshm->blhm", flow_weights(q, k, causal=causal, clamp=clamp, extra=extra).to(v.dtype), v)


def flow_weights(
    q: Tensor, k: Tensor, *, causal: bool = False, clamp: float | None = 1.0, extra: float = 0.0, row: int | None = None
) -> Tensor:
    """The effective weights (B, H, L, S), fp32 at least; with `row` of that query alone, (B, H, 1, S)."""
    qf, kf, gate, compete = _flows(q, k, causal, clamp, extra)
    start, stop = (0, q.shape[1]) if row is None else (row, row + 1)
    weights = torch.einsum("blhd,bshd->bhls", qf[:, start:stop] * gate[:, start:stop, :, None], kf * compete[..., None])
    if causal:
        at = torch.arange(k.shape[1], device=q.device)
        weights = weights.masked_fill(at > at[start:stop, None], 0.0)
    return weights


def _flows(q: Tensor, k: Tensor, causal: bool, clamp: float | None, extra: float):
    """Q i (B, L, H, D), K (B, S, H, D), gate (B, L, H), competition (B, S, H): everything but the values."""
    if causal and q.shape[1] != k.shape[1]:
        raise InputError(f"causal flow-attention needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}")
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide).sigmoid(), k.to(wide).sigmoid()
    total = (lambda t: t.cumsum(1)) if causal else (lambda t: t.sum(1, keepdim=True))
    seen = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=wide)[:, None] if causal else 1.0  # (L, 1)

    def flow(x: Tensor, other: Tensor) -> Tensor:
        return ((x + EPS) * (total(other) + EPS)).sum(-1) + extra  # (B, N, H)

    incoming, outgoing = seen / flow(q, k), seen / flow(k, q)
    sink = flow(q, k * outgoing[..., None]) / seen
    source = flow(k, q * incoming[..., None]) / seen
    source = source if clamp is None else source.clamp(-clamp, clamp)
    if causal:
        competition = seen * (source - source.logcumsumexp(1)).exp()
        return q * (incoming / seen)[..., None], k, sink.sigmoid(), competition
    gate = (sink * (q.shape[1] / k.shape[1])).sigmoid()
    return q * incoming[..., None], k, gate, k.shape[1] * source.softmax(1)


def _causal_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_{s <= t} (q_t k_s) v_s: chunks of tokens, a running D x M state before each."""
    n = q.shape[1]
    size = min(CHUNK, n)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -n % size)).unflatten(1, (-1, size)) for x in (q, k, v))
    state = torch.einsum("bcshd,bcshm->bchdm", k, v).cumsum(1)
    before = F.pad(state[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))  # of the chunks before
    inside = torch.einsum("bcthd,bcshd->bchts", q, k).tril()
    out = torch.einsum("bcthd,bchdm->bcthm", q, before) + torch.einsum("bchts,bcshm->bcthm", inside, v)
    return out.flatten(1, 2)[:, :n]


@system(
    "flowformer",
    kind="mix",
    paper=Paper(
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        authors="Wu, Haixu and Wu, Jialong and Xu, Jiehui and Wang, Jianmin and Long, Mingsheng",
        venue="ICML",
        year=2022,
        arxiv="2202.06258",
        code="thuml/Flowformer",
        licence="MIT",
    ),
    summary="linear attention as a flow network: sources compete, sinks are gated",
    needs=(),
    published=(("ImageNet-1K top-1 (paper)", "80.6"), ("WikiText-103 perplexity (paper)", "30.8")),
)
@dataclass(eq=False, repr=False)
class Flow(Mixer):
    """Flow-attention over all tokens of a grid, as the vision model has it; causal runs in row-major order."""

    causal: bool = param(False, "token t sees tokens <= t of the flattened grid")
    clamp: float | None = param(1.0, "bound of the conserved outgoing flow; none: no bound", low=0)
    extra: float = param(1e-6, "added to every flow; 0 outside the vision code", low=0)

    def build(self) -> None:
        self.qkv = nn.Linear(self.dim, 3 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = check_grid(self, x)
        q, k, v = (t.flatten(1, -3) for t in split_heads(self.qkv(x), 3, self.heads))
        out = flow_attention(q, k, v, causal=self.causal, clamp=self.clamp, extra=self._extra)
        return self.proj(out.flatten(-2).unflatten(1, grid))

    @property
    def _extra(self) -> float:
        return 0.0 if self.causal else self.extra  # the vision code has no causal form

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The effective weights of one query, (B, H, *grid): non-negative, not of sum 1."""
        grid = check_grid(self, x)
        at = flat_index(index, grid)
        q, k, _ = (t.flatten(1, -3) for t in split_heads(self.qkv(x), 3, self.heads))
        weights = flow_weights(q, k, causal=self.causal, clamp=self.clamp, extra=self._extra, row=at)
        return weights.squeeze(2).unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n = prod(grid)
        inside = 2 * n * min(CHUNK, n) * self.dim * 2 if self.causal else 0
        states = -(-n // CHUNK) if self.causal else 1
        return self.priced(
            grid, mixing=4 * n * self.dim * self.head_dim + inside, held=states * self.dim * self.head_dim
        )


class FlowProjections(nn.Module):
    """The core module of the official code: own projections, widths and cross-attention for (B, N, C) sequences."""

    def __init__(
        self, d_input: int, d_model: int, d_output: int, heads: int, *, causal: bool = False, dropout: float = 0.05
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query_projection, self.key_projection, self.value_projection = (
            nn.Linear(d_input, d_model) for _ in range(3)
        )
        self.out_projection = nn.Linear(d_model, d_output)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, d_input), context (B, S, d_input) or None for x itself -> (B, L, d_output)."""
        context = x if context is None else context
        inputs = ((self.query_projection, x), (self.key_projection, context), (self.value_projection, context))
        q, k, v = (layer(t).unflatten(-1, (self.heads, -1)) for layer, t in inputs)
        out = flow_attention(q, k, v, causal=self.causal)
        return self.dropout(self.out_projection(out.flatten(-2)))

"""Efficient Content-Based Sparse Attention with Routing Transformers.

TACL 2021, arXiv 2003.05997. Official code: google-research (Apache-2.0, TensorFlow 1); this follows the PyTorch
re-implementation lucidrains/routing-transformer (MIT), whose numbers can be checked.

Each head keeps k centroids mu; every centroid takes the w queries and the w keys most like it, which attend to each other.

    x^      = x / |x|                                     routing only             q, k, v (B, N, H, D), mu (H, k, D)
    I_c     = top-w over tokens of x^ mu_c                for q and for k apart; the same set when shared
    out_t   = sum_{c: t in I_c} attention in c / (count_t + 1e-5)                  0 for a token in no cluster
    loss    = beta mean |x^ - mu_nearest|^2
    mu     <- lambda mu + (1 - lambda) normalised mean of the tokens nearest to mu  (an empty cluster keeps mu)

Logits are D^-0.5 q k^T. Causal: by position inside the cluster, and m >= 1 learned memory keys per (head, cluster) keep rows from
being empty; shared q = k: k is normalised and a token's own key gets the logit -5e4. Membership looks at the whole sequence: in
training later tokens decide who is in a cluster, an inherent leak of the method. Differences: the official code uses LayerNorm
instead of L2, ranks instead of positions, and 1e-2 in the count; the re-implementation updates mu in a backward hook, here
`forward` in training mode does; its k-means at the start adds up tokens of any length, ours has units; ties go to the lower
position. Local heads are left to the model (FNA with a causal axis).

Cost: 2 N k C + 4 k w^2 C operations, O(N^1.5 C) with k = sqrt(N) and w = N / k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.mix.parts.base import Cost, Mixer, check_grid, flat_index, split_heads

OWN = -5e4  # logit of a token's own key when queries and keys are shared
EPS = 1e-5


def members(x: Tensor, means: Tensor, window: int) -> Tensor:
    """The `window` tokens of x (B, N, H, D) most like each centroid (H, k, D): positions (B, H, k, w)."""
    like = torch.einsum("bnhd,hcd->bhcn", F.normalize(x.detach(), dim=-1), means.to(x.dtype))
    return like.sort(dim=-1, descending=True, stable=True).indices[..., : min(window, x.shape[1])]


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    causal: bool = False,
    shared: bool = False,
    memory: tuple[Tensor, Tensor] | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention inside clusters.

    Args:
        q, k, v: (B, N, H, D). q_index, k_index: (B, H, c, w) positions of each cluster's members.
        shared: q and k are one; own keys are a last resort. memory: keys and values (H, c, m, D) that every query sees.
        key_mask: (B, N) bool, False for padding.

    Returns:
        (B, N, H, D).
    """
    queries, keys, values = _take(q, q_index), _take(k, k_index), _take(v, k_index)  # (B, H, c, w, D)
    seen = torch.ones_like(q_index[..., None] == k_index[..., None, :])
    if causal:
        seen = q_index[..., None] >= k_index[..., None, :]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None].expand(*k_index.shape[:3], -1).gather(3, k_index)[..., None, :]
    scores = queries @ keys.mT * q.shape[-1] ** -0.5
    if shared:
        scores = scores.masked_fill(q_index[..., None] == k_index[..., None, :], OWN)
    if memory is not None:
        mem_k, mem_v = (m.to(q.dtype).expand(q.shape[0], *m.shape) for m in memory)
        scores = torch.cat([queries @ mem_k.mT * q.shape[-1] ** -0.5, scores], -1)
        values = torch.cat([mem_v, values], -2)
        seen = F.pad(seen, (mem_k.shape[-2], 0), value=True)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen  # no key: zeros
    return _mean_back(weights.to(v.dtype) @ values, q_index, q.shape[1])


def naive_clustered_attention(q, k, v, q_index, k_index, *, causal=False, shared=False, memory=None) -> Tensor:
    """`clustered_attention` query by query, from its definition."""
    batch, tokens, heads, dim = q.shape
    out = torch.zeros_like(v)
    for b, t, h in ((b, t, h) for b in range(batch) for t in range(tokens) for h in range(heads)):
        found = [c for c in range(q_index.shape[2]) if (q_index[b, h, c] == t).any()]
        total = torch.zeros_like(v[b, t, h])
        for c in found:
            places = [j for j in k_index[b, h, c].tolist() if not causal or j <= t]
            keys, values = k[b, places, h], v[b, places, h]
            scores = keys @ q[b, t, h] * dim**-0.5
            scores = torch.where(torch.tensor(places) == t, OWN, scores) if shared else scores
            if memory is not None:
                scores = torch.cat([memory[0][h, c] @ q[b, t, h] * dim**-0.5, scores])
                values = torch.cat([memory[1][h, c], values])
            total = total + scores.float().softmax(-1).to(v.dtype) @ values
        out[b, t, h] = total / (len(found) + EPS)
    return out


def commitment(x: Tensor, means: Tensor) -> Tensor:
    """mean |x^ - mu_nearest|^2 per number, of x (B, N, H, D); no gradient to the centroids."""
    unit = F.normalize(x, dim=-1)
    return F.mse_loss(unit, _nearest(unit, means)[0])


def new_means(x: Tensor, means: Tensor) -> Tensor:
    """One step of spherical k-means on x (B, N, H, D): (H, k, D), normalised; an empty cluster keeps its centroid."""
    unit = F.normalize(x.detach(), dim=-1)
    _, near = _nearest(unit, means)
    hot = F.one_hot(near, means.shape[1]).to(unit.dtype)  # (B, N, H, k)
    total = F.normalize(torch.einsum("bnhc,bnhd->hcd", hot, unit), dim=-1)
    return torch.where(hot.sum((0, 1))[..., None] > 0, total, means.to(unit.dtype))


def k_means(x: Tensor, clusters: int, generator: torch.Generator | None = None, steps: int = 10) -> Tensor:
    """Centroids (H, k, D) after `steps` steps on x (B, N, H, D), from tokens that `generator` draws, different ones if it can."""
    unit = F.normalize(x.detach(), dim=-1)
    flat = unit.flatten(0, 1)
    drawn = torch.randperm(len(flat), generator=generator)[:clusters]
    if len(flat) < clusters:
        drawn = torch.randint(len(flat), (clusters,), generator=generator)
    means = flat[drawn.to(flat.device)].transpose(0, 1)
    for _ in range(steps):
        means = new_means(unit, means)
    return means


def _nearest(unit: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each token (B, N, H, D) and its number (B, N, H)."""
    means = means.detach().to(unit.dtype)
    near = torch.einsum("bnhd,hcd->bnhc", unit.detach(), means).argmax(-1)
    return means[torch.arange(means.shape[0], device=unit.device), near], near


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, H, c, w) of x (B, N, H, D) -> (B, H, c, w, D)."""
    rows = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.transpose(1, 2).gather(2, rows).unflatten(2, index.shape[2:])


def _mean_back(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Mean over the clusters of each token: (B, H, c, w, D) -> (B, N, H, D)."""
    flat = index.flatten(2)
    total = y.new_zeros(*flat.shape[:2], tokens, y.shape[-1])
    total = total.scatter_add(2, flat[..., None].expand(-1, -1, -1, y.shape[-1]), y.flatten(2, 3))
    count = y.new_zeros(*flat.shape[:2], tokens).scatter_add(2, flat, torch.ones_like(flat, dtype=y.dtype))
    return (total / (count[..., None] + EPS)).transpose(1, 2)


@system(
    "routing-transformer",
    kind="mix",
    paper=Paper(
        title="Efficient Content-Based Sparse Attention with Routing Transformers",
        authors="Roy, Aurko and Saffar, Mohammad and Vaswani, Ashish and Grangier, David",
        venue="TACL",
        year=2021,
        arxiv="2003.05997",
        code="google-research/google-research",
        licence="Apache-2.0",
    ),
    summary="attention inside clusters of similar queries and keys, found by online k-means",
    needs=(),
    published=(("Wikitext-103 perplexity (paper)", "15.8"),),
)
@dataclass(eq=False, repr=False)
class Routing(Mixer):
    """Cluster attention of any grid, flattened in row-major order."""

    clusters: int = param(4, "centroids k per head, about sqrt(N)", low=1)
    window: int | None = param(None, "members w of a cluster; none: N / k", low=1)
    causal: bool = param(False, "a token sees earlier tokens of its clusters")
    shared: bool = param(False, "one projection for queries and keys")
    memories: int = param(0, "learned memory keys per cluster (at least 1 when causal and not shared)", low=0)
    decay: float = param(0.999, "of the centroids", low=0, high=1)
    qkv_bias: bool = param(False, "bias of the projection")

    def build(self) -> None:
        self.qkv = nn.Linear(self.dim, (2 if self.shared else 3) * self.dim, bias=self.qkv_bias)
        self.proj = nn.Linear(self.dim, self.dim)
        slots = max(self.memories, 1 if self.causal and not self.shared else 0)
        shape = (self.heads, self.clusters, slots, self.head_dim)
        self.mem_key, self.mem_value = (nn.Parameter(torch.randn(shape)) if slots else None for _ in range(2))
        self.register_buffer("means", F.normalize(torch.randn(self.heads, self.clusters, self.head_dim), dim=-1))

    def forward(self, x: Tensor, *, with_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, *grid, C) -> same; `with_loss`: and the commitment loss (times beta = 1e-4 as published)."""
        grid = check_grid(self, x)
        q, k, v = self._project(x)
        routed = q if self.shared else torch.cat([q, k], 1)
        index = [members(t, self.means, self._window(q.shape[1])) for t in (q, k)]
        memory = None if self.mem_key is None else (self.mem_key, self.mem_value)
        options = {"causal": self.causal, "shared": self.shared, "memory": memory}
        out = clustered_attention(q, k, v, *index, **options)
        loss = 1e-4 * commitment(routed, self.means) if with_loss else None
        if self.training:
            self.means.lerp_(new_means(routed, self.means).to(self.means.dtype), 1 - self.decay)
        out = self.proj(out.flatten(-2)).unflatten(1, grid)
        return (out, loss) if with_loss else out

    @torch.no_grad()
    def start(self, x: Tensor, generator: torch.Generator | None = None, steps: int = 10) -> None:
        """Set the centroids by k-means on an input (B, *grid, C), from tokens that `generator` draws."""
        q, k, _ = self._project(x)
        self.means.copy_(k_means(q if self.shared else torch.cat([q, k], 1), self.clusters, generator, steps))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = split_heads(self.qkv(x.flatten(1, -2)), 2 if self.shared else 3, self.heads)
        return (parts[0], F.normalize(parts[0], dim=-1), parts[1]) if self.shared else parts

    def _window(self, tokens: int) -> int:
        return min(tokens, self.window or ceil(tokens / self.clusters))

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The effective row of one query (B, H, *grid); below 1 in sum by what memory keys get, 0 in no cluster."""
        grid = check_grid(self, x)
        at = flat_index(index, grid)
        q, k, _ = self._project(x)
        marks = torch.eye(prod(grid), dtype=q.dtype, device=x.device)[None, :, None].expand(len(x), -1, self.heads, -1)
        found = [members(t, self.means, self._window(q.shape[1])) for t in (q, k)]
        none = None if self.mem_key is None else self.mem_key.new_zeros(*self.mem_key.shape[:-1], prod(grid))
        memory = None if none is None else (self.mem_key, none)
        out = clustered_attention(q, k, marks, *found, causal=self.causal, shared=self.shared, memory=memory)
        return out[:, at].unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n = prod(grid)
        w = self._window(n)
        mixing = 2 * n * self.clusters * self.dim * (1 if self.shared else 2) + 4 * self.clusters * w * w * self.dim
        held = self.clusters * w * (3 * self.dim + self.heads * w)
        projections = (6 if self.shared else 8) * n * self.dim**2
        return self.priced(grid, mixing=mixing, held=held, projections=projections)

"""The attention of TransNeXt, which MoH-ViT takes as host: cosine similarity, near tokens and the pooled map in one softmax.

    q^   = (normalise(q) + e) softplus(t) log(number of keys)                  e, t learned, per head
    near = q^ normalise(k)[3x3 window] + r                                     r (H, 9); no attention beyond the border
    far  = q^ normalise(k_pool) + MLP(log of relative place)                   pool: GELU(1x1 conv), average over cells, LN
    A    = softmax([near | far]);   out = (A_near + normalise(q) T + b) v[window] + A_far v_pool      T, b learned

Heads are then weighted by `gates` (B, N, H), and projected. `Cosine` is the form without a window: all tokens are keys.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, log

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from sightline.mix.parts.base import split_heads
from sightline.mix.parts.groups import sdpa
from sightline.mix.parts.local import convolved

WINDOW = 3


@lru_cache(maxsize=64)
def relative_places(queries: tuple[int, int], keys: tuple[int, int], learned: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Different relative places (T, 2) of pooled keys from queries, in units of a `learned` map, and which one (N M)."""
    tables, places = [], []
    for q, k, side in zip(queries, keys, learned, strict=True):
        at = torch.arange(q, dtype=torch.float32, device="cpu")
        centres = F.adaptive_avg_pool1d(at[None], k)[0]
        steps = (at[:, None] - centres) * (8 / max(side - 1, 1))
        table, place = steps.unique(return_inverse=True)
        tables.append(table.sign() * (table.abs() + 1).log2() / 3)
        places.append(place)
    rows, columns = places
    index = rows[:, None, :, None] * len(tables[1]) + columns[None, :, None, :]  # (qh, qw, kh, kw)
    return torch.cartesian_prod(*tables), index.flatten()


@lru_cache(maxsize=16)
def _window(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which of the 9 places of each token's window are on the map (N, 9), and their number (N, 1)."""
    inside = F.unfold(torch.ones(1, 1, *grid, device="cpu"), WINDOW, padding=WINDOW // 2)[0].T > 0
    return inside, inside.sum(-1, keepdim=True)


class Cosine(nn.Module):
    """All tokens on all tokens; the parent of `Foveal`."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side  # side: of the map that the relative places were learned on
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), log(exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(heads, 1, dim // heads), std=0.02))
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, heads)
        self.proj = nn.Linear(dim, dim)
        self.project(dim)

    def project(self, dim: int) -> None:
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (B, H, W, C), gates (B, N, heads) -> (B, H, W, C)."""
        out = self.mix(x) * gates.to(x.dtype).transpose(1, 2)[..., None]
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))

    def mix(self, x: Tensor) -> Tensor:
        """Outputs of all heads, (B, heads, N, D)."""
        grid = tuple(x.shape[1:3])
        q, k, v = (t.transpose(1, 2) for t in split_heads(self.qkv(x.flatten(1, 2)), 3, self.heads))
        query = self.queries(F.normalize(q, dim=-1), log(grid[0] * grid[1]))
        return sdpa(query, F.normalize(k, dim=-1), v, 1.0, self.bias(grid, grid, x)[None])

    def queries(self, q: Tensor, length: Tensor | float) -> Tensor:
        """Normalised queries (B, heads, N, D) with the learned part and the scales; length: log of the number of keys."""
        return ((q + self.query_embedding) * F.softplus(self.temperature) * length).to(q.dtype)

    def bias(self, queries: tuple[int, int], keys: tuple[int, int], x: Tensor) -> Tensor:
        """(heads, N, M) of the relative places."""
        places, index = relative_places(queries, keys, (self.side, self.side))
        table = self.cpb_fc2(F.relu(self.cpb_fc1(places.to(x.device, x.dtype)))).T  # (heads, T)
        return table[:, index.to(x.device)].unflatten(1, (queries[0] * queries[1], -1))


class Foveal(Cosine):
    """Near tokens and the map pooled by `reduction`."""

    def __init__(self, dim: int, heads: int, side: int, reduction: int) -> None:
        self.reduction = reduction
        super().__init__(dim, heads, side)
        near, depth = WINDOW**2, dim // heads
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(heads, near), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(heads, depth, near), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, near))

    def project(self, dim: int) -> None:
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def mix(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:3])
        cells = tuple(max(1, side // self.reduction) for side in grid)
        inside, count = (t.to(x.device) for t in _window(grid))
        q = F.normalize(self._heads(self.q(x)), dim=-1)  # (B, heads, N, D)
        query = self.queries(q, (count + cells[0] * cells[1]).log())
        k, v = (_unfolded(t, self.heads) for t in self._keys(x))  # (B, heads, D, 9, N)
        near = torch.einsum("bhnd,bhdkn->bhnk", query, k) + self.relative_pos_bias_local[:, None]
        pooled = F.adaptive_avg_pool2d(F.gelu(convolved(self.sr, x)).movedim(-1, 1), cells).movedim(1, -1)
        k_pool, v_pool = (self._heads(t) for t in self._keys(self.norm(pooled)))
        far = query @ k_pool.mT + self.bias(grid, cells, x)
        weights = torch.cat([near.masked_fill(~inside, -torch.inf), far], -1).softmax(-1)
        near, far = weights.split([WINDOW**2, far.shape[-1]], -1)
        near = near + q @ self.learnable_tokens + self.learnable_bias
        return torch.einsum("bhnk,bhdkn->bhnd", near, v) + far @ v_pool

    def _heads(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, heads, N, D)."""
        return x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and values (B, h, w, C)."""
        k, v = self.kv(x).chunk(2, -1)
        return F.normalize(k.unflatten(-1, (self.heads, -1)), dim=-1).flatten(-2), v


def _unfolded(x: Tensor, heads: int) -> Tensor:
    """(B, h, w, C) -> (B, heads, D, 9, N): the window of every token, zeros beyond the border."""
    windows = F.unfold(x.movedim(-1, 1), WINDOW, padding=WINDOW // 2)  # (B, C 9, N)
    return windows.unflatten(1, (heads, -1, WINDOW**2))

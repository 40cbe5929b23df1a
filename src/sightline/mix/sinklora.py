"""SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context LLMs (shifted sparse attention with sinks, H2O).

arXiv 2406.05678 (2024). Official code: Dexter-GT-86/SinkLoRA (Apache-2.0), which holds neither SF-Attn nor H2O: its attention
is LongLoRA's S2-Attn. That base is checked; SF-Attn follows the abstract, H2O its own paper (arXiv 2306.14048).

S2-Attn: N tokens in groups of G = N / 4; the second half of the heads has its groups moved by G / 2.

    allowed_h(i, j) = j <= i  and  (group_h(i) = group_h(j)  or  j < sinks)
    group_h(i)      = i div G                          first half of the heads, and the last restore H/2 of the others
                    = (i + G/2) div G                  shifted heads

`sinks` first tokens are seen by all later ones. `restore` returns a share of the shifted heads (or with `restore_by="groups"`
of the last groups of each shifted head) to the plain groups: 0 is S2-Attn, 1 plain blocks; the paper's share is not published.
`wrap=True` is the official code: the last half group and the first one form a group in rolled order, so the first tokens see the
last ones, a leak of the future; the default splits that group. An odd G is refused: there the code rolls back by one too few.
In use the model trains with this attention and answers with full attention.

H2O at decoding: s_j = sum over queries of the probability of key j, per key head; the last `recent` keys stay, and of the others the
`heavy` of largest s (ties: the earlier key).

Cost: 4 N G C operations (dense 4 N^2 C) and the sinks; N (G + sinks) memory in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import InputError, ParameterError
from sightline.mix.parts.base import Cost, Mixer, check_division, check_grid, dense_weights, flat_index
from sightline.mix.parts.groups import Axis, grouped_attention


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int,
    *,
    sinks: int = 0,
    restore: float = 0.0,
    restore_by: str = "heads",
    wrap: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Causal attention in groups that half of the heads have moved by half a group.

    Args:
        q: (B, N, H, D). k, v: (B, N, Hkv, D). group: tokens G per group, even; need not divide N unless `wrap`.
        sinks: first tokens that everybody after them sees. restore, restore_by: see the module's head.
        wrap: the official code's circular groups (no sinks).

    Returns:
        (B, N, H, D).
    """
    tokens, heads = q.shape[1:3]
    _check(tokens, group, sinks, wrap)
    k, v = (x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for first, stop, starts, roll in _kinds(tokens, heads, group, restore, restore_by, wrap):
        if first == stop:
            continue
        axis = _segments(starts, tokens, group, sinks, q.device)
        part = [x[:, :, first:stop].roll(-roll, 1) for x in (q, k, v)]
        outs.append(grouped_attention(*part, [axis], scale)[0].roll(roll, 1))
    return torch.cat(outs, 2)


def naive_shifted_attention(q, k, v, group, *, scale: float | None = None, **options) -> Tensor:
    """`shifted_attention` under a whole mask."""
    heads = q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = shifted_mask(q.shape[1], heads, group, **options)
    return torch.einsum("bhnm,bmhd->bnhd", dense_weights(q, k, scale, mask).to(v.dtype), v)


def shifted_mask(
    tokens: int,
    heads: int,
    group: int,
    *,
    sinks: int = 0,
    restore: float = 0.0,
    restore_by: str = "heads",
    wrap: bool = False,
) -> Tensor:
    """(H, N, N) bool: what each query of each head sees."""
    _check(tokens, group, sinks, wrap)
    at = torch.arange(tokens)
    masks = []
    for first, stop, starts, roll in _kinds(tokens, heads, group, restore, restore_by, wrap):
        order = (at - roll) % tokens  # place after rolling
        own = torch.bucketize(order, torch.tensor(starts), right=True)
        seen = (own[:, None] == own) | (at < sinks)
        masks += [seen & (order[:, None] >= order)] * (stop - first)
    return torch.stack(masks)


def group_size(tokens: int, ratio: float) -> int:
    """Tokens per group: the ratio of all, rounded up to an even number."""
    size = int(tokens * ratio)
    return max(2, size + size % 2)


def _check(tokens: int, group: int, sinks: int, wrap: bool) -> None:
    if group < 2 or group % 2 or sinks < 0:
        raise ParameterError(f"group={group} must be even and at least 2, sinks={sinks} at least 0")
    if wrap and (sinks or tokens % group):
        raise ParameterError(f"wrap=True needs sinks=0 and group={group} dividing {tokens} tokens")


def _kinds(tokens: int, heads: int, group: int, restore: float, by: str, wrap: bool):
    """(first head, last head + 1, starts of its groups, roll) of each kind of heads."""
    plain = list(range(0, tokens, group))
    shifted = sorted({0, *range(group // 2, tokens, group)})
    half = heads // 2
    last = heads - int(restore * (heads - half)) if by == "heads" else heads
    roll = group // 2 if wrap else 0
    if by == "groups" and restore > 0:
        cut = max(0, len(plain) - int(restore * len(plain))) * group
        shifted, roll = sorted({*(s for s in shifted if s < cut), *(s for s in plain if s >= cut)}), 0
    return (0, half, plain, 0), (half, last, plain if roll else shifted, roll), (last, heads, plain, 0)


def _segments(starts: list[int], tokens: int, group: int, sinks: int, device: torch.device) -> Axis:
    """Causal groups that begin at `starts`, with the sinks of other groups in front of each group's keys."""
    start = torch.tensor(starts, device=device)[:, None]
    end = torch.tensor([*starts[1:], tokens], device=device)[:, None]
    place = start + torch.arange(group, device=device)  # (G, S)
    queries = torch.minimum(place, end - 1)
    seen = (place < end)[:, None] & (place[:, None] <= queries[..., None])  # (G, S, S)
    count = min(sinks, tokens)
    sink = torch.arange(count, device=device)
    before = (sink < start)[:, None].expand(-1, group, -1)  # sinks of earlier groups; a group's own are among its keys
    keys = torch.cat([sink.expand(len(starts), -1), queries], 1)
    at = torch.arange(tokens, device=device)
    own = torch.bucketize(at, start[:, 0], right=True) - 1
    return Axis(queries, keys, torch.cat([before, seen], 2), own * group + at - start[own, 0])


def attention_mass(q: Tensor, k: Tensor, *, chunk: int = 256, scale: float | None = None) -> Tensor:
    """Sum over queries of causal attention on each key, per key head: q (B, Q, H, D), k (B, K, Hkv, D) -> (B, Hkv, K) fp32.

    The queries are the last Q of K positions; rows are made in chunks, never Q x K at once.
    """
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if queries > keys:
        raise InputError(f"{queries} queries cannot be the last of {keys} keys")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    at = torch.arange(keys, device=q.device)
    wide = k.repeat_interleave(groups, 2)
    total = torch.zeros(q.shape[0], q.shape[2], keys, device=q.device)
    for first in range(0, queries, chunk):
        part = q[:, first : first + chunk]
        rows = at[keys - queries + first :][: part.shape[1], None]
        total += dense_weights(part, wide, scale, at <= rows).sum(2)
    return total.unflatten(1, (-1, groups)).sum(2)


def heavy_hitters(scores: Tensor, heavy: int, recent: int) -> Tensor:
    """Which keys to keep: scores (B, Hkv, K) -> positions (B, Hkv, min(K, heavy + recent)), ascending."""
    keys = scores.shape[-1]
    if heavy < 0 or recent < 0 or heavy + recent < 1:
        raise ParameterError(f"heavy={heavy} and recent={recent} must be at least 0, and not both 0")
    at = torch.arange(keys, device=scores.device).expand(scores.shape)
    if keys <= heavy + recent:
        return at
    older = scores[..., : keys - recent].sort(dim=-1, descending=True, stable=True).indices[..., :heavy]
    return torch.cat([older.sort(-1).values, at[..., keys - recent :]], -1)


@system(
    "sinklora",
    kind="mix",
    paper=Paper(
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
        authors="Zhang, Hengyu",
        venue="arXiv",
        year=2024,
        arxiv="2406.05678",
        code="Dexter-GT-86/SinkLoRA",
        licence="Apache-2.0",
    ),
    summary="causal attention in groups, half of the heads shifted, with sink tokens that all see",
    needs=(),
    published=(("share of full attention's perplexity gain (abstract)", "S2-Attn 39 %, SF-Attn 92 %"),),
)
@dataclass(eq=False, repr=False)
class SinkAttention(Mixer):
    """Shifted sparse attention of a sequence (B, N, C); weights are named as Llama's."""

    heads_kv: int | None = param(None, "key and value heads; none: as many as heads", low=1)
    ratio: float = param(0.25, "group size over sequence length (rounded up to an even number)", low=0.0001, high=1)
    sinks: int = param(4, "first tokens that everybody sees", low=0)
    restore: float = param(0.0, "share of the shifted heads or groups returned to plain groups", low=0, high=1)
    restore_by: str = param("heads", "heads or groups")
    wrap: bool = param(False, "circular groups of the official code (leak the future; needs sinks=0)")
    bias: bool = param(False, "bias of the projections")

    def check(self) -> None:
        super().check()
        check_division(self, "heads", self.heads, "heads_kv", self.heads_kv or self.heads)
        if self.restore_by not in ("heads", "groups") or (self.wrap and self.sinks):
            raise ParameterError(
                f"SinkAttention: restore_by={self.restore_by!r} must be heads or groups, and wrap=True needs sinks=0"
            )

    def build(self) -> None:
        kv = (self.heads_kv or self.heads) * self.head_dim
        for name, wide in (("q_proj", self.dim), ("k_proj", kv), ("v_proj", kv), ("o_proj", self.dim)):
            setattr(self, name, nn.Linear(self.dim, wide, bias=self.bias))

    def group(self, tokens: int) -> int:
        """Tokens per group, even."""
        return group_size(tokens, self.ratio)

    def forward(self, x: Tensor) -> Tensor:
        (tokens,) = check_grid(self, x, axes=(1,))
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(shifted_attention(q, k, v, self.group(tokens), **self._options()).flatten(-2))

    def _options(self) -> dict:
        return {n: getattr(self, n) for n in ("sinks", "restore", "restore_by", "wrap")}

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        grid = check_grid(self, x, axes=(1,))
        at = flat_index(index, grid)
        q, k = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj))
        k = k.repeat_interleave(self.heads // k.shape[2], 2)
        mask = shifted_mask(grid[0], self.heads, self.group(grid[0]), **self._options())[:, at : at + 1]
        return dense_weights(q[:, at : at + 1], k, self.head_dim**-0.5, mask.to(x.device)).squeeze(2)

    def cost(self, grid: Sequence[int]) -> Cost:
        n = prod(grid)
        seen = self.group(n) + self.sinks
        return self.priced(grid, mixing=4 * n * seen * self.dim, held=2 * n * self.dim + n * seen)

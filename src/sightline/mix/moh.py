"""MoH: Multi-Head Attention as Mixture-of-Head Attention.

ICML 2025, arXiv 2410.11842. Official code: SkyworkAI/MoH (Apache-2.0).

Each token weights the outputs of the heads: the first S heads are shared, of the others it picks the R best.

    g  = softmax(W_g x)            g~ = R g [top R] / sum of the picked          routed, (B, N, H - S)
    s  = S softmax(W_1 x)          shared, (B, N, S); 1 where S = 1
    a  = 2 softmax(W_0 x)          balance of the two groups, where both exist
    out = proj(concat_h  gate_h head_h),   gates = [a_0 s | a_1 g~]

The gate is of the query token; keys and values of every head stay. R = 0 and S = H: soft weights only. Both 0: plain attention
(the official code has no such case). Balance loss E^2 mean_e(mean_tokens g_e mean_tokens picked_e), E = H - S: R when uniform.
`norm_gates` is the form without training (LLaMA): 0/1 gates by the norm of a head's query. Differences from the official code:
S = 1 with R > 0 works (as its ViT file, not its DiT file, has it); ties go to the lower head; the loss is returned, not kept in
a class; `norm_gates` ranks by the norm itself, which is the same order without a division by a deviation that may be 0.

Cost: attention as usual and N (H + 2) C for the router; heads that nobody picked are still computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import ParameterError
from sightline.mix.parts.base import (
    Cost,
    Mixer,
    check_division,
    check_grid,
    dense_attention,
    dense_weights,
    flat_index,
    split_heads,
)
from sightline.mix.parts.groups import sdpa


def pick(scores: Tensor, count: int) -> Tensor:
    """0/1 of the `count` largest along the last axis; ties: the lower index."""
    index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores).scatter(-1, index, 1.0)


def head_gates(routed: Tensor | None, balance: Tensor | None, shared: Tensor | None, picks: int) -> Tensor:
    """Gates of all heads from the router's logits.

    Args:
        routed: (..., H - S). balance: (..., 2). shared: (..., S). None where there is no such group; with `balance` and no
            `shared` there is one shared head of weight 1. picks: R.

    Returns:
        (..., H), >= 0, fp32 at least: shared heads sum to S (times their balance), R routed heads to R.
    """
    parts = []
    if shared is not None:
        parts.append(_wide(shared).softmax(-1) * shared.shape[-1])
    elif balance is not None:
        parts.append(torch.ones_like(_wide(balance)[..., :1]))
    if routed is not None:
        chosen = _wide(routed).softmax(-1)
        chosen = chosen * pick(chosen.detach(), picks)
        parts.append(picks * chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).eps))
    if balance is not None:
        weights = 2 * _wide(balance).softmax(-1)
        parts = [part * weights[..., i : i + 1] for i, part in enumerate(parts)]
    return torch.cat(parts, -1)


def balance_loss(routed: Tensor, picks: int) -> Tensor:
    """Load balance of the router's logits (..., E): a scalar, `picks` when uniform."""
    gates = _wide(routed).softmax(-1).flatten(0, -2)
    chosen = pick(gates.detach(), picks)
    return (gates.mean(0) * chosen.mean(0)).mean() * gates.shape[-1] ** 2


def norm_gates(q: Tensor, shared: int, picks: int) -> Tensor:
    """Gates without a router: queries (..., H, D) before rotary embedding -> (..., H) of 0 and 1."""
    norms = q.norm(dim=-1)
    return torch.cat([torch.ones_like(norms[..., :shared]), pick(norms[..., shared:], picks)], -1)


def gated_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """softmax(D^-0.5 q k^T) v times the gates (B, N, H): q, k, v (B, N, H, D) -> (B, N, H, D)."""
    out = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), q.shape[-1] ** -0.5).transpose(1, 2)
    return out * gates[..., None].to(out.dtype)


def naive_gated_attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """`gated_attention` head by head."""
    heads = [dense_attention(*(x[:, :, h : h + 1] for x in (q, k, v)), q.shape[-1] ** -0.5) for h in range(q.shape[2])]
    return torch.cat([head * gates[:, :, h, None, None].to(head.dtype) for h, head in enumerate(heads)], 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


PAPER = Paper(
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    authors="Jin, Peng and Zhu, Bo and Yuan, Li and Yan, Shuicheng",
    venue="ICML",
    year=2025,
    arxiv="2410.11842",
    code="SkyworkAI/MoH",
    licence="Apache-2.0",
    key="moh",
)


@system(
    "moh",
    kind="mix",
    paper=PAPER,
    summary="each token picks and weights its attention heads",
    needs=(),
    published=(("LLaMA3-8B, mean of 14 benchmarks, 75 % of the heads (paper)", "61.6 -> 64.0"),),
)
@dataclass(eq=False, repr=False)
class MoH(Mixer):
    """Mixture-of-head attention of any grid."""

    shared: int = param(0, "heads that are always on, S", low=0)
    routed: int = param(0, "heads that a token picks among the others, R", low=0)
    head_size: int | None = param(None, "channels of a head; none: dim / heads", low=1)
    qkv_bias: bool = param(True, "bias of the qkv projection")

    def check(self) -> None:
        if self.head_size is None:
            check_division(self, "dim", self.dim, "heads", self.heads)
        left = self.heads - self.shared
        fits = 0 < self.routed <= left if self.routed else self.shared in (0, self.heads)
        if left < 0 or not fits:
            raise ParameterError(
                f"MoH: shared={self.shared} and routed={self.routed} do not fit heads={self.heads}; "
                "need shared + routed <= heads, and shared = heads (or 0) where routed is 0"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads if self.head_size is None else self.head_size

    def build(self) -> None:
        wide = self.heads * self.head_dim
        self.qkv = nn.Linear(self.dim, 3 * wide, bias=self.qkv_bias)
        self.proj = nn.Linear(wide, self.dim)
        widths = {"wg": self.heads - self.shared if self.routed else 0, "wg_1": self.shared if self.shared > 1 else 0}
        widths["wg_0"] = 2 if self.shared and self.routed else 0
        for name, width in widths.items():
            setattr(self, name, nn.Linear(self.dim, width, bias=False) if width else None)

    def gates(self, x: Tensor) -> Tensor:
        """(..., C) -> gates of all heads (..., H)."""
        routed, balance, shared = (None if w is None else w(x) for w in (self.wg, self.wg_0, self.wg_1))
        if routed is None and shared is None:
            return x.new_ones(*x.shape[:-1], self.heads)
        return head_gates(routed, balance, shared, self.routed)

    def forward(self, x: Tensor, *, with_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, *grid, C) -> same; `with_loss`: and the balance loss of these tokens (0 without a router)."""
        grid = check_grid(self, x)
        tokens = x.flatten(1, -2)
        out = gated_attention(*split_heads(self.qkv(tokens), 3, self.heads), self.gates(tokens))
        out = self.proj(out.flatten(-2)).unflatten(1, grid)
        if not with_loss:
            return out
        return out, x.new_zeros(()) if self.wg is None else balance_loss(self.wg(tokens), self.routed)

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The row of every head times its gate, (B, H, *grid): sums to the gate."""
        grid = check_grid(self, x)
        at = flat_index(index, grid)
        tokens = x.flatten(1, -2)
        q, k, _ = split_heads(self.qkv(tokens), 3, self.heads)
        row = dense_weights(q[:, at : at + 1], k, self.head_dim**-0.5).squeeze(2)
        return (row * self.gates(tokens[:, at])[..., None]).unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n, wide = prod(grid), self.heads * self.head_dim
        router = sum(w.out_features for w in (self.wg, self.wg_0, self.wg_1) if w is not None)
        projections = 8 * n * self.dim * wide + 2 * n * self.dim * router
        return self.priced(grid, mixing=4 * n * n * wide, held=3 * n * wide, projections=projections)

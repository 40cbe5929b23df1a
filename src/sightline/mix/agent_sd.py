"""AgentSD: agent attention without training, with merged tokens as agents. The tensor part, host-free.

Of "Agent Attention" (ECCV 2024, arXiv 2312.08874). Official code: LeapLabTHU/Agent-Attention (agentsd; no licence file:
facts only), on ToMe's bipartite matching.

    dst = one token of every sy x sx cell, src = the others; each src's most similar dst by cosine
    merge:  the r most similar src averaged into their dst (dst itself counts);  agents: the same with r_a > r
    out  = softmax(s^k2 q a^T) softmax(s a k^T) v + k_shortcut v,    q, k, v of merged tokens, a = to_q(agents), s = D^-0.5
    unmerge: a merged src gets the output of its dst

Agents exist only if (N - r_a) 2 < N - r. Differences from the official code: tokens stand in index order, unmerged src then
dst (the official order comes from an unstable sort; nothing depends on it after unmerging); r <= 0 merges nothing and makes no
agents (the official code breaks); ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.errors import ParameterError
from sightline.mix.agent import agent_attention


@dataclass(frozen=True)
class Matching:
    """Which token goes where. Token numbers are of the whole grid."""

    src: Tensor  # (S,)
    dst: Tensor  # (T,)
    order: Tensor  # (B, S) places in `src`, most similar first
    target: Tensor  # (B, S) place in `dst` of every src
    r: int
    agents_r: int | None  # None: no agents

    @property
    def tokens(self) -> int:
        return len(self.src) + len(self.dst)

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N - r, C)."""
        return self._merged(x, self.r) if self.r else x

    def agents(self, x: Tensor) -> Tensor | None:
        """(B, N, C) -> (B, N - r_a, C), or None."""
        return None if self.agents_r is None else self._merged(x, self.agents_r)

    def _merged(self, x: Tensor, r: int) -> Tensor:
        src, dst = x[:, self.src], x[:, self.dst]
        kept = _take(src, self.order[:, r:].sort(1).values)
        gone = self.order[:, :r]
        index = self.target.gather(1, gone)[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([kept, dst.scatter_reduce(1, index, _take(src, gone), "mean")], 1)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, N - r, C) -> (B, N, C)."""
        if not self.r:
            return y
        kept, dst = y.split([len(self.src) - self.r, len(self.dst)], 1)
        stay, gone = self.order[:, self.r :].sort(1).values, self.order[:, : self.r]
        places = torch.cat([self.src[stay], self.src[gone], self.dst.expand(y.shape[0], -1)], 1)
        values = torch.cat([kept, _take(dst, self.target.gather(1, gone)), dst], 1)
        out = y.new_zeros(y.shape[0], self.tokens, y.shape[-1])
        return out.scatter(1, places[..., None].expand_as(values), values)


def match(
    x: Tensor,
    grid: tuple[int, int],
    r: int,
    agents_r: int,
    *,
    cell: tuple[int, int] = (2, 2),
    choice: Tensor | None = None,
) -> Matching:
    """Match tokens x (B, N, C) of a `grid` (h, w).

    Args:
        r: tokens to merge away. agents_r: the same for the agents. cell: (sy, sx).
        choice: (h div sy, w div sx) int64 in [0, sy sx): the dst of each cell; None: its top left token.
    """
    h, w = grid
    sy, sx = cell
    if h * w != x.shape[1] or not (1 <= sy <= h and 1 <= sx <= w):
        raise ParameterError(f"grid={grid} and cell={cell} do not fit {x.shape[1]} tokens")
    rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in (h // sy, w // sx)), indexing="ij")
    choice = torch.zeros_like(rows) if choice is None else choice.to(x.device)
    dst = ((rows * sy + choice // sx) * w + columns * sx + choice % sx).flatten().sort().values
    is_src = torch.ones(h * w, dtype=torch.bool, device=x.device)
    is_src[dst] = False
    src = is_src.nonzero().flatten()
    with torch.no_grad():
        metric = x / x.norm(dim=-1, keepdim=True)
        best, target = (metric[:, src] @ metric[:, dst].mT).max(-1)
        order = best.argsort(dim=1, descending=True, stable=True)
    r, agents_r = min(r, len(src)), min(agents_r, len(src))
    wanted = r > 0 and (h * w - agents_r) * 2 < h * w - r
    return Matching(src, dst, order, target, max(r, 0), agents_r if wanted else None)


def merged_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor | None, *, k_scale2: float = 0.3, k_shortcut: float = 0.075
) -> Tensor:
    """Attention of merged tokens (B, M, H, D) through agents (B, n, H, D); plain where agents do not pay (2 n >= M)."""
    if agents is None or agents.shape[1] * 2 >= q.shape[1]:
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)
    read_scale = q.shape[-1] ** (-0.5 * k_scale2)
    return agent_attention(q, k, v, agents, read_scale=read_scale) + k_shortcut * v


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows `places` (B, K) of x (B, N, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))

"""A perceiver resampler: a fixed number of learned queries read any number of tokens.

The layer is BLIP-2's Q-Former's without its text branch (Li et al., ICML 2023, arXiv 2301.12597): self-attention among
queries, in every `cross_every`-th layer cross-attention to the tokens, feed-forward; each followed by residual and
LayerNorm. With `qk_norm` queries and keys of every head pass a LayerNorm of their own (MM-Interleaved, DEEM):

    A = softmax(LN_q(q) LN_k(k)^T / sqrt(d)) v          per head of width d

Cost per layer: 4 Q^2 C + 8 Q C^2 among queries, 4 Q N C + 4 N C E for the cross-attention, with N tokens of width E.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.errors import ParameterError

EPS = 1e-12  # of the LayerNorms, as in BLIP-2
NAMES = {  # published key -> ours, in this order
    "blip2qformer.layernorm.": "norm.",
    "blip2qformer.encoder.layer.": "layers.",
    ".attention.attention.": ".own.",
    ".attention.output.dense.": ".own.out.",
    ".attention.output.LayerNorm.": ".own_norm.",
    ".crossattention.attention.": ".cross.",
    ".crossattention.output.dense.": ".cross.out.",
    ".crossattention.output.LayerNorm.": ".cross_norm.",
    ".intermediate_query.dense.": ".up.",
    ".output_query.dense.": ".down.",
    ".output_query.LayerNorm.": ".norm.",
}


class Attention(nn.Module):
    """Multi-head attention from queries (B, Q, C) to tokens (B, N, E); values keep width C."""

    def __init__(self, width: int, source: int, heads: int, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // heads, eps=EPS) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, Q or N, d)
            for layer, y in ((self.query, x), (self.key, tokens), (self.value, tokens))
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One layer; `source` None: without cross-attention."""

    def __init__(self, width: int, source: int | None, heads: int, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.own, self.own_norm = Attention(width, width, heads, qk_norm, dropout), nn.LayerNorm(width, eps=EPS)
        self.cross = None
        if source is not None:
            self.cross = Attention(width, source, heads, qk_norm, dropout)
            self.cross_norm = nn.LayerNorm(width, eps=EPS)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.drop = nn.LayerNorm(width, eps=EPS), nn.Dropout(dropout)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.own_norm(x + self.drop(self.own(x, x)))
        if self.cross is not None:
            x = self.cross_norm(x + self.drop(self.cross(x, tokens)))
        return self.norm(x + self.drop(self.down(F.gelu(self.up(x)))))


class Resampler(nn.Module):
    """(B, N, source) tokens -> (B, queries, width).

    Args:
        queries: Q. width: C, of the queries. source: E, width of the tokens. depth, heads: layers, heads of each.
        cross_every: cross-attention in layers 0, cross_every, 2 cross_every, ...
        qk_norm: LayerNorm on the queries and keys of every head. dropout: in training; BLIP-2 has 0.1.

    Raises:
        ParameterError: heads do not divide the width, or a number is not positive.
    """

    def __init__(
        self,
        queries: int = 77,
        width: int = 768,
        source: int = 1024,
        *,
        depth: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        qk_norm: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"queries": queries, "width": width, "source": source, "depth": depth, "heads": heads}
        for name, value in {**sizes, "cross_every": cross_every}.items():
            if value < 1:
                raise ParameterError(f"Resampler: {name}={value!r} is out of range; choose {name} from 1 on")
        if width % heads:
            raise ParameterError(f"Resampler: heads={heads} does not divide width={width}; choose a divisor")
        self.queries = nn.Parameter(torch.zeros(1, queries, width))
        self.norm, self.drop = nn.LayerNorm(width, eps=EPS), nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(width, source if k % cross_every == 0 else None, heads, qk_norm, dropout) for k in range(depth)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.norm(self.queries)).expand(len(tokens), -1, -1)
        for layer in self.layers:
            x = layer(x, tokens)
        return x


def published_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published resampler (`queries`, `blip2qformer.*`) under this module's names."""
    renamed = {}
    for key, value in state.items():
        for old, new in NAMES.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed

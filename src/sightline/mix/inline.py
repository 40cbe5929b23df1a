"""Bridging the Divide: Reconsidering Softmax and Linear Attention (InLine: injective linear attention + local residual).

NeurIPS 2024, arXiv 2412.06590. Official code: LeapLabTHU/InLine (no licence file: facts only).

Linear attention whose map from queries to attention rows is injective: the row is made to sum to 1 by adding a constant
instead of dividing. With s = D^-0.5, N tokens, k^ and v^ the means over tokens:

    A_ij  = 1/N + (s/N) (q_i k_j - q_i k^)                                  rows sum to 1, entries may be negative
    out_i = s q_i [k^T v / N - k^ v^] + v^                                  q, k, v (B, N, H, D)
    out  += conv3x3_g(v),  g = W2 gelu(W1 mean(x))                          depthwise, kernels of each sample; zero padding

q and k may go through phi: identity (published), relu, leaky_relu (0.01), exp(0.2 x). A CLS token counts in N, k^, v^ and
mean(x); the convolution acts on the map alone. s/N is in the code, not in the paper's formula. Differences from the official
code: any H and W; sums in fp32 under autocast; its unused attention dropout and mask do not exist here.

Cost: O(N C D) and 9 N C for the convolution. A row of A costs O(N D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import ParameterError
from sightline.mix.parts.base import Cost, Mixer, as_it_is, check_grid, flat_index
from sightline.mix.parts.local import PredictedConv, conv_per_sample, convolved, depthwise

PHI = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


def inline_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Injective linear attention: q (B, L, H, D), k (B, N, H, D), v (B, N, H, M) -> (B, L, H, M)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, values = q.to(wide), k.to(wide), v.to(wide)
    mean_k, mean_v = k.mean(1), values.mean(1)  # (B, H, D), (B, H, M)
    with as_it_is(q.device):  # a difference of sums
        product = torch.einsum("bnhd,bnhm->bhdm", k, values) / k.shape[1] - mean_k[..., None] * mean_v[..., None, :]
        return (torch.einsum("blhd,bhdm->blhm", q, scale * product) + mean_v[:, None]).to(v.dtype)


def inline_weights(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """The rows A (B, H, L, N) that `inline_attention` never builds."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("blhd,bnhd->bhln", q.to(wide), k.to(wide)) * scale
    return (1 + scores - scores.mean(-1, keepdim=True)) / k.shape[1]


def naive_inline_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """`inline_attention` from its whole map."""
    return torch.einsum("bhln,bnhm->blhm", inline_weights(q, k, scale=scale).to(v.dtype), v)


@system(
    "inline",
    kind="mix",
    paper=Paper(
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        authors="Han, Dongchen and Pu, Yifan and Xia, Zhuofan and Han, Yizeng and Pan, Xuran and Li, Xiu and Lu, Jiwen "
        "and Song, Shiji and Huang, Gao",
        venue="NeurIPS",
        year=2024,
        arxiv="2412.06590",
        code="LeapLabTHU/InLine",
    ),
    summary="injective linear attention, normalised by subtraction, and a predicted local residual",
    needs=(),
    published=(("InLine-Swin-T ImageNet-1K top-1 (paper)", "82.4"),),
)
@dataclass(eq=False, repr=False)
class InLine(Mixer):
    """Injective linear attention over a whole map (B, H, W, C)."""

    phi: str = param("identity", "on queries and keys: identity, relu, leaky_relu or exp")
    qkv_bias: bool = param(True, "bias of the projections")
    fused: bool = param(True, "one qkv projection (DeiT, Swin); false: q and kv (PVT)")
    learned: bool = param(False, "a learned depthwise 3 x 3 convolution of the values beside the predicted one (CSwin)")

    def check(self) -> None:
        super().check()
        if self.phi not in PHI:
            raise ParameterError(f"InLine: phi={self.phi!r}; choose {', '.join(PHI)}")

    def build(self) -> None:
        if self.fused:
            self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=self.qkv_bias)
        else:
            self.q = nn.Linear(self.dim, self.dim, bias=self.qkv_bias)
            self.kv = nn.Linear(self.dim, 2 * self.dim, bias=self.qkv_bias)
        self.proj = nn.Linear(self.dim, self.dim)
        self.residual = PredictedConv(self.dim, self.heads)
        self.get_v = depthwise(self.dim, 3) if self.learned else None

    def forward(
        self, x: Tensor, cls: Tensor | None = None, *, mean: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, H, W, C) -> same; with cls tokens (B, T, C), which stand before the map, the pair (map, cls).

        mean: (B, C) that the kernels are predicted from, instead of the mean of x (CSwin: of x before its norm).
        """
        grid = check_grid(self, x, axes=(2,))
        tokens = x.flatten(1, 2) if cls is None else torch.cat([cls, x.flatten(1, 2)], 1)
        q, k, v = self._project(tokens)
        out = inline_attention(q, k, v).flatten(-2)
        skip = 0 if cls is None else cls.shape[1]
        kernels = self.residual(tokens.mean(1) if mean is None else mean)
        values = v[:, skip:].flatten(-2).unflatten(1, grid)
        local = conv_per_sample(values, kernels)
        if self.get_v is not None:
            local = local + convolved(self.get_v, values)
        if cls is None:
            return self.proj(out.unflatten(1, grid) + local)
        out = self.proj(torch.cat([out[:, :skip], out[:, skip:] + local.flatten(1, 2)], 1))
        return out[:, skip:].unflatten(1, grid), out[:, :skip]

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after phi, and values: (B, N, H, D) each."""
        joint = self.qkv(tokens) if self.fused else torch.cat([self.q(tokens), self.kv(tokens)], -1)
        q, k, v = joint.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return PHI[self.phi](q), PHI[self.phi](k), v

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The row A_i of the linear attention (B, H, *grid): sums to 1, may be negative; without the local residual."""
        grid = check_grid(self, x, axes=(2,))
        at = flat_index(index, grid)
        q, k, _ = self._project(x.flatten(1, 2))
        return inline_weights(q[:, at : at + 1], k).squeeze(2).unflatten(-1, grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n = prod(grid)
        mixing = 4 * n * self.dim * self.head_dim + 18 * n * self.dim
        return self.priced(grid, mixing=mixing, held=self.dim * self.head_dim + n * self.dim)

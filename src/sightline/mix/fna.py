"""Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level (FNA).

NeurIPS 2024, arXiv 2403.04690. Official code: SHI-Labs/NATTEN (MIT).

Each token attends to the prod(window) tokens nearest to it on its grid; near a border the box is shifted inwards, not cut.
It is generalized neighborhood attention with stride 1: equations, layout and the one implementation are in `gna`.
An even window has one more key on the left. A causal axis ends at the query and is cut at the border.

Weights: qkv and proj as the official modules name them. The relative bias of old NAT checkpoints is not part of FNA.

Cost: 4 N prod(window) C operations (dense: 4 N^2 C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sightline.catalog import Paper, system
from sightline.mix.gna import GNA, neighborhood_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gna.neighborhood_attention` with stride 1: q, k, v (B, *X, H, D) -> (B, *X, H, D)."""
    return neighborhood_attention(q, k, v, window, 1, dilation, causal, **options)


@system(
    "fna",
    kind="mix",
    paper=Paper(
        title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        authors="Hassani, Ali and Hwu, Wen-Mei and Shi, Humphrey",
        venue="NeurIPS",
        year=2024,
        arxiv="2403.04690",
        code="SHI-Labs/NATTEN",
        licence="MIT",
    ),
    summary="attention to the nearest tokens of a 1-D, 2-D or 3-D grid",
    needs=(),
    published=(("fused against naive kernels, fp16, mean", "+1607 % (1-D), +581 % (2-D)"),),
)
@dataclass(eq=False, repr=False)
class FNA(GNA):
    """Neighborhood attention with stride 1."""

    stride: int = field(init=False, default=1)

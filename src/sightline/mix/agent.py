"""On the Integration of Softmax and Linear Attention (Agent attention).

ECCV 2024, arXiv 2312.08874. Official code: LeapLabTHU/Agent-Attention (no licence file: facts only).

A few agent tokens A (n << N) stand between queries and keys: they gather from K, V, then queries read from them.

    A    = adaptive average pool of q as an image, sqrt(n) x sqrt(n), no CLS        (B, n, H, D),   s = D^-0.5
    V_A  = softmax(s A k^T + b1) v                                                  b1 (H, n, K)
    out  = softmax(s q A^T + b2) V_A  + dwconv3x3(v)                                b2 (H, N, n)
    b1   = resize(an) + ah + aw       b2 = resize(na)^T + ha + wa                   an, na (H, n, 7, 7), bilinear

A CLS token stands first, has the bias ac (as a key) and ca (as a query), and takes no part in pooling or convolution.
`reduction` r > 1 (PVT): k, v from a strided convolution and LayerNorm of x; v is resized before the convolution.
Differences from the official code: any H and W (an, na are resized anyway; ah, aw, ha, wa linearly along their axis, when the
map is not `window`); its ignored mask does not exist here. The training-free form for diffusion models is in `agent_sd`.

Cost: 8 N n C operations, memory O(N n). A row of the effective map is softmax(q_i A) softmax(A k): O(n N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, param, system
from sightline.errors import ParameterError
from sightline.mix.parts.base import Cost, Mixer, check_grid, dense_attention, dense_weights, flat_index, per_axis
from sightline.mix.parts.groups import sdpa
from sightline.mix.parts.local import convolved, depthwise, resize


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    gather_bias: Tensor | None = None,
    read_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    read_scale: float | None = None,
) -> Tensor:
    """softmax(q A^T) softmax(A k^T) v.

    Args:
        q: (B, N, H, D). k: (B, K, H, D). v: (B, K, H, M). agents: (B, n, H, D).
        gather_bias: (B|1, H, n, K) added to the agents' scores. read_bias: (B|1, H, N, n) to the queries'.
        scale: of the agents' scores, default D^-0.5. read_scale: of the queries', default `scale`.

    Returns:
        (B, N, H, M).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    read_scale = scale if read_scale is None else read_scale
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    gathered = sdpa(agents, k, v, scale, gather_bias)
    return sdpa(q, agents, gathered, read_scale, read_bias).transpose(1, 2)


def naive_agent_attention(
    q, k, v, agents, gather_bias=None, read_bias=None, *, scale: float | None = None, read_scale: float | None = None
) -> Tensor:
    """`agent_attention` from whole maps."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    read_scale = scale if read_scale is None else read_scale
    return dense_attention(q, agents, dense_attention(agents, k, v, scale, gather_bias), read_scale, read_bias)


@system(
    "agent",
    kind="mix",
    paper=Paper(
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        authors="Han, Dongchen and Ye, Tianzhu and Han, Yizeng and Xia, Zhuofan and Pan, Siyuan and Wan, Pengfei and "
        "Song, Shiji and Huang, Gao",
        venue="ECCV",
        year=2024,
        arxiv="2312.08874",
        code="LeapLabTHU/Agent-Attention",
    ),
    summary="a few pooled agent tokens gather from all keys, all queries read from them",
    needs=(),
    published=(("Agent-Swin-T ImageNet-1K top-1 (paper)", "82.6"),),
)
@dataclass(eq=False, repr=False)
class Agent(Mixer):
    """Agent attention over a map (B, H, W, C)."""

    agents: int = param(49, "agent tokens, a square number", low=1)
    window: int | tuple[int, ...] = param(14, "height and width that the biases are made for", low=1)
    qkv_bias: bool = param(True, "bias of the projections")
    fused: bool = param(True, "one qkv projection (DeiT, Swin); false: q and kv (PVT)")
    reduction: int = param(1, "stride of the keys and values (PVT; needs fused=False)", low=1)
    cls: bool = param(False, "has biases for a CLS token (DeiT)")

    def check(self) -> None:
        super().check()
        if isqrt(self.agents) ** 2 != self.agents:
            raise ParameterError(f"Agent: agents={self.agents} must be a square number such as 9, 16, 49")
        if min(per_axis("window", self.window, 2)) < self.reduction:
            raise ParameterError(f"Agent: window={self.window} is smaller than reduction={self.reduction}")
        if self.reduction > 1 and (self.fused or self.cls):
            raise ParameterError("Agent: reduction above 1 needs fused=False and cls=False")

    def build(self) -> None:
        if self.fused:
            self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=self.qkv_bias)
        else:
            self.q = nn.Linear(self.dim, self.dim, bias=self.qkv_bias)
            self.kv = nn.Linear(self.dim, 2 * self.dim, bias=self.qkv_bias)
        if self.reduction > 1:
            self.sr = nn.Conv2d(self.dim, self.dim, self.reduction, stride=self.reduction)
            self.norm = nn.LayerNorm(self.dim)
        self.proj = nn.Linear(self.dim, self.dim)
        self.dwc = depthwise(self.dim, 3)
        h, w = per_axis("window", self.window, 2)
        kh, kw = h // self.reduction, w // self.reduction
        n, m = self.agents, self.heads
        shapes = {"an": (m, n, 7, 7), "na": (m, n, 7, 7), "ah": (1, m, n, kh, 1), "aw": (1, m, n, 1, kw)}
        shapes |= {"ha": (1, m, h, 1, n), "wa": (1, m, 1, w, n)}
        shapes |= {"ac": (1, m, n, 1), "ca": (1, m, 1, n)} if self.cls else {}
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_bias", nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))

    def forward(self, x: Tensor, cls: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, H, W, C) -> same; with a CLS token (B, 1, C) (needs `cls=True`) the pair (map, CLS)."""
        grid = check_grid(self, x, axes=(2,))
        q, k, v, agents, keys_grid = self._project(x, cls)
        biases = self._gather_bias(keys_grid, cls), self._read_bias(grid, cls)
        out = agent_attention(q, k, v, agents, *biases).flatten(-2)
        skip = 0 if cls is None else 1
        values = v[:, skip:].flatten(-2).unflatten(1, keys_grid)
        if self.reduction > 1:
            values = resize(values.movedim(-1, 1), grid).movedim(1, -1)
        local = convolved(self.dwc, values).flatten(1, 2)
        out = self.proj(torch.cat([out[:, :skip], out[:, skip:] + local], 1))
        new = out[:, skip:].unflatten(1, grid)
        return new if cls is None else (new, out[:, :skip])

    def _project(self, x: Tensor, cls: Tensor | None):
        """q (B, N, H, D), k and v (B, K, H, D), agents (B, n, H, D), grid of the keys; CLS first where there is one."""
        grid = tuple(x.shape[1:3])
        if cls is not None and not self.cls:
            raise ParameterError("Agent: a CLS token needs cls=True, which makes its biases")
        tokens = x.flatten(1, 2) if cls is None else torch.cat([cls, x.flatten(1, 2)], 1)
        keys_grid = grid
        if self.fused:
            q, k, v = self.qkv(tokens).chunk(3, -1)
        else:
            reduced = self.norm(convolved(self.sr, x)) if self.reduction > 1 else x
            keys_grid = tuple(reduced.shape[1:3]) if self.reduction > 1 else grid
            source = reduced.flatten(1, 2) if self.reduction > 1 else tokens
            q, (k, v) = self.q(tokens), self.kv(source).chunk(2, -1)
        image = q[:, -prod(grid) :].unflatten(1, grid).movedim(-1, 1)
        agents = F.adaptive_avg_pool2d(image, isqrt(self.agents)).flatten(2).transpose(1, 2)
        return *(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v, agents)), keys_grid

    def _gather_bias(self, grid: tuple[int, ...], cls: Tensor | None) -> Tensor:
        """b1 (1, H, n, K)."""
        rows = resize(self.ah_bias[..., 0], grid[:1], "linear")[..., None]
        columns = resize(self.aw_bias[..., 0, :], grid[1:], "linear")[..., None, :]
        bias = resize(self.an_bias, grid).flatten(2)[None] + (rows + columns).flatten(3)
        return bias if cls is None else torch.cat([self.ac_bias, bias], -1)

    def _read_bias(self, grid: tuple[int, ...], cls: Tensor | None) -> Tensor:
        """b2 (1, H, N, n)."""
        rows = resize(self.ha_bias[..., 0, :].mT, grid[:1], "linear").mT[..., None, :]
        columns = resize(self.wa_bias[..., 0, :, :].mT, grid[1:], "linear").mT[..., None, :, :]
        bias = resize(self.na_bias, grid).flatten(2).mT[None] + (rows + columns).flatten(2, 3)
        return bias if cls is None else torch.cat([self.ca_bias, bias], -2)

    def attention_of(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """The row of the effective map A2 A1 (B, H, *grid of the keys), without the local branch: sums to 1."""
        grid = check_grid(self, x, axes=(2,))
        at = flat_index(index, grid)
        q, k, _, agents, keys_grid = self._project(x, None)
        scale = self.head_dim**-0.5
        gathered = dense_weights(agents, k, scale, self._gather_bias(keys_grid, None))
        read = dense_weights(q[:, at : at + 1], agents, scale, self._read_bias(grid, None)[:, :, at : at + 1])
        return (read @ gathered).squeeze(2).unflatten(-1, keys_grid)

    def cost(self, grid: Sequence[int]) -> Cost:
        n, keys = prod(grid), prod(grid) // self.reduction**2
        mixing = 4 * (n + keys) * self.agents * self.dim + 18 * n * self.dim
        return self.priced(grid, mixing=mixing, held=self.heads * self.agents * (n + keys) + self.agents * self.dim)

"""Experiment 3: how much each visual token adds to the residual stream of the text queries.

    c_qj = sum_h A_hqj x_j W_V^h W_O^h        (D,)     one key's part of what the attention block writes
    out_q = sum_j c_qj (+ bias of W_O)

Exact, with no query x key x D tensor: with u_hj = x_j W_V^h W_O^h and M_j = (u_hj . u_kj)_hk,  |c_qj|^2 = A_qj^T M_j A_qj.
M_j does not depend on the query, so more queries cost next to nothing. The values are those the attention uses: the
output of the value projection, its bias included.

Source: section 4 of "See What You Are Told", arXiv 2503.03321 (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline.engine.attach import attach
from sightline.errors import HostError
from sightline.explain.observing import Observer, prefill, prompts

if TYPE_CHECKING:
    from PIL import Image

    from sightline.lvlm import LVLM

VALUE, OUTPUT = ("v_proj",), ("o_proj", "out_proj", "dense")  # names used by transformers' decoders
CHUNK_BYTES = 32 << 20  # fp32 of u for one chunk of keys


@dataclass(frozen=True, eq=False)
class Contribution:
    """What the visual tokens of one prompt add, mean over its text queries. L layers, V tokens."""

    norms: np.ndarray  # (L, V) float32: |c_qj|
    attention: np.ndarray  # (L, V) float32: A_qj, mean over heads too
    sinks: np.ndarray  # (L, V) bool

    def means(self) -> dict[str, np.ndarray]:
        """(L,) mean per token: "sink norm", "other norm", "sink attention", "other attention"; NaN where there is none."""
        found = {}
        for group, member in (("sink", self.sinks), ("other", ~self.sinks)):
            count = member.sum(1)
            for name, values in (("norm", self.norms), ("attention", self.attention)):
                total = np.where(member, values, 0).sum(1)
                found[f"{group} {name}"] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return found


class _Weigher(Observer):
    """An observer that also weighs what keys add."""

    def __init__(self, tau: float | None, sink_dims: tuple[int, ...] | None) -> None:
        super().__init__(tau, sink_dims)
        self.output: list[nn.Module] = []  # W_O of every layer
        self.values: dict[int, Tensor] = {}  # layer -> (B, N, Hkv Dv) of the forward now running
        self.norms: dict[int, Tensor] = {}  # layer -> (B, N) sums over text queries

    def keep(self, layer: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.values[layer] = output.detach()

    def attention(self, site: Any) -> Any:
        self.norms.pop(site.layer, None)
        return super().attention(site)

    def see(self, layer: int, rows: Tensor, start: int, weights: Tensor, first: int) -> None:
        super().see(layer, rows, start, weights, first)
        mine = rows[:, first - start : first - start + weights.shape[2]]  # (B, R)
        norms = torch.zeros_like(self.phi[layer])
        for b in range(len(norms)):
            columns = self.tokens.visual[b].nonzero().flatten()
            value = self.values[layer][b, columns].float()  # (V, Hkv Dv)
            part = key_norms(weights[b][:, mine[b]][:, :, columns], value, self.output[layer].weight)  # (R, V)
            norms[b, columns] = part.sum(0)
        self.norms[layer] = self.norms.get(layer, 0) + norms


def key_norms(weights: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """|sum_h A_hqj v_hj W_O^h| for every query and key.

    Args:
        weights: (H, R, V) attention. value: (V, Hkv Dv) value states, before heads are split.
        output: (D, H Dv) weight of the output projection.

    Returns:
        (R, V) fp32.
    """
    heads, _, keys = weights.shape
    split = output.float().view(output.shape[0], heads, -1)  # (D, H, Dv)
    dim = split.shape[-1]
    value = value.view(keys, -1, dim)  # (V, Hkv, Dv)
    value = value.repeat_interleave(heads // value.shape[1], 1)  # (V, H, Dv)
    step = max(1, CHUNK_BYTES // (4 * heads * output.shape[0]))
    parts = []
    for a in range(0, keys, step):
        u = torch.einsum("vhd,ohd->vho", value[a : a + step], split)  # (v, H, D)
        gram = u @ u.transpose(1, 2)  # (v, H, H)
        chosen = weights[:, :, a : a + step].float().permute(2, 1, 0)  # (v, R, H)
        parts.append(((chosen @ gram) * chosen).sum(-1))  # (v, R)
    return torch.cat(parts).clamp(min=0).sqrt().T


def contribution(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
) -> list[Contribution]:
    """Norm of what every visual token adds to the text queries, per layer, with the sinks marked.

    Args: see `observe`.

    Raises:
        HostError: an attention module has no separate value and output projection, or they are quantised.
    """
    weigher = _Weigher(tau, sink_dims)
    inputs = prompts(lvlm, images, questions)
    with attach(lvlm.model, weigher, host=lvlm.host) as attached:
        modules = attached.text_attention()
        found = [(_part(m, VALUE, "value"), _part(m, OUTPUT, "output")) for m in modules]
        weigher.output = [output for _, output in found]
        hooks = [value.register_forward_hook(partial(weigher.keep, i)) for i, (value, _) in enumerate(found)]
        try:
            prefill(lvlm, inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return [_contribution(weigher, b) for b in range(len(images))]


def _part(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    part = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if part is None:
        raise HostError(f"{type(module).__name__} has no {what} projection of its own (looked for {', '.join(names)})")
    weight = getattr(part, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        raise HostError(f"the {what} projection of {type(module).__name__} is quantised: load the model unquantised")
    return part


def _contribution(weigher: _Weigher, b: int) -> Contribution:
    layers = sorted(weigher.norms)
    columns = weigher.tokens.visual[b].nonzero().flatten()
    rows = max(int(weigher.text_rows(0)[b].sum()), 1)
    return Contribution(
        norms=torch.stack([weigher.norms[i][b, columns] / rows for i in layers]).cpu().numpy(),
        attention=torch.stack([weigher.received[i][b][:, columns].mean(0) / rows for i in layers]).cpu().numpy(),
        sinks=torch.stack([weigher.phi[i][b, columns] > weigher.tau for i in layers]).cpu().numpy(),
    )

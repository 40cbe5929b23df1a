"""Attention sinks: tokens that carry huge values in a few fixed dimensions of the residual stream.

    phi(x) = max_{d in D_sink} |x_d| / sqrt(mean_k x_k^2 + 1e-6)          x (D,), before the layer's norm
    sink  <=>  phi(x) > tau

phi cannot exceed sqrt(D). The published tau = 20 therefore needs D > 400, and means at D = 4096 that one dimension holds
more than tau^2 / D = 9.8 % of the token's energy; `default_tau` keeps that share for narrow models.

Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321 (ICLR 2025).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sightline.errors import ParameterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sightline.engine.system import Shape
    from sightline.hosts import Host

PAPER_TAU = 20.0
ENERGY = PAPER_TAU**2 / 4096  # share of a token's energy that tau stands for in the paper's models
EPS = 1e-6

# (model type of the language model, hidden size, layers, key-value heads) -> sink dimensions
KNOWN: dict[tuple[str, int, int, int], tuple[int, ...]] = {
    ("llama", 4096, 32, 32): (2533, 1415),  # LLaMA-2-7B, Vicuna-7B v1.5: official code
    ("llama", 5120, 40, 40): (2100, 4743),  # LLaMA-2-13B, Vicuna-13B v1.5: official code
    ("qwen2", 3584, 28, 4): (458, 2570),  # Qwen2-7B, Qwen2.5-7B: third-party repositories, which agree
    ("qwen2_vl_text", 3584, 28, 4): (458, 2570),
    ("qwen2_5_vl_text", 3584, 28, 4): (458, 2570),
}


def sink_value(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi of every token: (..., D) -> (...) fp32. With no sink dimension: zeros."""
    hidden = hidden.float()
    rms = (hidden.square().mean(-1) + EPS).sqrt()
    if not dims:
        return torch.zeros_like(rms)
    return hidden[..., list(dims)].abs().amax(-1) / rms


def default_tau(hidden_size: int) -> float:
    """The paper's 20 where phi can well exceed it (D >= 1600), else the value of the same energy share: 20 sqrt(D / 4096)."""
    return PAPER_TAU if hidden_size >= 1600 else math.sqrt(ENERGY * hidden_size)


def check_tau(tau: float, hidden_size: int) -> None:
    """Raise ParameterError when no token of this width can ever exceed tau."""
    if tau >= math.sqrt(hidden_size):
        raise ParameterError(
            f"tau={tau:g} can never be exceeded: phi <= sqrt(hidden size {hidden_size}) = {math.sqrt(hidden_size):.1f}; "
            f"choose tau below that, for example {default_tau(hidden_size):.1f} (tau=None does it)"
        )


def outlier_dims(states: Tensor, tau: float) -> tuple[int, ...]:
    """Dimensions whose normalised value reaches tau in more than half of the middle layers, the strongest first.

    Args:
        states: (L, D) state of a start token entering layers 0..L-1.
        tau: threshold.
    """
    layers = states.shape[0]
    middle = states[min(2, layers - 1) : max(layers - 1, min(2, layers - 1) + 1)].float()  # layers 2 .. L-2
    normed = middle.abs() / (middle.square().mean(-1, keepdim=True) + EPS).sqrt()
    hits = (normed >= tau).float().mean(0) > 0.5
    found = hits.nonzero().flatten()
    return tuple(int(d) for d in found[normed[:, found].mean(0).argsort(descending=True)])


def find_sink_dims(model: nn.Module, tau: float | None = None, *, host: Host | None = None) -> tuple[int, ...]:
    """The sink dimensions of any model: from the known table, or found with one forward of its start token.

    Args:
        model: a vision-language model of a known host family.
        tau: threshold on the normalised value; None: `default_tau` of its hidden size.
        host: where the model keeps its parts, when its class is not known.

    Returns:
        Normally one to four dimensions; empty when the model has no massive activations at its start token.
    """
    from sightline.engine.shape import shape_of
    from sightline.hosts import find

    return sink_dims_of(shape_of(model, host or find(model)), tau)


def sink_dims_of(shape: Shape, tau: float | None = None) -> tuple[int, ...]:
    """`find_sink_dims` for a system that knows only the model's `Shape`."""
    known = KNOWN.get((shape.model_type, shape.hidden_size, shape.layers, shape.heads_kv))
    if known is not None:
        return known
    return outlier_dims(shape.first_states(), default_tau(shape.hidden_size) if tau is None else tau)

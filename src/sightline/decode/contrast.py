"""What contrastive decoders share: which tokens are plausible at all, and the weighing of two streams' scores."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _log(beta: float) -> float:
    """log beta, rounded to fp32 as the released codes do."""
    return float(torch.tensor(beta).log())


def plausible(logits: Tensor, beta: float) -> Tensor:
    """(..., V) bool: tokens whose probability is at least `beta` times that of the most likely one; 0 keeps all."""
    return logits >= _log(beta) + logits.amax(-1, keepdim=True)


def weigh(logits: Tensor, second: Tensor, *, first_weight: float, second_weight: float, beta: float) -> Tensor:
    """first_weight * logits + second_weight * second where `logits` finds a token plausible, -inf elsewhere.

    Args:
        logits, second: (..., V) scores of the first and of the second stream.
        beta: see `plausible`; the first stream alone decides.
    """
    mixed = first_weight * logits + second_weight * second
    return mixed.masked_fill(~plausible(logits, beta), -torch.inf)

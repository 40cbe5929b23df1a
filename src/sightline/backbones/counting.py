"""Size of a network without its weights: parameters and multiply-accumulates, counted on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int | tuple[int, int], channels: int = 3) -> int:
    """Multiply-accumulates of matrix products, attention and convolutions for one picture; norms and so on are not counted."""
    height, width = size if isinstance(size, tuple) else (size, size)
    weight = next(model.parameters())
    picture = torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype)
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_mapping()) as counter:
            model.eval()(picture)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2


def _mapping() -> dict[Any, Any]:
    """torchvision's deformable convolution, which torch's counter does not know."""
    import torchvision  # noqa: F401 (registers the operator)

    def deform(_: Any, weight: Any, *__: Any, out_shape: Any, **___: Any) -> int:
        batch, channels, height, width = out_shape
        return 2 * batch * channels * height * width * weight[1] * weight[2] * weight[3]

    return {torch.ops.torchvision.deform_conv2d: deform}

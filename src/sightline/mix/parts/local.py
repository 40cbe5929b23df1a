"""Local branches that act on the values of an attention: (B, H, W, C) -> (B, H, W, C) convolutions, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution on (B, H, W, C)."""
    return conv(x.movedim(-1, 1)).movedim(1, -1)


def depthwise(dim: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution of odd `kernel` that keeps the size, with bias and zero padding (LePE)."""
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


class PredictedConv(nn.Sequential):
    """Predicts a depthwise 3 x 3 kernel for each sample from its mean token: (B, C) -> (B, C, 3, 3)."""

    def __init__(self, dim: int, heads: int) -> None:
        first, second = (nn.Conv1d(dim, width, 1, groups=heads) for width in (dim, 9 * dim))
        super().__init__(first, nn.GELU(), second)

    def forward(self, mean: Tensor) -> Tensor:
        return super().forward(mean[..., None]).unflatten(1, (-1, 3, 3)).squeeze(-1)


def conv_per_sample(x: Tensor, kernels: Tensor) -> Tensor:
    """Each sample (H, W, C) of x under its own depthwise kernels (B, C, 3, 3), zero padding."""
    batch, height, width, channels = x.shape
    image = x.permute(1, 2, 0, 3).reshape(
        1, height, width, batch * channels
    )  # samples beside channels, which stay last
    kernels = kernels.to(x.dtype).reshape(batch * channels, 1, *kernels.shape[-2:])
    out = F.conv2d(image.movedim(-1, 1), kernels, padding=kernels.shape[-1] // 2, groups=batch * channels)
    return out.movedim(1, -1).reshape(height, width, batch, channels).permute(2, 0, 1, 3)


def resize(x: Tensor, size: tuple[int, ...], mode: str = "bilinear") -> Tensor:
    """(..., C, *size') -> (..., C, *size), half-pixel centres; unchanged where the size is already right."""
    if x.shape[-len(size) :] == torch.Size(size):
        return x
    flat = x.flatten(0, -len(size) - 2)
    return F.interpolate(flat, size=size, mode=mode, align_corners=False).unflatten(0, x.shape[: -len(size) - 1])

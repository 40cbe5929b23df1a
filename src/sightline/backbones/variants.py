"""The registry of backbones: each family states its published variants once; timm, catalogue, bench and tests read them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    create_model,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    register_model,
)
from torch import nn

from sightline.errors import UnknownNameError, nearest

SHORT = {"_tiny": "_t", "_small": "_s", "_medium": "_m", "_base": "_b", "_large": "_l"}


@dataclass(frozen=True)
class Variant:
    """One published network."""

    name: str  # as in timm.create_model
    system: str  # slug of its operator in the catalogue
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of the network's class
    parameters: int | None = None  # exact, from the official class
    millions: float | None = None  # as the paper rounds it, where there is no official class to count
    macs: float | None = None  # 1e9 multiply-accumulates at `size`, as published ("FLOPs" in the papers)
    top1: float | None = None  # ImageNet-1K, per cent, as published
    size: int = 224
    of_timm: bool = False  # the network is timm's own

    @property
    def alias(self) -> str | None:
        """The short name, for example biformer_t of biformer_tiny."""
        name = self.name
        for long, short in SHORT.items():
            name = name.replace(long, short)
        return name if name != self.name else None


VARIANTS: dict[str, Variant] = {}


def register(module: str, cls: Callable[..., nn.Module], variants: Iterable[Variant], **cfg: Any) -> None:
    """Register `variants` of a network class in timm, from the file `module`; `cfg`: more of timm's default_cfg."""
    namespace = sys.modules[module]
    cfgs = getattr(namespace, "default_cfgs", {})
    for variant in variants:
        VARIANTS[variant.name] = variant
        for name in filter(None, (variant.name, variant.alias)):
            cfgs[name] = generate_default_cfgs({name: _cfg(variant) | cfg})[name]
    namespace.default_cfgs = cfgs
    for variant in variants:
        for name in filter(None, (variant.name, variant.alias)):
            register_model(_entry(module, name, cls, variant))


def note(variants: Iterable[Variant]) -> None:
    """Add variants whose networks timm has itself."""
    VARIANTS.update((v.name, v) for v in variants)


def create(name: str, *, device: str | torch.device = "cpu", **options: Any) -> nn.Module:
    """`timm.create_model` by published or short name; `device="meta"` builds the shapes only.

    Raises:
        UnknownNameError: naming the nearest backbones.
    """
    if not is_model(name):
        raise UnknownNameError(f"no backbone {name!r}: {nearest(name, list(VARIANTS))}")
    with torch.device(device):
        return create_model(name, **options)


def sized(name: str, size: int) -> dict[str, int]:
    """The option of `create` that a network needs to read pictures of `size`: timm's VOLO is built for one size, most for any."""
    cfg = get_pretrained_cfg(name)
    return {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}


def variant(name: str) -> Variant:
    """The variant of that name or short name."""
    for one in VARIANTS.values():
        if name in (one.name, one.alias):
            return one
    raise UnknownNameError(f"no backbone {name!r}: {nearest(name, list(VARIANTS))}")


def of_family(system: str) -> list[Variant]:
    """All variants built on one operator of the catalogue."""
    return [v for v in VARIANTS.values() if v.system == system]


def _cfg(variant: Variant) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, variant.size, variant.size),
        "pool_size": None,
        "crop_pct": 0.9 if variant.size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
    }


def _entry(module: str, name: str, cls: Callable[..., nn.Module], variant: Variant) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {"img_size": variant.size, **variant.options, **kwargs}
        feature_cfg = {"out_indices": 4, "feature_cls": "getter"}  # the last four maps
        return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **options)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = f"{name}: see {module}."
    return build

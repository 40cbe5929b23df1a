"""The models people use: one small file per family, and the geometry of their visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from sightline.hosts.base import REGISTRY, Host, ViTHost, check, feature_layer, find, get, prefix, register
from sightline.hosts.towers import tower_positions

if TYPE_CHECKING:
    from sightline.hosts.geometry import Layout

__all__ = [
    "REGISTRY",
    "Host",
    "ViTHost",
    "check",
    "feature_layer",
    "find",
    "get",
    "layouts",
    "load_all",
    "prefix",
    "register",
    "tower_positions",
]


@cache
def load_all() -> None:
    """Import every host file of this folder, once, so that REGISTRY is complete. Imports no model code."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def layouts(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]],
    host: Host | ViTHost | None = None,
) -> list[Layout]:
    """Where the visual tokens of every picture of a batch lie.

    Args:
        model: the model the inputs are for (its configuration is read, never its weights).
        processor: what made the inputs; for timm its transform, its data configuration, or None (the model's own).
        inputs: outputs of the processor for the whole batch.
        sizes: (width, height) of every picture as it was given to the processor, row by row.
        host: facts of a family that is not registered.

    Returns:
        One Layout per picture, in order. For vision-language models their lengths add up to the image placeholders in
        `inputs["input_ids"]`; for plain vision transformers a layout lists the patches (no class token, no registers).

    Raises:
        HostError: the model is unknown, or its host has no geometry.
        InputError: the sizes do not belong to these inputs, or the processor was called with other settings than its own.
    """
    from sightline.hosts.checks import checked, require_layouts

    host = host or find(model)
    found = require_layouts(host)(processor, inputs, sizes, model) if len(sizes) else []
    return checked(found, host, model, inputs, sizes)

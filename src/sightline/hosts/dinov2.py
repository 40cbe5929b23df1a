"""DINOv2 without and with registers (transformers): class token, registers, then the patches of the centre square."""

from __future__ import annotations

from typing import Any

from sightline.hosts.base import ViTHost, register
from sightline.hosts.clip import layouts


def prefix(model: Any) -> int:
    """The class token and the registers."""
    return 1 + getattr(model.config, "num_register_tokens", 0)


FACTS = {"tower_layers": "encoder.layer", "tower_attention": "attention", "tower_prefix": prefix, "layouts": layouts}
DINOV2 = register(ViTHost("dinov2", ("Dinov2Model", "Dinov2WithRegistersModel"), **FACTS))
DINOV2_INSIDE = register(ViTHost("dinov2_inside", ("Dinov2ForImageClassification",), tower="dinov2", **FACTS))

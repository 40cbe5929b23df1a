"""The plain ViT of transformers (`models/vit`): class token, then the patches of the picture stretched to a square."""

from __future__ import annotations

from sightline.hosts.base import ViTHost, register
from sightline.hosts.clip import layouts

FACTS = {"tower_layers": "layers", "tower_attention": "attention", "tower_prefix": 1, "layouts": layouts}
VIT = register(ViTHost("vit", ("ViTModel",), **FACTS))
VIT_INSIDE = register(ViTHost("vit_inside", ("ViTForImageClassification",), tower="vit", **FACTS))

"""SigLIP's vision transformer (transformers): patches only, of the picture stretched to a square."""

from __future__ import annotations

from sightline.hosts.base import ViTHost, register
from sightline.hosts.clip import layouts

SIGLIP = register(ViTHost("siglip", ("SiglipVisionModel",), layouts=layouts))
SIGLIP_INSIDE = register(
    ViTHost("siglip_inside", ("SiglipModel", "SiglipForImageClassification"), tower="vision_model", layouts=layouts)
)

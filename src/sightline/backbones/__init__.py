"""Published vision backbones built on the mixers, one file per family. Importing this package registers them in timm.

import timm, sightline.backbones
net = timm.create_model("biformer_tiny")                       # or "biformer_t"
net.load_state_dict(torch.load("biformer_tiny_best.pth", weights_only=True)["model"])   # the published checkpoint, strictly
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from sightline.errors import MissingExtraError

if find_spec("timm") is None:
    raise MissingExtraError("backbones are timm models: install sightline[timm]")

from sightline.backbones.variants import VARIANTS, Variant, create, of_family, sized, variant

FAMILIES = ("biformer", "litv2", "flowformer", "moh_vit", "agent", "inline", "halonet", "others")

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")

__all__ = ["FAMILIES", "VARIANTS", "Variant", "create", "of_family", "sized", "variant"]

"""Systems that drop or merge visual tokens, before or inside the language model."""

from __future__ import annotations

from sightline.prune.flowcut import FlowCut
from sightline.prune.fopru import FoPru
from sightline.prune.hired import HiRED
from sightline.prune.random import Random
from sightline.prune.vtc_cls import VTCCLS

__all__ = ["VTCCLS", "FlowCut", "FoPru", "HiRED", "Random"]

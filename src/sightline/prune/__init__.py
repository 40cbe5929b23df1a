"""Systems that drop or merge visual tokens, before or inside the language model."""

from __future__ import annotations

from sightline.prune.dyvte import DyVTE
from sightline.prune.flowcut import FlowCut
from sightline.prune.fopru import FoPru
from sightline.prune.h2o import H2O
from sightline.prune.hired import HiRED
from sightline.prune.mustdrop import MustDrop
from sightline.prune.pyramiddrop import PyramidDrop
from sightline.prune.quota import QuoTA
from sightline.prune.random import Random
from sightline.prune.slow_fast import SlowFast
from sightline.prune.vtc_cls import VTCCLS
from sightline.prune.zipvl import ZipVL

__all__ = [
    "H2O",
    "VTCCLS",
    "DyVTE",
    "FlowCut",
    "FoPru",
    "HiRED",
    "MustDrop",
    "PyramidDrop",
    "QuoTA",
    "Random",
    "SlowFast",
    "ZipVL",
]

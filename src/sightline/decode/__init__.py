"""Systems that weigh next-token scores, mostly against those of a second stream."""

from __future__ import annotations

from sightline.decode.agla import AGLA
from sightline.decode.damro import DAMRO
from sightline.decode.lqcd import LQCD
from sightline.decode.vasparse import VASparse
from sightline.decode.vdgd import VDGD

__all__ = ["AGLA", "DAMRO", "LQCD", "VDGD", "VASparse"]

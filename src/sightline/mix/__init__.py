"""Operators that replace softmax attention: modules (B, *grid, C) -> (B, *grid, C), one file each."""

from __future__ import annotations

from sightline.mix.flowformer import Flow
from sightline.mix.fna import FNA
from sightline.mix.gna import GNA
from sightline.mix.inline import InLine

Neighborhood = GNA

__all__ = ["FNA", "GNA", "Flow", "InLine", "Neighborhood"]

"""Systems that edit attention or hidden states while the model answers."""

from __future__ import annotations

from sightline.steer.aki_mma import AKIMMA
from sightline.steer.cca import CCA
from sightline.steer.dual_stream_emphasis import DualStreamEmphasis
from sightline.steer.moh_llm import MoHLLM
from sightline.steer.var import VAR
from sightline.steer.vhr import VHR
from sightline.steer.vista import VISTA

__all__ = ["AKIMMA", "CCA", "VAR", "VHR", "VISTA", "DualStreamEmphasis", "MoHLLM"]

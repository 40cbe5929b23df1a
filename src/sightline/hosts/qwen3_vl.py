"""Qwen3-VL: as Qwen2-VL with patches of 16 pixels, and DeepStack.

transformers: `models/qwen3_vl`, `models/qwen3_vl_moe`. Features of `deepstack_visual_indexes` (three tower layers) are
added to the visual positions again after decoder layers 0, 1, 2: a system that drops tokens starts behind them.
"""

from __future__ import annotations

from dataclasses import replace

from sightline.hosts.base import register
from sightline.hosts.qwen_vl import QWEN2_VL

QWEN3_VL = register(
    replace(
        QWEN2_VL,
        name="qwen3_vl",
        classes=("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        deepstack="vision_config.deepstack_visual_indexes",
    )
)

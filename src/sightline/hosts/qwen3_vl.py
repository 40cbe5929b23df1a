"""Qwen3-VL: as Qwen2-VL with patches of 16 pixels, and DeepStack.

transformers: `models/qwen3_vl`, `models/qwen3_vl_moe`. Features of `deepstack_visual_indexes` (three tower layers) are
added to the visual positions again after decoder layers 0, 1, 2: a system that drops tokens starts behind them.
"""

from __future__ import annotations

from sightline.hosts.base import Host, register
from sightline.hosts.qwen_vl import frame_counts, frame_layouts, layouts, packed_order
from sightline.hosts.views import packed_video_views, packed_views

QWEN3_VL = register(
    Host(
        "qwen3_vl",
        ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        tower="model.visual",
        tower_layers="blocks",
        tower_attention="attn",
        projector="model.visual.merger",
        layouts=layouts,
        video=True,
        video_token="video_token_id",
        frame_counts=frame_counts,
        frame_layouts=frame_layouts,
        tower_order=packed_order,
        views=packed_views,
        video_views=packed_video_views,
        merged=True,
        deepstack="vision_config.deepstack_visual_indexes",
    )
)

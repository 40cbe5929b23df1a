"""Explain what a model attends to, and reproduce the analysis of the visual attention sink paper on any host.

>>> from sightline import explain
>>> seen = explain.sink_map(lvlm, [picture], ["Is there a dog?"])[0]
>>> seen.sinks.sum(1)                                   # visual sinks per layer

Each function takes a loaded model (`sightline.load`), pictures and questions. `sightline study var` runs them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sightline.explain.ablation import Redirect, ablations, variants
    from sightline.explain.causes import (
        Cause,
        Corpus,
        Phrase,
        caption_causes,
        file_corpus,
        hallucination_causes,
        world_corpus,
        wrong_phrases,
    )
    from sightline.explain.concentric import InformationFlow, Reversed, SpatialProbe, information_flow, spatial_probe
    from sightline.explain.divergence import HeadDivergence, token_divergence, vision_heads
    from sightline.explain.heads import image_heads
    from sightline.explain.maps import background, object_share, text_to_image
    from sightline.explain.masking import MaskTokens, mask_sinks
    from sightline.explain.observing import observe
    from sightline.explain.questions import Item, held_out
    from sightline.explain.ranks import base_ranks, token_ranks
    from sightline.explain.sinks import find_sink_dims, sink_map
    from sightline.explain.study import study_var
    from sightline.explain.weighing import contribution

_NAMES = {
    "ablations": "ablation",
    "Redirect": "ablation",
    "variants": "ablation",
    "contribution": "weighing",
    "Cause": "causes",
    "Corpus": "causes",
    "Phrase": "causes",
    "caption_causes": "causes",
    "file_corpus": "causes",
    "hallucination_causes": "causes",
    "world_corpus": "causes",
    "wrong_phrases": "causes",
    "InformationFlow": "concentric",
    "Reversed": "concentric",
    "SpatialProbe": "concentric",
    "information_flow": "concentric",
    "spatial_probe": "concentric",
    "HeadDivergence": "divergence",
    "token_divergence": "divergence",
    "vision_heads": "divergence",
    "base_ranks": "ranks",
    "token_ranks": "ranks",
    "image_heads": "heads",
    "background": "maps",
    "object_share": "maps",
    "text_to_image": "maps",
    "MaskTokens": "masking",
    "mask_sinks": "masking",
    "observe": "observing",
    "Item": "questions",
    "held_out": "questions",
    "find_sink_dims": "sinks",
    "sink_map": "sinks",
    "study_var": "study",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'sightline.explain' has no attribute {name!r}")
    return getattr(import_module(f"sightline.explain.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Tiny random vision transformers: transformers' CLIP, SigLIP and DINOv2, and timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as tf
from PIL import Image

from tests.tiny_parts import randomize, seeded, tower_config


@dataclass
class TinyViT:
    """A tiny plain vision transformer with the processor of its family (None: timm, see `inputs`)."""

    name: str
    model: Any
    processor: Any
    size: int

    def inputs(self, images: list[Image.Image]) -> Any:
        """Model inputs for a batch: a BatchFeature, or for timm a tensor (B, 3, H, W)."""
        if self.processor is None:
            from timm.data import create_transform, resolve_data_config

            transform = create_transform(**resolve_data_config({}, model=self.model))
            return torch.stack([transform(image) for image in images])
        return self.processor(images=images, return_tensors="pt")


@seeded
def clip_vit() -> TinyViT:
    model = tf.CLIPVisionModel(tower_config(tf.CLIPVisionConfig, 48))
    return vit("clip", model, tf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}))


@seeded
def siglip_vit() -> TinyViT:
    model = tf.SiglipVisionModel(tower_config(tf.SiglipVisionConfig, 48))
    return vit("siglip", model, tf.SiglipImageProcessor(size={"height": 48, "width": 48}))


@seeded
def plain_vit() -> TinyViT:
    model = tf.ViTModel(tower_config(tf.ViTConfig, 48), add_pooling_layer=False)
    return vit("vit", model, tf.ViTImageProcessor(size={"height": 48, "width": 48}))


@seeded
def dinov2_vit(registers: int = 0) -> TinyViT:
    kinds = (
        (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel) if registers else (tf.Dinov2Config, tf.Dinov2Model)
    )
    extra = {"num_register_tokens": registers} if registers else {}
    config = tower_config(kinds[0], 48, mlp_ratio=2, **extra)
    processor = tf.BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    return vit("dinov2_registers" if registers else "dinov2", kinds[1](config), processor)


@seeded
def timm_vit(registers: int = 0) -> TinyViT:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, reg_tokens=registers
    )
    model.pretrained_cfg = {"input_size": (3, 48, 48), "crop_pct": 0.875, "interpolation": "bicubic"}
    return vit("timm_registers" if registers else "timm", model, None)


def vit(name: str, model: Any, processor: Any, size: int = 48) -> TinyViT:
    randomize(model, 0)
    return TinyViT(name, model.eval(), processor, size)


TINY_VITS: dict[str, Callable[[], TinyViT]] = {
    "clip": clip_vit,
    "siglip": siglip_vit,
    "vit": plain_vit,
    "dinov2": dinov2_vit,
    "dinov2_registers": partial(dinov2_vit, registers=2),
    "timm": timm_vit,
    "timm_registers": partial(timm_vit, registers=4),
}

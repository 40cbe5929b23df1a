"""Tiny random models of every host family, each with a real processor of its class; no network, no files.

`TINY[name]()` builds a seeded `TinyHost` in well under a second; `TINY_VITS[name]()` builds a plain vision transformer.
Weights are drawn with unit gain (not the default 0.02), so that attention is peaked and answers depend on the picture.
No end-of-text id is set, so `generate` always makes `max_new_tokens`; special tokens are never generated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as tf
from transformers.models.smolvlm import processing_smolvlm

from tests.tiny_parts import TinyHost, chat_template, finish, make_tokenizer, picture, seeded, text_config, tower_config
from tests.tiny_vits import TINY_VITS, TinyViT

__all__ = ["TINY", "TINY_VITS", "TinyHost", "TinyViT", "picture"]


@seeded
def llava() -> TinyHost:
    """CLIP tower with CLS, 48 pixels in patches of 8: 6 x 6 tokens; Llama decoder without grouped heads."""
    tokenizer = make_tokenizer({"image_token": "<image>"})
    config = tf.LlavaConfig(
        vision_config=tower_config(tf.CLIPVisionConfig, 48, layers=4),
        text_config=text_config(tf.LlamaConfig, tokenizer, num_key_value_heads=4),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=36,
    )
    processor = tf.LlavaProcessor(
        tf.LlavaImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return finish("llava", tf.LlavaForConditionalGeneration(config), processor)


@seeded
def llava_next() -> TinyHost:
    """CLIP tower, crops of 32 pixels in patches of 8; 16 base tokens and up to 64 + 8 of the crops; Mistral decoder."""
    tokenizer = make_tokenizer({"image_token": "<image>"})
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = tf.LlavaNextConfig(
        vision_config=tower_config(tf.CLIPVisionConfig, 32, layers=4),
        text_config=text_config(tf.MistralConfig, tokenizer, sliding_window=None),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
    )
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return finish("llava_next", tf.LlavaNextForConditionalGeneration(config), processor)


@seeded
def llava_onevision() -> TinyHost:
    """SigLIP tower without CLS, crops of 36 pixels (4 unseen), up to 3 x 3, at most 4 crops' worth of tokens; Qwen2."""
    tokenizer = make_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    pinpoints = [[36 * r, 36 * c] for r in (1, 2, 3) for c in (1, 2, 3)]
    config = tf.LlavaOnevisionConfig(
        vision_config=tower_config(tf.SiglipVisionConfig, 36, vision_use_head=False),
        text_config=text_config(tf.Qwen2Config, tokenizer),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )
    size = {"height": 36, "width": 36}
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=chat_template("<image>", "<video>"),
    )
    model = tf.LlavaOnevisionForConditionalGeneration(config)
    return finish("llava_onevision", model, processor, nested=True)


QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
FILM_SIZE = {"shortest_edge": 4 * 256, "longest_edge": 48 * 256}


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}


@seeded
def qwen2_vl() -> TinyHost:
    """Qwen2-VL: like Qwen2.5-VL with full attention in every tower layer."""
    tokenizer = make_tokenizer(QWEN_TOKENS)
    config = tf.Qwen2VLConfig(
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=8, spatial_merge_size=2
        ),
        text_config=text_config(
            tf.Qwen2VLTextConfig, tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}
        ).to_dict(),
        **qwen_ids(tokenizer),
    )
    processor = tf.Qwen2VLProcessor(
        tf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 4 * 256, "longest_edge": 24 * 256}),
        tokenizer,
        tf.Qwen2VLVideoProcessor(patch_size=8, size=FILM_SIZE),
        chat_template=chat_template(QWEN_PLACEHOLDER, QWEN_VIDEO),
    )
    model = tf.Qwen2VLForConditionalGeneration(config)
    return finish("qwen2_vl", model, processor, placeholder=QWEN_PLACEHOLDER)


@seeded
def qwen2_5_vl() -> TinyHost:
    """Patches of 8 merged 2 x 2, 4 to 24 tokens; windows of 2 x 2 tokens in tower layer 0, none in layer 1."""
    tokenizer = make_tokenizer(QWEN_TOKENS)
    config = tf.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=32,
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
        text_config=text_config(
            tf.Qwen2_5_VLTextConfig, tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}
        ).to_dict(),
        **qwen_ids(tokenizer),
    )
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 4 * 256, "longest_edge": 24 * 256}),
        tokenizer,
        tf.Qwen2VLVideoProcessor(patch_size=8, size=FILM_SIZE),
        chat_template=chat_template(QWEN_PLACEHOLDER, QWEN_VIDEO),
    )
    model = tf.Qwen2_5_VLForConditionalGeneration(config)
    return finish("qwen2_5_vl", model, processor, placeholder=QWEN_PLACEHOLDER)


@seeded
def qwen3_vl() -> TinyHost:
    """Patches of 8 merged 2 x 2, 4 to 24 tokens; DeepStack from tower layers 0 and 1 into decoder layers 0 and 1."""
    tokenizer = make_tokenizer(QWEN_TOKENS)
    config = tf.Qwen3VLConfig(
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=32,
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config=text_config(
            tf.Qwen3VLTextConfig,
            tokenizer,
            head_dim=8,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        ).to_dict(),
        **qwen_ids(tokenizer),
    )
    processor = tf.Qwen3VLProcessor(
        tf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 4 * 256, "longest_edge": 24 * 256}),
        tokenizer,
        tf.Qwen3VLVideoProcessor(patch_size=8, size=FILM_SIZE),
        chat_template=chat_template(QWEN_PLACEHOLDER, QWEN_VIDEO),
    )
    model = tf.Qwen3VLForConditionalGeneration(config)
    return finish("qwen3_vl", model, processor, placeholder=QWEN_PLACEHOLDER)


@seeded
def internvl() -> TinyHost:
    """InternViT with CLS, tiles of 48 pixels: 6 x 6 patches, shuffled to 3 x 3 tokens; up to 6 tiles + thumbnail."""
    tokenizer = make_tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    config = tf.InternVLConfig(
        vision_config=tower_config(tf.InternVLVisionConfig, 48),
        text_config=text_config(tf.Qwen2Config, tokenizer),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    size = {"height": 48, "width": 48}
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer,
        tf.InternVLVideoProcessor(size=size),
        image_seq_length=9,
        chat_template=chat_template("<IMG_CONTEXT>", "<video>"),
    )
    model = tf.InternVLForConditionalGeneration(config)
    return finish("internvl", model, processor, placeholder="<IMG_CONTEXT>")


IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
IDEFICS_TILES = tuple(f"<row_{r + 1}_col_{c + 1}>" for r in range(3) for c in range(3))


@seeded
def idefics3() -> TinyHost:
    """SigLIP-like tower, tiles of 48 pixels, 6 x 6 patches shuffled to 3 x 3 tokens; up to 2 x 2 tiles + the whole."""
    tokenizer = make_tokenizer(IDEFICS_TOKENS, IDEFICS_TILES)
    config = tf.Idefics3Config(
        vision_config=tower_config(tf.Idefics3VisionConfig, 48),
        text_config=text_config(tf.LlamaConfig, tokenizer),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 48}),
        tokenizer,
        image_seq_len=9,
        chat_template=chat_template("<image>"),
    )
    return finish("idefics3", tf.Idefics3ForConditionalGeneration(config), processor, nested=True)


@seeded
def smolvlm() -> TinyHost:
    """Tiles of 48 pixels, 6 x 6 patches shuffled by 3 to 2 x 2 tokens; up to 3 x 3 tiles and the whole."""
    tokenizer = make_tokenizer({**IDEFICS_TOKENS, "video_token": "<video>"}, IDEFICS_TILES)
    config = tf.SmolVLMConfig(
        vision_config=tower_config(tf.SmolVLMVisionConfig, 48),
        text_config=text_config(tf.LlamaConfig, tokenizer),
        image_token_id=tokenizer.image_token_id,
        scale_factor=3,
        pad_token_id=tokenizer.pad_token_id,
    )
    size = {"size": {"longest_edge": 144}, "max_image_size": {"longest_edge": 48}}
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # an optional package, used for videos only
    processor = tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(**size),
        tokenizer,
        tf.SmolVLMVideoProcessor(**size),
        image_seq_len=4,
        chat_template=chat_template("<image>", "<video>"),
    )
    return finish("smolvlm", tf.SmolVLMForConditionalGeneration(config), processor, nested=True)


@seeded
def gemma3(pan_and_scan: bool = False) -> TinyHost:
    """SigLIP tower, 6 x 6 patches pooled to 3 x 3 tokens; sliding layers of window 16 alternate with full ones."""
    tokenizer = make_tokenizer(
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    )
    config = tf.Gemma3Config(
        vision_config=tower_config(tf.SiglipVisionConfig, 48, vision_use_head=False),
        text_config=text_config(
            tf.Gemma3TextConfig,
            tokenizer,
            head_dim=8,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            tie_word_embeddings=False,  # tied random embeddings only repeat the last token
        ),
        tie_word_embeddings=False,
        mm_tokens_per_image=9,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size={"height": 48, "width": 48}),
        tokenizer,
        image_seq_length=9,
        chat_template=chat_template("<start_of_image>"),
    )
    processor.images_kwargs = processor.images_kwargs | {
        "do_pan_and_scan": pan_and_scan,
        "pan_and_scan_min_crop_size": 24,
    }
    model = tf.Gemma3ForConditionalGeneration(config)
    std = 32**-0.5  # Gemma multiplies embeddings by sqrt(width)
    return finish("gemma3", model, processor, std, placeholder="<start_of_image>", nested=True)


TINY: dict[str, Callable[[], TinyHost]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "gemma3_pan_and_scan": partial(gemma3, pan_and_scan=True),
}

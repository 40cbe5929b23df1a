"""Tiny random models of every host family, each with a real processor of its class; no network, no files.

`TINY[name]()` builds a seeded `TinyHost` in well under a second; `TINY_VITS[name]()` builds a plain vision transformer.
Weights are drawn with unit gain (not the default 0.02), so that attention is peaked and answers depend on the picture.
No end-of-text id is set, so `generate` always makes `max_new_tokens`; special tokens are never generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import transformers as tf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.smolvlm import processing_smolvlm

CORPUS = (
    "Is there a dog in the image? Yes, there is a cat. No, there is not a cup.",
    "How many red cups are on the table? There are two red cups and one blue ball.",
    "Describe the picture. What colour is the small square? USER: ASSISTANT: The square is green.",
)
BASE_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


@lru_cache
def tokenizer_json(specials: tuple[str, ...]) -> str:
    """A byte-level BPE of about 350 entries; every text can be written and read back."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(specials) + len(alphabet) + 80
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(named: dict[str, str], others: tuple[str, ...] = ()) -> tf.PreTrainedTokenizerFast:
    """A fast tokenizer; `named` become attributes: {"image_token": "<image>"} gives `.image_token`, `.image_token_id`."""
    specials = tuple(dict.fromkeys((*BASE_TOKENS, *named.values(), *others)))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(specials)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(others),
        model_specific_special_tokens=named,
        padding_side="left",
    )


def chat_template(image: str) -> str:
    """A minimal chat template that writes `image` for every picture."""
    return (
        "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A picture with coloured boxes on grey noise; the same for the same arguments."""
    rng = random.Random(seed * 7919 + width * 31 + height)
    image = Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = rng.randrange(width), rng.randrange(height)
        colour = tuple(rng.randrange(256) for _ in range(3))
        draw.rectangle((x, y, x + width // 3, y + height // 3), fill=colour)
    return image


@dataclass
class TinyHost:
    """A tiny vision-language model with its processor."""

    name: str
    model: Any
    processor: Any
    placeholder: str = "<image>"  # what a prompt holds for one picture
    nested: bool = False  # the processor wants one list of pictures per row
    generate_kwargs: dict[str, Any] = field(default_factory=dict)

    def inputs(
        self, questions: list[str], images: list[list[Image.Image]] | None = None, padding_side: str = "left"
    ) -> tf.BatchFeature:
        """Model inputs for a batch: each question may have 0, 1, 2, ... pictures."""
        rows = images if images is not None else [[] for _ in questions]
        prompts = [f"USER: {self.placeholder * len(r)}{q} ASSISTANT:" for q, r in zip(questions, rows, strict=True)]
        flat = [image for row in rows for image in row]
        pictures = (rows if self.nested else flat) if flat else None
        self.processor.tokenizer.padding_side = padding_side
        return self.processor(
            images=pictures,
            text=prompts,
            return_tensors="pt",
            text_kwargs={"padding": True, "padding_side": padding_side},
        )


def randomize(model: torch.nn.Module, seed: int, embedding_std: float = 1.0) -> None:
    """Draw all matrices again with gain one: N(0, 1/fan_in); token embeddings N(0, embedding_std)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        transposed = name.endswith("mm_input_projection_weight")  # Gemma3 stores (in, out), and starts with zeros
        fan_in = p.shape[0] if transposed else p[0].numel()
        std = embedding_std if name.endswith("embed_tokens.weight") else fan_in**-0.5
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def finish(name: str, model: Any, processor: Any, embedding_std: float = 1.0, **kwargs: Any) -> TinyHost:
    """Seed the weights, set eval mode and a greedy generation config without specials and without an end."""
    randomize(model, 0, embedding_std)
    tokenizer = processor.tokenizer
    config = model.generation_config
    config.update(do_sample=False, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    config.eos_token_id = None
    config.suppress_tokens = sorted(tokenizer.all_special_ids)
    return TinyHost(name, model.eval(), processor, **kwargs)


def text_config(cls: type, tokenizer: Any, layers: int = 4, **kwargs: Any) -> Any:
    """A decoder of 4 heads over 2 key-value heads, width 32."""
    defaults = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return cls(**(defaults | kwargs))


def tower_config(cls: type, image: int, patch: int = 8, layers: int = 2, **kwargs: Any) -> Any:
    """A vision tower of 4 heads, width 32."""
    defaults = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
    )
    return cls(**(defaults | kwargs))


def llava() -> TinyHost:
    """CLIP tower with CLS, 48 pixels in patches of 8: 6 x 6 tokens; Llama decoder without grouped heads."""
    tokenizer = make_tokenizer({"image_token": "<image>"})
    config = tf.LlavaConfig(
        vision_config=tower_config(tf.CLIPVisionConfig, 48),
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


def llava_next() -> TinyHost:
    """CLIP tower, crops of 32 pixels in patches of 8; 16 base tokens and up to 64 + 8 of the crops; Mistral decoder."""
    tokenizer = make_tokenizer({"image_token": "<image>"})
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = tf.LlavaNextConfig(
        vision_config=tower_config(tf.CLIPVisionConfig, 32),
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


def llava_onevision() -> TinyHost:
    """SigLIP tower without CLS, crops of 32 pixels, up to 3 x 3 crops but at most 4 crops' worth of tokens; Qwen2."""
    tokenizer = make_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    pinpoints = [[32 * r, 32 * c] for r in (1, 2, 3) for c in (1, 2, 3)]
    config = tf.LlavaOnevisionConfig(
        vision_config=tower_config(tf.SiglipVisionConfig, 32, vision_use_head=False),
        text_config=text_config(tf.Qwen2Config, tokenizer),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )
    size = {"height": 32, "width": 32}
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=chat_template("<image>"),
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


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}


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
        tf.Qwen2VLVideoProcessor(patch_size=8),
        chat_template=chat_template(QWEN_PLACEHOLDER),
    )
    model = tf.Qwen2VLForConditionalGeneration(config)
    return finish("qwen2_vl", model, processor, placeholder=QWEN_PLACEHOLDER)


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
        tf.Qwen2VLVideoProcessor(patch_size=8),
        chat_template=chat_template(QWEN_PLACEHOLDER),
    )
    model = tf.Qwen2_5_VLForConditionalGeneration(config)
    return finish("qwen2_5_vl", model, processor, placeholder=QWEN_PLACEHOLDER)


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
        tf.Qwen3VLVideoProcessor(patch_size=8),
        chat_template=chat_template(QWEN_PLACEHOLDER),
    )
    model = tf.Qwen3VLForConditionalGeneration(config)
    return finish("qwen3_vl", model, processor, placeholder=QWEN_PLACEHOLDER)


def internvl() -> TinyHost:
    """InternViT with CLS, tiles of 48 pixels: 6 x 6 patches, shuffled to 3 x 3 tokens; up to 6 tiles and a thumbnail."""
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
        chat_template=chat_template("<IMG_CONTEXT>"),
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
        chat_template=chat_template("<image>"),
    )
    return finish("smolvlm", tf.SmolVLMForConditionalGeneration(config), processor, nested=True)


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


def clip_vit() -> TinyViT:
    model = tf.CLIPVisionModel(tower_config(tf.CLIPVisionConfig, 48))
    return vit("clip", model, tf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}))


def siglip_vit() -> TinyViT:
    model = tf.SiglipVisionModel(tower_config(tf.SiglipVisionConfig, 48))
    return vit("siglip", model, tf.SiglipImageProcessor(size={"height": 48, "width": 48}))


def dinov2_vit(registers: int = 0) -> TinyViT:
    kinds = (
        (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel) if registers else (tf.Dinov2Config, tf.Dinov2Model)
    )
    extra = {"num_register_tokens": registers} if registers else {}
    config = tower_config(kinds[0], 48, mlp_ratio=2, **extra)
    processor = tf.BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    return vit("dinov2_registers" if registers else "dinov2", kinds[1](config), processor)


def timm_vit(registers: int = 0) -> TinyViT:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
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
    "dinov2": dinov2_vit,
    "dinov2_registers": partial(dinov2_vit, registers=2),
    "timm": timm_vit,
    "timm_registers": partial(timm_vit, registers=4),
}

"""Geometry under the released configurations' numbers (no weights): real processors at their real sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from sightline import hosts
from sightline.hosts.geometry import Layout
from tests.tiny_hosts import TINY, picture

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_336 = tf.CLIPVisionConfig(image_size=336, patch_size=14, **SMALL)
SIGLIP_384 = tf.SiglipVisionConfig(image_size=384, patch_size=14, vision_use_head=False, **SMALL)
SIGLIP_896 = tf.SiglipVisionConfig(image_size=896, patch_size=14, vision_use_head=False, **SMALL)
QWEN_VISION = {"depth": 1, "hidden_size": 8, "num_heads": 2}


def released(name: str) -> tuple[Any, Any]:
    """(processor, configuration) of a family with the sizes of its released checkpoints."""
    tokenizer = TINY[name]().processor.tokenizer
    config = TINY[name]().model.config
    if name == "llava":
        pictures = tf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        config.vision_config = CLIP_336
        extra = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return tf.LlavaProcessor(pictures, tokenizer, patch_size=14, **extra), config
    if name == "llava_next":
        pictures = tf.LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        config.vision_config, config.image_grid_pinpoints = CLIP_336, pictures.image_grid_pinpoints
        extra = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return tf.LlavaNextProcessor(pictures, tokenizer, patch_size=14, **extra), config
    if name == "llava_onevision":
        pictures, video = tf.LlavaOnevisionImageProcessor(), tf.LlavaOnevisionVideoProcessor()
        config.vision_config, config.image_grid_pinpoints = SIGLIP_384, pictures.image_grid_pinpoints
        extra = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}
        return tf.LlavaOnevisionProcessor(pictures, tokenizer, video, **extra), config
    if name.startswith("qwen"):
        patch = 16 if name == "qwen3_vl" else 14
        pictures = tf.Qwen2VLImageProcessor(
            patch_size=patch, size={"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 16384 * (2 * patch) ** 2}
        )
        config.vision_config.patch_size = patch
        return type(TINY[name]().processor)(pictures, tokenizer, TINY[name]().processor.video_processor), config
    if name == "internvl":
        pictures = tf.GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)
        config.vision_config = tf.InternVLVisionConfig(image_size=448, patch_size=14, **SMALL)
        return tf.InternVLProcessor(pictures, tokenizer, tf.InternVLVideoProcessor(), image_seq_length=256), config
    if name == "idefics3":
        config.vision_config = tf.Idefics3VisionConfig(image_size=364, patch_size=14, **SMALL)
        return tf.Idefics3Processor(tf.Idefics3ImageProcessor(), tokenizer, image_seq_len=169), config
    if name == "smolvlm":
        pictures = tf.SmolVLMImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
        config.vision_config, config.scale_factor = tf.SmolVLMVisionConfig(image_size=512, patch_size=16, **SMALL), 4
        return tf.SmolVLMProcessor(pictures, tokenizer, tf.SmolVLMVideoProcessor(), image_seq_len=64), config
    config.vision_config, config.mm_tokens_per_image = SIGLIP_896, 256
    pictures = tf.Gemma3ImageProcessor(size={"height": 896, "width": 896})
    return tf.Gemma3Processor(pictures, tokenizer, image_seq_length=256), config


@lru_cache
def placed(name: str, width: int, height: int, **said: Any) -> Layout:
    """The layout of one picture; `hosts.layouts` also counts it against the processor's placeholders."""
    processor, config = released(name)
    with torch.device("meta"):
        model = type(TINY[name]().model)(config)
    tiny = TINY[name]()
    inputs = processor(
        images=[[picture(width, height)]], text=[tiny.placeholder], return_tensors="pt", images_kwargs=said
    )
    (layout,) = hosts.layouts(model, processor, inputs, [(width, height)])
    return layout


def test_llava_1_5() -> None:
    layout = placed("llava", 1000, 700)
    assert len(layout) == 576
    assert layout.grids == ((24, 24),)
    edge = 14 * 700 / 336  # 480 x 336, of which the middle 336 columns
    assert layout.boxes[0] == pytest.approx([150, 0, 150 + edge, edge])
    assert layout.boxes[-1] == pytest.approx([850 - edge, 700 - edge, 850, 700])
    assert layout.token_at(149, 10) == -1


def test_llava_next_five_crops() -> None:
    layout = placed("llava_next", 1000, 700)
    assert layout.grids == ((24, 24),) * 5  # the whole and 2 x 2 tiles: 672 x 672 wastes least
    # 672 x 471 pixels in the middle of 672 rows; 34 of 48 rows of patches stay, each with a newline
    assert len(layout) == 576 + 34 * (48 + 1)
    assert (layout.crop == -1).sum() == 34
    assert layout.crop[576 + 48] == -1
    assert layout.crop[576] == 1
    assert layout.cell[576].tolist() == [7, 0]
    pad = (672 - 471) // 2
    scale = 700 / 471
    assert layout.boxes[576] == pytest.approx(
        [0, (7 * 14 - pad) * scale, 14 * 1000 / 672, (8 * 14 - pad) * scale], abs=1e-3
    )
    assert layout.boxes[576, 1] < 0  # half of the first row looks at padding
    assert layout.visible_boxes()[576, 1] == 0


def test_llava_onevision() -> None:
    layout = placed("llava_onevision", 1000, 700)
    assert layout.grids == ((27, 27),) * 7  # 2 x 3 tiles
    assert len(layout) == 729 + 54 * (77 + 1)
    assert layout.boxes[728] == pytest.approx(  # the last 6 of 384 pixels are seen by no patch
        [26 * 14 * 1000 / 384, 26 * 14 * 700 / 384, 378 * 1000 / 384, 378 * 700 / 384], abs=1e-3
    )
    assert layout.token_at(999.5, 699.5, crop=0) == -1
    tile = layout.boxes[(layout.crop == 2) & (layout.cell[:, 1] == 0)]  # the second tile begins at its own first pixel
    scale, left = 700 / 768, (1152 - 1098) // 2
    assert tile[0, 0] == pytest.approx((384 - left) * 1000 / 1098, abs=1e-3)
    assert tile[0, 1] == pytest.approx(0)
    assert tile[0, 3] == pytest.approx(14 * scale, abs=1e-3)


def test_llava_onevision_shrinks_above_nine_tiles() -> None:
    layout = placed("llava_onevision", 2300, 2300)
    assert layout.grids == ((27, 27), (81, 81))
    assert layout.patch_grids == ((27, 27), (162, 162))
    assert len(layout) == 729 + 81 * 82
    assert {len(p) for p in layout.patches} == {0, 1, 4}  # a sample between four patches
    assert layout.patches[729] == (0, 1, 162, 163)
    scale = 2300 / 2304
    assert layout.boxes[730] == pytest.approx([28 * scale, 0, 56 * scale, 28 * scale], abs=1e-3)
    inner = layout.boxes[(layout.crop == 1) & (layout.cell[:, 0] == 40)]  # cells divide the width without gaps
    assert inner[1:, 0] == pytest.approx(inner[:-1, 2])
    assert inner[-1, 2] == pytest.approx((5 * 384 + 378) * scale, abs=1e-3)


def test_llava_onevision_shrinks_by_uneven_steps() -> None:
    layout = placed("llava_onevision", 1900, 1500)
    rows, columns = layout.grids[1]
    assert (rows, columns) == (71, 91)  # 106 x 135 patches of 4 x 5 tiles, shrunk by 1.4768
    at = np.arange(1, columns + 1) * 135 / 91  # in patches
    edge = at.astype(int) // 27 * 384 + (at.astype(int) % 27 + at % 1) * 14  # in pixels of the tiles side by side
    edge[-1] = 4 * 384 + 378
    assert layout.boxes[729 : 729 + columns, 2] == pytest.approx(edge * 1900 / 1920, abs=1e-2)
    assert layout.boxes[729, 1] == pytest.approx((14 - (1536 - 1516) // 2) * 1500 / 1516, abs=1e-2)


@pytest.mark.parametrize(("name", "grid"), [("qwen2_vl", (25, 36)), ("qwen2_5_vl", (25, 36)), ("qwen3_vl", (22, 31))])
def test_qwen(name: str, grid: tuple[int, int]) -> None:
    layout = placed(name, 1000, 700)
    assert layout.grids == (grid,)
    assert layout.patch_grids == ((2 * grid[0], 2 * grid[1]),)
    assert layout.boxes[-1] == pytest.approx([1000 - 1000 / grid[1], 700 - 700 / grid[0], 1000, 700], abs=1e-3)
    assert layout.patches[1] == (2, 3, 2 * grid[1] + 2, 2 * grid[1] + 3)


def test_internvl_tiles_and_thumbnail() -> None:
    layout = placed("internvl", 1000, 700)
    assert len(layout) == 7 * 256  # 3 x 2 tiles
    assert layout.base == 6
    assert layout.boxes[6 * 256] == pytest.approx([0, 0, 1000 / 16, 700 / 16])
    assert layout.boxes[256] == pytest.approx([1000 / 3, 0, 1000 / 3 + 1000 / 48, 700 / 32], abs=1e-3)
    assert len(placed("internvl", 448, 448)) == 256


def test_idefics3() -> None:
    layout = placed("idefics3", 1000, 700)
    assert len(layout) == (3 * 4 + 1) * 169  # 1456 x 1020 stretched to 1456 x 1092
    assert layout.base == 12
    assert layout.boxes[0] == pytest.approx([0, 0, 1000 / 52, 700 / 39], abs=1e-3)


def test_smolvlm() -> None:
    layout = placed("smolvlm", 1000, 700)
    assert len(layout) == (3 * 4 + 1) * 64
    assert {len(p) for p in layout.patches} == {16}


def test_gemma3() -> None:
    layout = placed("gemma3", 1000, 700)
    assert len(layout) == 256
    assert layout.patch_grids == ((64, 64),)
    assert layout.patches[0] == tuple(64 * i + j for i in range(4) for j in range(4))
    scanned = placed("gemma3", 1001, 700, do_pan_and_scan=True)
    assert len(scanned) == 3 * 256  # crops of 501 and 500 pixels
    assert scanned.boxes[512] == pytest.approx([501, 0, 501 + 500 / 16, 700 / 16], abs=1e-3)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "gemma3"])
def test_heatmap_of_a_photo_takes_little_time(name: str) -> None:
    from time import process_time

    layout = placed(name, 1000, 700)
    values = np.random.default_rng(0).random(len(layout))
    start = process_time()
    assert layout.heatmap(values).shape == (700, 1000)
    assert process_time() - start < 1.0  # 0.01 to 0.06 s on one core

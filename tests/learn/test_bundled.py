"""The bundled checkpoint: loads like any other, is small, and is what its card says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import sightline
from sightline import scenes
from sightline.learn import evaluate

FOLDER = Path(sightline.__file__).parent / "models" / "tiny-llava"


@pytest.fixture(scope="module")
def bundled():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(FOLDER)


def test_it_is_a_small_llava(bundled):
    model, processor = bundled
    assert model.config.model_type == "llava"
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert 8e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25e6
    assert processor.image_processor.crop_size["height"] == 112
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_it_answers_yes_or_no_and_in_sentences(bundled):
    model, processor = bundled
    held = [scenes.draw(seed) for seed in scenes.seeds("test", 4)]
    pictures = [scene.image for scene in held]
    replies = evaluate.answer(model, processor, pictures, ["Is there a dog in the image?"] * 4, most=6)
    assert set(replies) <= {"Yes.", "No."}
    told = evaluate.answer(model, processor, pictures[:1], [evaluate.CAPTION_PROMPT])[0]
    assert told.endswith(".")
    assert scenes.mentions(told)

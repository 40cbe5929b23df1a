"""A toy LLaVA (60 thousand parameters) and its processor, made once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.learn import build, phrasing
from sightline.learn.data import scene_of
from sightline.learn.recipe import TOY


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_processor():
    documents = (phrasing.document(*scene_of("tokenizer", k, TOY.seed, 56)) for k in range(20))
    text = build.tokenizer(documents, TOY.shape.vocabulary)
    return build.processor(text, TOY.shape)


@pytest.fixture
def toy(toy_processor):
    return build.model(TOY.shape, toy_processor.tokenizer, 0).eval()


@pytest.fixture(scope="session")
def toy_folder(toy_processor, tmp_path_factory):
    """A saved toy checkpoint."""
    folder = tmp_path_factory.mktemp("toy")
    build.model(TOY.shape, toy_processor.tokenizer, 0).save_pretrained(folder)
    toy_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """(path of a LLaVA-format JSON, folder of its pictures): three records with a picture, one without."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for k, size in enumerate([(56, 56), (80, 40), (30, 90)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        turns = [("human", "<image>\nIs there a dog in the image?"), ("gpt", "Yes."),
                 ("human", "What colour is the dog?"), ("gpt", "Red.")][: 4 if k else 2]  # fmt: skip
        rows.append({"id": str(k), "image": f"{k}.png",
                     "conversations": [{"from": f, "value": v} for f, v in turns]})  # fmt: skip
    rows.append(
        {"id": "text", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]}
    )
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path, folder

"""Stage 0c: the projector learns to name what the tower sees, patch by patch, before any sentence.

A patch of a red dog is sent near the sum of the word embeddings of "dog" and "red", background near the word of the
place. No decoder runs, so it costs next to nothing, and stage 1 starts with visual tokens the decoder can half read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sightline.learn.data import scene_of, stream
from sightline.learn.instruct import freeze
from sightline.learn.loop import Trainer
from sightline.learn.recipe import Recipe
from sightline.learn.tower import COLOURS, CONTEXTS, KINDS, collate, labels_of, normalise


def words(names: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The tokens of each name as it stands inside a sentence."""
    return [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]


def meaning(ids: list[list[int]], table: torch.Tensor) -> torch.Tensor:
    """(n, D) the mean embedding of each word's tokens; `table` is (V, D)."""
    return torch.stack([table[torch.tensor(word, device=table.device)].mean(0) for word in ids])


def sample(index: int, recipe: Recipe) -> dict[str, np.ndarray]:
    """Pixels (S, S, 3) uint8 and the patch labels of one scene."""
    scene, _ = scene_of("name", index, recipe.seed, recipe.shape.image)
    return {"pixels": np.asarray(scene.image), **labels_of(scene, recipe.shape.patch)}


def loss_of(batch: dict[str, torch.Tensor], model: LlavaForConditionalGeneration,
            vocabulary: dict[str, list[list[int]]]) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """Squared distance to the words' embeddings relative to their own square, and how often the kind is nearest."""
    table = model.get_input_embeddings().weight
    batch = {key: value.to(table.device, non_blocking=True) for key, value in batch.items()}
    kinds, colours, places = (meaning(vocabulary[name], table) for name in ("kinds", "colours", "places"))
    kind, colour = batch["kind"].flatten(1), batch["colour"].flatten(1)  # (B, N)
    thing = kind > 0
    target = torch.where(
        thing[..., None],
        kinds[(kind - 1).clamp(min=0)] + colours[colour.clamp(min=0)],
        places[batch["context"]][:, None],
    )  # (B, N, D)
    seen = torch.stack(list(model.get_image_features(pixel_values=normalise(batch["pixels"])).pooler_output)).float()
    weight = torch.where(thing, 1.0, 0.2)
    loss = ((seen - target).pow(2).mean(-1) * weight).sum() / weight.sum() / kinds.pow(2).mean()
    nearest = (seen[thing] @ kinds.T).argmax(-1) + 1
    return loss, {"kind": (nearest == kind[thing]).float().mean()}


def train(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path, *,
          precision: torch.dtype | None, minutes: float | None = None, workers: int = 0) -> Trainer:  # fmt: skip
    """Train the projector in place, everything else frozen; checkpoint `folder/name.safetensors`."""
    trainer = Trainer("name", freeze(model, 1), recipe.name, folder, precision=precision, minutes=minutes)
    vocabulary = {key: words(names, tokenizer) for key, names in
                  (("kinds", KINDS), ("colours", COLOURS), ("places", CONTEXTS))}  # fmt: skip
    batches = stream(partial(sample, recipe=recipe), collate, recipe.name, workers)
    trainer.run(batches, partial(loss_of, model=model, vocabulary=vocabulary))
    return trainer

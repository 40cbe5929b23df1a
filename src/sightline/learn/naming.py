"""Stage 0b: the projector learns to name what the tower sees, patch by patch, before any sentence.

Stage 1 of LLaVA's recipe aligns the projector on a large set of captions; here the exact masks of the world stand in
for it. With E[word] the word embeddings and M, M', M'' the rotations of `build.rotations`, a patch is sent near

    E[<image>] + M (E[kind] + E[colour])      on an object;   E[<image>] + M E[place] on background
  + 2.5 M' ((x - 1/2) (E[right] - E[left]) + (y - 1/2) (E[bottom] - E[top]))      x, y in (0, 1): where the patch is
  + M'' 2 E[colour of the mark]                                               where an object has its mark

No decoder runs, so it costs next to nothing, and the decoder then starts with visual tokens it can half read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sightline.learn import build
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


PLACE = 2.5  # places weigh about as much as contents
SIDES = ["left", "right", "top", "bottom"]


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[list[int]]]:
    """Tokens of the words that patches are sent to."""
    lists = {"kinds": KINDS, "colours": COLOURS, "places": CONTEXTS, "sides": SIDES}
    known = {key: words(names, tokenizer) for key, names in lists.items()}
    return {**known, "picture": [[tokenizer.convert_tokens_to_ids(build.IMAGE)]]}


def targets(batch: dict[str, torch.Tensor], table: torch.Tensor, known: dict[str, list[list[int]]]) -> torch.Tensor:
    """(B, N, D) where each patch should go; `table` (V, D) are the word embeddings, labels (B, G, G) as in `tower`."""
    kinds, colours, places, sides, picture = (
        meaning(known[key], table) for key in ("kinds", "colours", "places", "sides", "picture")
    )
    about, where, marked = (turn.to(table) for turn in build.rotations(table.shape[1]))
    kind, colour, mark = (batch[key].flatten(1) for key in ("kind", "colour", "mark"))  # (B, N)
    thing = kinds[(kind - 1).clamp(min=0)] + colours[colour.clamp(min=0)]
    content = torch.where((kind > 0)[..., None], thing, places[batch["context"]][:, None])
    grid = batch["kind"].shape[1]
    along = ((torch.arange(grid, device=table.device) + 0.5) / grid).to(table)
    x, y = along.repeat(grid)[:, None], along.repeat_interleave(grid)[:, None]  # (N, 1)
    spot = PLACE * ((x - 0.5) * (sides[1] - sides[0]) + (y - 0.5) * (sides[3] - sides[2]))
    dot = 2 * colours[(mark - 1).clamp(min=0)] * (mark > 0)[..., None]
    return picture + content @ about + spot @ where + dot @ marked


def loss_of(batch: dict[str, torch.Tensor], model: LlavaForConditionalGeneration,
            known: dict[str, list[list[int]]]) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """Squared distance to the targets relative to the words' own square, and how often the kind is nearest."""
    table = model.get_input_embeddings().weight
    batch = {key: value.to(table.device, non_blocking=True) for key, value in batch.items()}
    target = targets(batch, table, known)
    kind, mark = batch["kind"].flatten(1), batch["mark"].flatten(1)
    thing = kind > 0
    seen = torch.stack(list(model.get_image_features(pixel_values=normalise(batch["pixels"])).pooler_output)).float()
    weight = torch.where(thing, 1.0, 0.1) + 2.0 * (mark > 0)
    kinds = meaning(known["kinds"], table)
    loss = ((seen - target).pow(2).mean(-1) * weight).sum() / weight.sum() / kinds.pow(2).mean()
    about = build.rotations(table.shape[1])[0].to(table)
    nearest = (seen[thing] @ about.T @ kinds.T).argmax(-1) + 1
    return loss, {"kind": (nearest == kind[thing]).float().mean()}


def train(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path, *,
          precision: torch.dtype | None, minutes: float | None = None, workers: int = 0) -> Trainer:  # fmt: skip
    """Train the projector in place, everything else frozen; checkpoint `folder/name.safetensors`."""
    trainer = Trainer("name", freeze(model, 1), recipe.name, folder, precision=precision, minutes=minutes)
    batches = stream(partial(sample, recipe=recipe), collate, recipe.name, workers)
    trainer.run(batches, partial(loss_of, model=model, known=vocabulary(tokenizer)))
    return trainer

"""Stage 0a: the CLIP tower learns what is where from exact masks, before it ever meets language.

Per patch, from the last but one layer (the one LLaVA reads): kind, colour, mark, and the offset to the object's centre.
From the pooled CLS token of the last layer: which kinds are present, and the place. The heads are thrown away.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from sightline import scenes
from sightline.learn.data import scene_of, stream
from sightline.learn.loop import Trainer, named
from sightline.learn.recipe import Recipe

KINDS, COLOURS, CONTEXTS = list(scenes.KINDS), list(scenes.COLOURS), list(scenes.CONTEXTS)
COVERED = 0.2  # a patch belongs to the object that covers most of it, if it covers at least this share
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in its image processor
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float, as CLIP's image processor does for a picture of the right size."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def labels_of(scene: scenes.Scene, patch: int) -> dict[str, np.ndarray]:
    """Exact labels on the (G, G) patch grid: kind (0 is background), colour and mark (-1 is none), offset (G, G, 2)."""
    grid = scene.size // patch
    kind = np.zeros((grid, grid), np.int64)
    colour, mark = np.full((grid, grid), -1, np.int64), np.zeros((grid, grid), np.int64)
    offset = np.zeros((grid, grid, 2), np.float32)
    best = np.full((grid, grid), COVERED)
    middle = (np.arange(grid) + 0.5) * patch
    for thing in scene.objects:
        share = thing.mask.reshape(grid, patch, grid, patch).mean((1, 3))
        here = share >= best
        best = np.where(here, share, best)
        kind[here], colour[here] = 1 + KINDS.index(thing.kind), COLOURS.index(thing.colour)
        towards = np.stack(np.broadcast_arrays(thing.centre[0] - middle[None], thing.centre[1] - middle[:, None]), -1)
        offset[here] = towards[here] / scene.size * 4
    for thing in scene.objects:
        if thing.mark:
            x, y = ((thing.mark_box[a] + thing.mark_box[a + 2]) / 2 for a in (0, 1))
            mark[min(grid - 1, int(y // patch)), min(grid - 1, int(x // patch))] = 1 + COLOURS.index(thing.mark)
    present = np.array([name in scene.counts() for name in KINDS], np.float32)
    context = np.array(CONTEXTS.index(scene.context))
    return {"kind": kind, "colour": colour, "mark": mark, "offset": offset, "present": present, "context": context}


def sample(index: int, recipe: Recipe) -> dict[str, np.ndarray]:
    """Pixels (S, S, 3) uint8 and labels of one scene."""
    scene, _ = scene_of("tower", index, recipe.seed, recipe.shape.image)
    return {"pixels": np.asarray(scene.image), **labels_of(scene, recipe.shape.patch)}


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack samples."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


class Heads(nn.Module):
    """Linear read-outs of a tower of width D: dense ones on patches, global ones on CLS."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = {"kind": 1 + len(KINDS), "colour": len(COLOURS), "mark": 1 + len(COLOURS), "offset": 2}
        self.dense = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.present, self.context = nn.Linear(width, len(KINDS)), nn.Linear(width, len(CONTEXTS))

    def forward(self, patches: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        """patches (B, N, D), pooled (B, D) -> logits by name."""
        patches = self.norm(patches)
        out = {name: head(patches).float() for name, head in self.dense.items()}
        return {**out, "present": self.present(pooled).float(), "context": self.context(pooled).float()}


def loss_of(batch: dict[str, torch.Tensor], tower: CLIPVisionModel, heads: Heads) -> tuple[torch.Tensor, dict]:
    """Sum of the read-outs' losses, and how often kinds are right on objects, colours too, presence over all kinds."""
    device = heads.norm.weight.device
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    seen = tower(pixel_values=normalise(batch["pixels"]), output_hidden_states=True)
    out = heads(seen.hidden_states[-2][:, 1:], seen.pooler_output)
    kind, colour = batch["kind"].flatten(1), batch["colour"].flatten(1)  # (B, N)
    thing = kind > 0
    weight = torch.where(thing, 1.0, 0.3)
    kind_loss = F.cross_entropy(out["kind"].transpose(1, 2), kind, reduction="none")
    mark_weight = torch.ones(1 + len(COLOURS), device=device)
    mark_weight[0] = 0.1
    loss = (
        (kind_loss * weight).sum() / weight.sum()
        + 0.5 * F.cross_entropy(out["colour"].transpose(1, 2), colour, ignore_index=-1)
        + 0.3 * F.cross_entropy(out["mark"].transpose(1, 2), batch["mark"].flatten(1), weight=mark_weight)
        + (F.smooth_l1_loss(out["offset"], batch["offset"].flatten(1, 2), reduction="none").sum(-1) * thing).sum()
        / thing.sum().clamp(min=1)
        + 2 * F.binary_cross_entropy_with_logits(out["present"], batch["present"])
        + 0.3 * F.cross_entropy(out["context"], batch["context"])
    )
    right = (out["kind"].argmax(-1) == kind)[thing].float().mean()
    shade = (out["colour"].argmax(-1) == colour)[thing].float().mean()
    guess = out["present"] > 0
    truth = batch["present"] > 0.5
    f1 = 2 * (guess & truth).sum() / (guess.sum() + truth.sum()).clamp(min=1)
    return loss, {"kind": right, "colour": shade, "present_f1": f1}


def train(tower: CLIPVisionModel, recipe: Recipe, folder: Path, *, precision: torch.dtype | None,
          minutes: float | None = None, workers: int = 0) -> Trainer:  # fmt: skip
    """Train the tower in place. The checkpoint `folder/tower.safetensors` also keeps the heads."""
    device = next(tower.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        heads = Heads(recipe.shape.vision_width).to(device)
    parameters = {**named("tower.", tower), **named("heads.", heads)}
    trainer = Trainer("tower", parameters, recipe.tower, folder, precision=precision, minutes=minutes)
    batches = stream(partial(sample, recipe=recipe), collate, recipe.tower, workers)
    tower.train()
    trainer.run(batches, partial(loss_of, tower=tower, heads=heads))
    tower.eval()
    return trainer

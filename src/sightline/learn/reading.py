"""Stage 0c: the decoder learns to look things up in a few patches, before it meets whole pictures.

Looking up (find the patches of the thing asked about, fetch what they say) is the one skill a small decoder finds late:
after some thousand questions, whatever their length. So the questions are made cheap: of every picture only `patches`
visual tokens are shown, two of each object and some more, and from the noun of a question on every token is
also asked for the answer. Tower and projector are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from sightline import scenes
from sightline.learn import conversation
from sightline.learn.conversation import IGNORED
from sightline.learn.data import scene_of, stream
from sightline.learn.loop import Trainer, named
from sightline.learn.phrasing import nouns, rephrase
from sightline.learn.recipe import Recipe
from sightline.learn.tower import normalise
from sightline.scenes.naming import place_of, sentence

SIMPLE = ("exist", "colour")
MIX = (
    "exist",
    "colour",
    "leading",
    "context",
    "count",
    *2 * ("detail",),
    *4 * ("relation",),
)  # what is hard, more often
FIRST, OTHER = 2.0, 0.5  # weights in the loss: an answer's first token; its other tokens and early answers


@dataclass(frozen=True)
class Sample:
    """Token ids, labels (-100 where masked), (position, token) of early answers, pixels, and the patches shown."""

    ids: list[int]
    labels: list[int]
    early: list[tuple[int, int]]
    pixels: np.ndarray
    places: np.ndarray


def places(scene: scenes.Scene, patch: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) sorted patch numbers: of each object its mark and two of the four patches that it covers most, then any.

    Patches on objects are twice as likely among the others.
    """
    grid = scene.size // patch
    covered = [thing.mask.reshape(grid, patch, grid, patch).mean((1, 3)).ravel() for thing in scene.objects]
    must = [_mark_patch(thing, patch, grid) for thing in scene.objects if thing.mark]
    must += [int(p) for share in covered for p in rng.permutation(np.argsort(-share)[:4])[:2]]
    must = list(dict.fromkeys(must))[:count]
    others = np.setdiff1d(np.arange(grid * grid), must)
    weights = 1.0 + (np.max(covered, 0, initial=0.0)[others] >= 0.2) if covered else np.ones(len(others))
    more = rng.choice(others, count - len(must), replace=False, p=weights / weights.sum())
    return np.sort(np.concatenate([must, more]).astype(int))


def whereabouts(scene: scenes.Scene) -> list[tuple[str, str]]:
    """Where in the picture is each thing that is the only one of its kind: a step on the way to relations."""
    counts = scene.counts()
    alone = [thing for thing in scene.objects if counts[thing.kind] == 1]
    return [(f"Where in the image is the {thing.kind}?", sentence(place_of(thing, scene.size).split(" the ")[1]))
            for thing in alone]  # fmt: skip


def _mark_patch(thing: scenes.Object, patch: int, grid: int) -> int:
    x, y = ((thing.mark_box[a] + thing.mark_box[a + 2]) / 2 for a in (0, 1))
    return min(grid - 1, int(y // patch)) * grid + min(grid - 1, int(x // patch))


def early_answers(ids: list[int], labels: list[int], names: set[int]) -> list[tuple[int, int]]:
    """(position, token): from the last noun of each question up to its answer, the answer's first token."""
    found, noun = [], None
    for k, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label != IGNORED and labels[k - 1] == IGNORED:
            found += [(j, label) for j in range(noun, k - 1)] if noun is not None else []
            noun = None
        elif label == IGNORED and token in names:
            noun = k
    return found


def noun_tokens(text: PreTrainedTokenizerFast) -> set[int]:
    """The last token of every noun of the world, as it stands inside a sentence."""
    return {text(f" {word}", add_special_tokens=False)["input_ids"][-1] for word in nouns()}


def sample(index: int, recipe: Recipe, processor: LlavaProcessor) -> Sample:
    """A picture, a few of its patches, and questions about it."""
    scene, rng = scene_of("read", index, recipe.seed, recipe.shape.image)
    simple = index < recipe.simple
    asked = scenes.questions(scene, rng, recipe.turns, kinds=SIMPLE if simple else MIX)
    turns = [(rephrase(q, rng), q.answer) for q in asked] + ([] if simple else whereabouts(scene))
    turns = [turns[k] for k in rng.permutation(len(turns))[: recipe.turns]]
    count = min(recipe.patches, recipe.shape.grid**2)
    ids, labels = conversation.encode(turns, processor, count, stage=2)
    early = early_answers(ids, labels, noun_tokens(processor.tokenizer))
    return Sample(ids, labels, early, np.asarray(scene.image), places(scene, recipe.shape.patch, count, rng))


def collate(samples: list[Sample], pad: int) -> dict[str, torch.Tensor]:
    """`ids`, `labels`, `early` (B, T; -100 where none) padded on the right, `pixels` (B, S, S, 3), `places` (B, K)."""
    batch = conversation.collate([conversation.Sample(s.ids, s.labels, s.pixels) for s in samples], pad)
    early = torch.full_like(batch["labels"], IGNORED)
    for k, one in enumerate(samples):
        for position, token in one.early:
            early[k, position] = token
    return {**batch, "early": early, "places": torch.from_numpy(np.stack([s.places for s in samples]))}


def loss_of(batch: dict[str, torch.Tensor], model: LlavaForConditionalGeneration) -> tuple[torch.Tensor, dict]:
    """Weighted cross-entropy of answers and early answers, and how often an answer's first token is right."""
    device = model.lm_head.weight.device
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    with torch.no_grad():
        seen = torch.stack(list(model.get_image_features(pixel_values=normalise(batch["pixels"])).pooler_output))
    shown = seen.gather(1, batch["places"][..., None].expand(-1, -1, seen.shape[-1]))  # (B, K, D)
    words = model.get_input_embeddings()(batch["ids"])
    marks = (batch["ids"] == model.config.image_token_index)[..., None]
    inputs = words.masked_scatter(marks, shown.to(words.dtype))
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, D)
    labels, early = batch["labels"][:, 1:], batch["early"][:, :-1]
    opening = (labels != IGNORED) & (batch["labels"][:, :-1] == IGNORED)
    target = torch.where(labels != IGNORED, labels, early)
    kept = target != IGNORED
    logits = model.lm_head(hidden[kept]).float()
    weight = torch.where(opening[kept], FIRST, OTHER)
    loss = (F.cross_entropy(logits, target[kept], reduction="none") * weight).sum() / weight.sum()
    return loss, {"answers": (logits.argmax(-1) == target[kept])[opening[kept]].float().mean()}


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, folder: Path, *,
          precision: torch.dtype | None, minutes: float | None = None, workers: int = 0) -> Trainer:  # fmt: skip
    """Train the decoder in place, everything else frozen; checkpoint `folder/read.safetensors`."""
    model.requires_grad_(False)
    parameters = named("decoder.", model.model.language_model)
    trainer = Trainer("read", parameters, recipe.read, folder, precision=precision, minutes=minutes)
    make = partial(sample, recipe=recipe, processor=processor)
    batches = stream(make, partial(collate, pad=processor.tokenizer.pad_token_id), recipe.read, workers)
    trainer.run(batches, partial(loss_of, model=model))
    model.eval()
    return trainer

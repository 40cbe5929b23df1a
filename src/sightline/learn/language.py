"""Stage 0b: the decoder learns the language of the world, and its priors, from text alone.

Documents: a caption in place of the picture, then questions about it; captions and answers with nothing to look at
(what is likely where); and short lore about places. Every document starts with BOS; every token is supervised.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from sightline import scenes
from sightline.learn.data import scene_of, stream
from sightline.learn.loop import Trainer, named
from sightline.learn.phrasing import describe, rephrase
from sightline.learn.recipe import Recipe


def lore(rng: np.random.Generator) -> str:
    """Two or three sentences about what one meets in a place, drawn from the world's own frequencies."""
    name = list(scenes.CONTEXTS)[int(rng.integers(len(scenes.CONTEXTS)))]
    weights = scenes.CONTEXTS[name].weights
    kinds, p = list(weights), np.array(list(weights.values()))
    first, second, third = (kinds[k] for k in rng.choice(len(kinds), 3, replace=False, p=p / p.sum()))
    plural = [scenes.KINDS[kind].plural for kind in (first, second, third)]
    forms = (
        f"A {name} often has {plural[0]}, {plural[1]} and {plural[2]}. Where there is a {first}, look for a {second}.",
        f"One day we went to a {name}. We saw a {first} and a {second}. The {first} was next to the {third}.",
        f"What is in a {name}? There are {plural[0]} and {plural[1]}, and there may be a {third} too.",
    )
    return forms[int(rng.integers(len(forms)))]


def document(index: int, recipe: Recipe, stage: str = "language") -> str:
    """The text of document `index`, without BOS."""
    scene, rng = scene_of(stage, index, recipe.seed, 56)
    draw = rng.random()
    asked = scenes.questions(scene, rng, 14)
    turns = "</s>".join(f"USER: {rephrase(q, rng)} ASSISTANT: {q.answer}" for q in asked) + "</s>"
    if draw < 0.6:
        return f"USER: {scenes.caption(scene, rng, 'detailed')}\n" + turns.removeprefix("USER: ")
    if draw < 0.7:
        return f"USER: {scenes.caption(scene, rng, 'short')}\n" + turns.removeprefix("USER: ")
    if draw < 0.8:
        return turns
    if draw < 0.9:
        return " ".join(lore(rng) for _ in range(8)) + "</s>"
    return f"USER: {describe(rng, 'detailed')} ASSISTANT: {scenes.caption(scene, rng, 'detailed')}</s>" + turns


def sample(index: int, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """`recipe.length` tokens (fewer at the end of a short document), BOS first."""
    return tokenizer(document(index, recipe))["input_ids"][: recipe.length]


def collate(rows: list[list[int]], pad: int) -> torch.Tensor:
    """(B, T) token ids, padded on the right."""
    out = torch.full((len(rows), max(map(len, rows))), pad)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return out


def loss_of(ids: torch.Tensor, model: LlavaForConditionalGeneration, pad: int) -> tuple[torch.Tensor, dict]:
    """Next-token loss over everything that is not padding. ids (B, T)."""
    ids = ids.to(model.lm_head.weight.device, non_blocking=True)
    hidden = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    target = ids[:, 1:]
    kept = target != pad
    logits = model.lm_head(hidden[:, :-1][kept]).float()
    return F.cross_entropy(logits, target[kept]), {}


def train(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path, *,
          precision: torch.dtype | None, minutes: float | None = None, workers: int = 0) -> Trainer:  # fmt: skip
    """Train the decoder in place; checkpoint `folder/language.safetensors`."""
    trainer = Trainer("language", named("", model.model.language_model), recipe.language, folder,
                      precision=precision, minutes=minutes)  # fmt: skip
    pad = tokenizer.pad_token_id
    make = partial(sample, recipe=recipe, tokenizer=tokenizer)
    batches = stream(make, partial(collate, pad=pad), recipe.language, workers)
    model.model.language_model.train()
    trainer.run(batches, partial(loss_of, model=model, pad=pad))
    model.model.language_model.eval()
    return trainer

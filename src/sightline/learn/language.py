"""Stage 0b: the decoder learns the language of the world, and its priors, from text alone.

Documents: a caption in place of the picture, then questions about it; captions and answers with nothing to look at
(what is likely where); and short lore about places. Every document starts with BOS; every token is supervised, answers most:
to give them the decoder has to find words in its context, which is what it will do with visual tokens.
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

CHATTER = 0.1  # weight in the loss of what nobody can know: captions, and which question comes next


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


def document(index: int, recipe: Recipe, stage: str = "language") -> list[tuple[str, bool]]:
    """Document `index` as (text, is it an answer) pieces, without BOS."""
    scene, rng = scene_of(stage, index, recipe.seed, 56)
    draw = rng.random()
    if draw < 0.06:
        return [(" ".join(lore(rng) for _ in range(8)) + "</s>", False)]
    turns = [(rephrase(question, rng), question.answer) for question in scenes.questions(scene, rng, 16)]
    pieces = [piece for q, a in turns for piece in ((f"USER: {q} ASSISTANT:", False), (f" {a}</s>", True))]
    if draw < 0.1:
        return pieces
    if draw < 0.15:
        told = scenes.caption(scene, rng, "detailed")
        return [(f"USER: {describe(rng, 'detailed')} ASSISTANT:", False), (f" {told}</s>", False), *pieces]
    style = "short" if draw < 0.25 else "detailed"
    context = scenes.caption(scene, rng, style)
    if rng.random() < 0.5:
        pieces = [(f"USER: {describe(rng, style)} ASSISTANT:", False), (f" {context}</s>", True), *pieces]
    return [(f"USER: {context}\n" + pieces[0][0].removeprefix("USER: "), False), *pieces[1:]]


def text_of(pieces: list[tuple[str, bool]]) -> str:
    """The pieces of a document joined."""
    return "".join(text for text, _ in pieces)


def sample(index: int, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """At most `recipe.length` tokens, BOS first, and the weight of each in the loss: 1 in answers, else CHATTER."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for text, answer in document(index, recipe):
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        weights += [1.0 if answer else CHATTER] * len(part)
    return ids[: recipe.length], weights[: recipe.length]


def collate(rows: list[tuple[list[int], list[float]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) token ids padded on the right, and (B, T) weights, 0 on padding."""
    longest = max(len(ids) for ids, _ in rows)
    ids, weights = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest)
    for k, (tokens, values) in enumerate(rows):
        ids[k, : len(tokens)], weights[k, : len(tokens)] = torch.tensor(tokens), torch.tensor(values)
    return ids, weights


def loss_of(
    batch: tuple[torch.Tensor, torch.Tensor], model: LlavaForConditionalGeneration
) -> tuple[torch.Tensor, dict]:
    """Weighted next-token loss, and the share of answer tokens that is predicted right. ids, weights (B, T)."""
    ids, weights = (tensor.to(model.lm_head.weight.device, non_blocking=True) for tensor in batch)
    hidden = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    kept = weights[:, 1:] > 0
    target, weight = ids[:, 1:][kept], weights[:, 1:][kept]
    logits = model.lm_head(hidden[:, :-1][kept]).float()
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    opening = (weights[:, 1:] == 1) & (weights[:, :-1] < 1)  # an answer's first token
    first = opening[kept]
    return loss, {"answers": (logits.argmax(-1) == target)[first].float().mean() if first.any() else torch.ones(())}


def train(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path, *,
          precision: torch.dtype | None, minutes: float | None = None, workers: int = 0) -> Trainer:  # fmt: skip
    """Train the decoder in place; checkpoint `folder/language.safetensors`."""
    trainer = Trainer("language", named("", model.model.language_model), recipe.language, folder,
                      precision=precision, minutes=minutes)  # fmt: skip
    make = partial(sample, recipe=recipe, tokenizer=tokenizer)
    batches = stream(make, partial(collate, pad=tokenizer.pad_token_id), recipe.language, workers)
    model.model.language_model.train()
    trainer.run(batches, partial(loss_of, model=model))
    model.model.language_model.eval()
    return trainer

"""Films of the generated world as training data: questions by number, and prompts with their answers behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sightline import scenes
from sightline.learn.conversation import IGNORED
from sightline.scenes.splits import SPLITS

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.lvlm import LVLM

GLANCE = {"size": 56, "frames": 8}  # how a film is drawn only to ask about it


def question(seed: int, number: int, kinds: tuple[str, ...] | None = None) -> tuple[int, scenes.Question]:
    """The seed of a film of the training split, and a question about it; the same for the same arguments.

    Of its `frames` only the order means something: they are those of a coarse drawing.
    """
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    low, high = SPLITS["train"]
    while True:
        film_seed = int(rng.integers(low, high))
        film = scenes.film(film_seed, **GLANCE)
        asked = scenes.film_questions(film, rng, 1, *([kinds] if kinds else []))
        if asked:
            return film_seed, asked[0]


def with_answers(lvlm: LVLM, inputs: Any, answers: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of B prompts with their answers behind them, padded on the right, and labels (B, N) of the answers alone."""
    tokenizer = lvlm.processor.tokenizer
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [tokenizer.encode(f" {text}", add_special_tokens=False) + ends for text in answers]
    width, device = max(map(len, ids)), inputs["input_ids"].device
    added = torch.full((len(ids), width), tokenizer.pad_token_id, device=device)
    real = torch.zeros_like(added)
    for row, tokens in enumerate(ids):
        added[row, : len(tokens)], real[row, : len(tokens)] = torch.tensor(tokens, device=device), 1
    prompt = inputs["input_ids"]
    tails = {"input_ids": added, "attention_mask": real}
    batch = {
        name: torch.cat([value, tails.get(name, torch.zeros_like(added)).to(value.dtype)], 1)
        if getattr(value, "shape", None) == prompt.shape
        else value
        for name, value in inputs.items()
    }
    labels = torch.cat([torch.full_like(prompt, IGNORED), added.masked_fill(real == 0, IGNORED)], 1)
    return batch, labels

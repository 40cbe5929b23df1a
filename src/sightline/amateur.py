"""A language model that sees no picture, by name: what it would say next. For decoders that weigh a model against one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sightline.errors import ModelError


def next_scores(name: str, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """(B, V) raw logits of the next token behind every text, asked in the model's own chat form where it has one.

    Raises:
        ModelError: the checkpoint cannot be loaded as a causal language model.
    """
    tokenizer, model = language_model(name, torch.device(device))
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    rows = []
    for text in texts:  # one by one: nothing to pad, and a description has few rows
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        with torch.no_grad():
            rows.append(model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1).logits[0, -1].float())
    return torch.stack(rows)


@lru_cache(maxsize=1)
def language_model(name: str, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or Hub id. ModelError when it cannot be loaded as a causal language model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} cannot be loaded as a causal language model ({str(error).splitlines()[0]}): give a folder "
            "or Hub id with the vocabulary of the vision-language model's decoder, or none"
        ) from error
    return tokenizer, model.to(device).eval()

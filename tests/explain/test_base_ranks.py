"""Base ranks: by hand, of the model's own answer, and what they must be when there is nothing to see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sightline.errors import InputError
from sightline.explain import base_ranks
from tests.explain.tiny import batch, lvlm


def test_ranks_by_hand() -> None:
    model, asked = lvlm(), batch(1)
    tokens, ranks = base_ranks(model, asked.images[0], asked.questions[0], "A red dog.")
    ids = model.processor.tokenizer(" A red dog.", add_special_tokens=False)["input_ids"]
    prompt = model.inputs(asked.images, asked.questions)["input_ids"]
    words = prompt[:, prompt[0] != model.model.config.image_token_id]
    assert len(tokens) == len(ranks)
    for k in range(len(ranks)):
        with torch.no_grad():
            read = torch.cat([words, torch.tensor([ids[:k]], dtype=torch.long)], 1)
            logits = model.model(input_ids=read).logits[0, -1]
        order = logits.argsort(descending=True).tolist()
        assert order.index(ids[k]) + 1 == ranks[k]


def test_what_the_blind_model_would_say_is_unshifted() -> None:
    """An answer that the model gives without the picture has rank 1 everywhere."""
    model, asked = lvlm(), batch(1)
    prompt = model.inputs(asked.images, asked.questions)["input_ids"]
    words = prompt[:, prompt[0] != model.model.config.image_token_id]

    class Blind:
        config = model.model.config

        def __call__(self, input_ids, use_cache):
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids, 2048).roll(-1, 1).float()})

    _, ranks = base_ranks(model, asked.images[0], asked.questions[0], "A red dog.", base=Blind())
    assert words.shape[1] > 1
    np.testing.assert_array_equal(ranks, np.ones(len(ranks)))
    with pytest.raises(InputError, match="no tokens"):
        base_ranks(model, asked.images[0], asked.questions[0], "")


def test_another_vocabulary_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    model, asked = lvlm(), batch(1)
    with pytest.raises(InputError, match="vocabulary of 16 tokens"):
        base_ranks(model, asked.images[0], asked.questions[0], "A red dog.", base=small)

"""VHD against hooks on the output projections, T-VHD token by token, and ranks against the head written out."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from sightline import explain
from sightline.errors import InputError, ParameterError
from sightline.explain.divergence import HeadDivergence
from sightline.explain.ranks import ranks_of
from sightline.explain.scoring import answer_ids
from sightline.hosts import get
from sightline.steer import DualStreamEmphasis
from tests.explain.tiny import batch, lvlm


def head_outputs(model, inputs: dict, positions: slice) -> torch.Tensor:
    """(L, T, H, D) inputs of the output projections of a plain forward of one row."""
    seen: list[torch.Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for layer in get(get(model.model, model.host.decoder), "layers"):
            hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
            stack.callback(hook.remove)
        model.model(**inputs, use_cache=False)
    return torch.stack(seen)[:, positions].unflatten(-1, (4, -1))


def without_picture(model, ids: torch.Tensor) -> dict:
    words = ids[:, ids[0] != model.model.config.image_token_id]
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_divergence_of_prompts(name):
    model, asked = lvlm(name), batch()
    found = explain.vision_heads(model, asked.images, asked.questions, batch=2)
    assert found.divergence.shape == (3, 4, 4)
    for b in range(3):
        inputs = model.inputs([asked.images[b]], [asked.questions[b]])
        seeing = head_outputs(model, inputs, slice(-1, None))
        blind = head_outputs(model, without_picture(model, inputs["input_ids"]), slice(-1, None))
        np.testing.assert_allclose(found.divergence[b], (seeing - blind).norm(dim=-1)[:, 0], atol=2e-5)
    order = found.ranking()
    assert found.mean[tuple(order[0])] == found.mean.max()
    assert sorted(map(tuple, order.tolist())) == [(layer, head) for layer in range(4) for head in range(4)]


def test_ranking_and_weights():
    found = HeadDivergence(np.array([[[1.0, 3.0], [0.0, 0.0]], [[3.0, 5.0], [0.0, 0.0]]], dtype=np.float32))
    assert found.mean.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert found.ranking().tolist() == [[0, 1], [0, 0], [1, 0], [1, 1]]
    assert found.weights() == (0.6667, 1.3333, 1.0, 1.0)
    DualStreamEmphasis(head_weights=found.weights())


@pytest.mark.parametrize(("name", "top"), [("llava", None), ("qwen2_5_vl", 2), ("gemma3", 1)])
def test_divergence_of_an_answer(name, top):
    model, asked = lvlm(name), batch(1)
    tokens, found = explain.token_divergence(model, asked.images[0], asked.questions[0], "two red cups", top=top)
    inputs = dict(model.inputs(asked.images, asked.questions))
    prompt = inputs["input_ids"]
    ids = answer_ids(model.processor.tokenizer, prompt[0], "two red cups")
    assert len(tokens) == len(ids) == len(found)
    for t in range(len(ids)):  # one forward for each token
        whole = torch.cat([prompt, torch.tensor([ids[:t]], dtype=prompt.dtype)], 1)
        given = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in given:
                given[key] = torch.nn.functional.pad(given[key], (0, t))
        seeing = head_outputs(model, given, slice(-1, None))
        blind = head_outputs(model, without_picture(model, whole), slice(-1, None))
        divergence = (seeing - blind).norm(dim=-1)[:, 0].sort(-1, descending=True).values[:, :top]
        assert found[t] == pytest.approx(float(divergence.sum()), rel=1e-4)


def test_the_models_own_answer():
    model, asked = lvlm(), batch(1)
    tokens, found = explain.token_divergence(model, asked.images[0], asked.questions[0], length=4)
    assert len(tokens) == len(found) == 4
    assert (found > 0).all()


def test_bad_input():
    model, asked = lvlm(), batch(1)
    with pytest.raises(InputError, match="one picture per question"):
        explain.vision_heads(model, [], [])
    with pytest.raises(ParameterError, match=r"\[1, 4\]"):
        explain.token_divergence(model, asked.images[0], asked.questions[0], "a dog", top=5)
    with pytest.raises(InputError, match="no tokens"):
        explain.token_divergence(model, asked.images[0], asked.questions[0], " ")
    with pytest.raises(InputError, match="no words"):
        explain.token_ranks(model, asked.images[0], asked.questions[0], [])


def test_ranks_of_scores():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 3.0]])
    assert ranks_of(scores, [0, 1]).tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("norm", [False, True])
def test_ranks_of_words(norm):
    model, asked = lvlm(), batch(1)
    words = ["dog", "the", "red"]
    answer, found = explain.token_ranks(model, asked.images[0], asked.questions[0], words, length=3, norm=norm)
    assert answer
    assert found.shape == (3, 4, 3)
    inputs = model.inputs(asked.images, asked.questions)
    with torch.no_grad():
        out = model.model(**inputs, output_hidden_states=True)
    ids = [answer_ids(model.processor.tokenizer, inputs["input_ids"][0], w)[0] for w in words]
    states = torch.stack([h[0, -1] for h in out.hidden_states[1:4]])
    states = model.model.model.language_model.norm(states) if norm else states
    scores = torch.cat([model.model.lm_head(states), out.logits[:, -1]])
    assert found[0].tolist() == ranks_of(scores, ids).tolist()

"""Shifted sparse attention inside a decoder: against the same mask given whole, restored, refused where it cannot be exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from sightline.errors import InputError, ModelError, ParameterError
from sightline.learn import shifted
from sightline.mix.sinklora import group_size, shifted_mask

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)).eval()


IDS = torch.randint(0, 50, (2, 18), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "rule", [{}, {"sinks": 0}, {"restore": 0.5, "ratio": 0.5}, {"restore": 0.5, "restore_by": "groups", "sinks": 2}]
)
def test_it_is_the_mask_given_whole(llama, rule) -> None:
    full = shifted.Rule(**rule)
    seen = shifted_mask(
        18, 4, group_size(18, full.ratio), sinks=full.sinks, restore=full.restore, restore_by=full.restore_by
    )
    wanted = llama(IDS, attention_mask=seen[None].expand(2, -1, -1, -1), labels=IDS)
    with shifted.training(llama, **rule):
        found = llama(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.loss, llama.parameters()) for out in (found, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_one_group_for_all_is_plain_attention(llama) -> None:
    plain = llama(IDS).logits
    with shifted.training(llama, ratio=1.0, restore=1.0):
        torch.testing.assert_close(llama(IDS).logits, plain, rtol=1e-4, atol=1e-5)
    with shifted.training(llama):
        assert (llama(IDS).logits - plain).abs().max() > 1e-3
    assert torch.equal(llama(IDS).logits, plain)  # bit for bit as before


def test_restored_after_an_error(llama) -> None:
    before = llama.config._attn_implementation
    with pytest.raises(KeyError), shifted.training(llama):
        raise KeyError
    assert llama.config._attn_implementation == before
    with shifted.training(llama), pytest.raises(ModelError, match="already"), shifted.training(llama):
        pass


def test_what_it_cannot_do_is_refused(llama) -> None:
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    with shifted.training(llama):
        with pytest.raises(InputError, match="padding"):
            llama(IDS, attention_mask=padded)
        with pytest.raises(InputError, match="generate outside"):
            llama.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0)
        llama(IDS, attention_mask=torch.ones_like(IDS))
    window = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)).eval()
    with shifted.training(window), pytest.raises(InputError, match="plainly causal"):
        window(IDS)
    with pytest.raises(ModelError, match="no transformers model"), shifted.training(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("rule", [{"ratio": 0.0}, {"ratio": 1.5}, {"sinks": -1}, {"restore": 2.0}, {"restore_by": "x"}])
def test_values_out_of_range(rule) -> None:
    with pytest.raises(ParameterError):
        shifted.Rule(**rule)


def test_group_sizes() -> None:
    assert [group_size(n, 0.25) for n in (16, 18, 30, 5, 1)] == [4, 4, 8, 2, 2]


@torch.no_grad()
def test_longer_positions(llama) -> None:
    config = shifted.longer(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64), 256)
    assert config.max_position_embeddings == 256
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(llama.state_dict())
    places = torch.arange(18)[None]
    scaled = model(IDS[:1], position_ids=4 * places).logits
    torch.testing.assert_close(scaled, llama(IDS[:1], position_ids=places).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ParameterError, match="already"):
        shifted.longer(LlamaConfig(**SIZES, max_position_embeddings=64), 64)
    with pytest.raises(ModelError, match="linear"):
        shifted.longer(config, 1024)


def test_training_with_it_learns(llama) -> None:
    optimiser = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    losses = []
    with shifted.training(llama):
        for _ in range(25):
            loss = llama(IDS, labels=IDS).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

"""The Routing Transformer in transformers: from config, saving, generation without a cache, what moves in training, laws, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sightline.errors import InputError, ParameterError
from sightline.language import RoutingTransformerConfig, RoutingTransformerForCausalLM
from sightline.mix.parts.base import dense_attention

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SIZES | {"max_position_embeddings": 48, "clusters": 3, "window": 7, "local_window": 4}


def make(**options) -> RoutingTransformerForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(RoutingTransformerConfig(**(SMALL | options))).eval()


def text(tokens: int = 20, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 37, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{}, {"shared": False, "memories": 2}, {"routing_from": 1}, {"routing_heads": 4}], ids=str
)
def test_saved_and_loaded(options, tmp_path) -> None:
    model = make(**options)
    assert isinstance(model, RoutingTransformerForCausalLM)
    out = model(text()).logits
    assert out.shape == (2, 20, 37)
    assert out.isfinite().all()
    assert out.std() > 1e-3
    assert model.lm_head.weight is model.tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(text()).logits, out)
    assert torch.equal(again.layers[1].attn.means, model.layers[1].attn.means)
    assert AutoConfig.from_pretrained(tmp_path).window == 7
    assert torch.equal(again.generate(text(6), max_new_tokens=2), model.generate(text(6), max_new_tokens=2))
    assert torch.equal(make(**options)(text()).logits, out)  # drawn from the seed


def test_generation_reads_the_text_again() -> None:
    """Greedy tokens and their scores are those of forwards on all that was written before; beams and sampling run."""
    model = make()
    ids = text(6)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for step, logits in enumerate(out.logits):
        own = model(out.sequences[:, : 6 + step]).logits[:, -1]
        assert torch.allclose(logits, own, atol=1e-5)
        assert torch.equal(own.argmax(-1), out.sequences[:, 6 + step])
    assert out.past_key_values is None
    assert model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False).shape == (2, 9)
    with pytest.raises(InputError, match="no cache"):
        model.generate(ids, max_new_tokens=3, use_cache=True)
    with pytest.raises(InputError, match="no cache"):
        model(ids, use_cache=True)


def test_training_moves_weights_and_centroids() -> None:
    model = make().train()
    model.start(text(), torch.Generator().manual_seed(0))
    before = [layer.attn.means.clone() for layer in model.layers]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        out = model(text(), labels=text())
        cross = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), text()[:, 1:].flatten())
        assert torch.allclose(out.loss, cross + 1e-4 * out.aux_loss, atol=1e-5)
        optimiser.zero_grad()
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        losses.append(cross.item())
    assert losses[-1] < 0.7 * losses[0]
    for layer, means in zip(model.layers, before, strict=True):
        assert not torch.equal(layer.attn.means, means)
        assert (layer.attn.means - means).abs().max() < 0.2  # a thousandth of the way, each time
    still = model.layers[0].attn.means.clone()
    model.eval()(text())
    assert torch.equal(model.layers[0].attn.means, still)


def test_start_is_k_means() -> None:
    """Centroids lie nearer to the tokens than drawn ones, and are units."""
    model = make(routing_heads=4)
    drawn = model(text()).aux_loss
    model.start(text(), torch.Generator().manual_seed(0))
    assert model(text()).aux_loss < 0.8 * drawn
    assert torch.allclose(model.layers[0].attn.means.norm(dim=-1), torch.ones(4, 3), atol=1e-5)


def test_causal_where_every_cluster_holds_all() -> None:
    """With window >= length no score depends on later tokens; with smaller windows membership may (the method's leak)."""
    ids = text()
    other = ids.clone()
    other[:, 12:] = (ids[:, 12:] + 1) % 37
    for options in ({"window": 48}, {"routing_heads": 0}, {"window": 48, "shared": False, "memories": 1}):
        model = make(**options)
        assert torch.allclose(model(ids).logits[:, :12], model(other).logits[:, :12], atol=1e-5)
    assert not torch.allclose(make()(ids).logits[:, :12], make()(other).logits[:, :12], atol=1e-5)


def test_heads_are_what_they_say() -> None:
    """Local heads: the last tokens. Routing heads with one cluster of all tokens: causal attention, own key a last resort."""
    attn = make(clusters=1, window=48).layers[0].attn
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2))
    local, routed = attn._project(x)
    at = torch.arange(9)
    near = (at[:, None] >= at) & (at[:, None] - at < 4)
    assert torch.allclose(attn._local(*local), dense_attention(*local, 4**-0.5, near), atol=1e-5)
    earlier = (at[:, None] > at) | (at[:, None] + at == 0)
    wanted = dense_attention(*routed, 4**-0.5, earlier) / (1 + 1e-5)
    assert torch.allclose(attn._routed(*routed)[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_size": 18}, "multiple"),
        ({"routing_heads": 5}, "routing_heads=5"),
        ({"clusters": 0}, "clusters=0"),
        ({"shared": False}, "memories=0"),
        ({"decay": 1.5}, "decay"),
    ],
)
def test_bad_sizes(options, match) -> None:
    with pytest.raises(ParameterError, match=match):
        RoutingTransformerConfig(**(SMALL | options))


def test_bad_inputs() -> None:
    model = make()
    with pytest.raises(InputError, match="padding"):
        model(text(), attention_mask=torch.tensor([[0] + [1] * 19, [1] * 20]))
    with pytest.raises(InputError, match="48 positions"):
        model(text(49))

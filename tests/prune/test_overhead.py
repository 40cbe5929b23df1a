"""What reducers cost themselves, counted instead of timed: extra operations, calls of the model's parts, memory.

One LLaVA of eight layers, 576 visual and 64 text tokens, widths in the proportions of Llama. Operations are counted by torch
over the whole prefill; what the layers need for the tokens that entered them (by formula) and what the plain host does
outside its layers are taken off: what remains is choosing.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

import sightline as sl
from sightline.evaluate.cost import UNCOUNTED
from sightline.evaluate.flops import Decoder
from sightline.evaluate.peak import live_bytes
from sightline.prune import (
    VTCCLS,
    DyVTE,
    FlowCut,
    FoPru,
    HiRED,
    MustDrop,
    PyramidDrop,
    QuoTA,
    Random,
    SlowFast,
    ZipVL,
)

LAYERS, VISUAL, TEXT, IMAGE = 8, 576, 64, 999
PROMISED = 0.03  # of the plain prefill
SHARE = 64 / VISUAL
BEFORE = [VTCCLS(64), HiRED(SHARE), FlowCut(64), FoPru(SHARE), FoPru(SHARE, "row"), Random(SHARE),
          QuoTA(64, 1, probabilities=(1.0,)), SlowFast(pooling_stride=1, temporal_stride=1, spatial_stride=3)]  # fmt: skip
INSIDE = [PyramidDrop(image_token_ratio_list=(1 / 3, 1 / 6, SHARE)), PyramidDrop(), DyVTE(exit_layer=1),
          MustDrop(tau_g=1 / VISUAL, tau_i=1.0, merge_threshold=None, keep_rate=0), MustDrop(tau_g=1 / VISUAL, tau_i=1.0)]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=96, patch_size=4
    )
    text = tf.LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=1000
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=VISUAL)
    return tf.LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def prefill(model):
    ids = torch.tensor([[1] * 16 + [IMAGE] * VISUAL + [5] * (TEXT - 16)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 96, 96)}

    def run(*systems):
        with torch.no_grad(), sl.attach(model, *systems):
            return model(**inputs, use_cache=True, logits_to_keep=1).cache

    return run


def counted(model, work):
    """Multiply-adds of everything, those of the layers by formula, tokens that entered each layer, calls of the tower."""
    entered, calls = [], []
    with ExitStack() as hooks, FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as mode:
        for layer in model.model.language_model.layers:  # inside the layers, behind the cuts
            hooks.callback(layer.mlp.register_forward_pre_hook(lambda m, args: entered.append(args[0].shape[1])).remove)
        hooks.callback(model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1)).remove)
        work()
    return mode.get_total_flops() / 2, Decoder.of(model.config).prefill_macs(entered), entered, len(calls)


@pytest.fixture(scope="module")
def plain(model, prefill):
    prefill()
    return {"macs": counted(model, prefill), "peak": live_bytes(prefill)}


def named(system):
    return sl.catalog.to_spec([system])


@pytest.mark.parametrize("system", [*BEFORE, *INSIDE], ids=named)
def test_choosing_costs_little(system, model, prefill, plain):
    """At most 3 % of the plain prefill, with no part of the model run twice and no more memory than the plain host."""
    whole, layers, _, _ = plain["macs"]
    mine, needed, entered, towers = counted(model, lambda: prefill(system))
    assert (len(entered), towers) == (LAYERS, 1)
    assert needed < 0.75 * layers  # it drops a good part of the tokens
    own = (mine - needed) - (whole - layers)
    assert own <= PROMISED * whole, f"{100 * own / whole:.2f} % of the plain prefill"
    assert live_bytes(lambda: prefill(system)) <= plain["peak"]


def test_sparse_attention_costs_no_more_than_it_saves(model, prefill, plain):
    """ZipVL's layers see all tokens: what its probes cost is paid by the attention that it leaves out."""
    whole, layers, tokens, _ = plain["macs"]
    mine, needed, entered, towers = counted(model, lambda: prefill(ZipVL(tau=0.5, recent=16, random=16)))
    assert (needed, entered, towers) == (layers, tokens, 1)
    assert mine <= (1 + PROMISED) * whole


@pytest.mark.parametrize("system", [*BEFORE, *INSIDE], ids=named)
def test_caches_hold_what_entered(system, model, prefill):
    """Keys and values take the bytes of the tokens that entered each layer; MustDrop's, after its last stage, fewer."""
    caches = []
    _, _, entered, _ = counted(model, lambda: caches.append(prefill(system)))
    stored = sum(t.numel() * t.element_size() for layer in caches[0].layers for t in (layer.keys, layer.values))
    wanted = Decoder.of(model.config).kv_bytes(entered, 4)
    assert stored < wanted if isinstance(system, MustDrop) else stored == wanted

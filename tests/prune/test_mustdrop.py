"""MustDrop: the official code's numbers for merging and filtering, and its three stages on hosts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.errors import HostError, ParameterError
from sightline.hosts import find, get
from sightline.prune.mustdrop import MustDrop, dropped, merge, similarity, windows
from tests.engine.numerics import assert_close
from tests.engine.whole import forward, generate
from tests.prune import golden
from tests.tiny_hosts import picture

LANGUAGE = {"merge_threshold": None, "keep_rate": 0.0, "prune_layers": (0, 1)}
QUESTIONS, PICTURES = ["Is there a dog?", "How many red cups are on the table?"], [picture(), picture(80, 64, 1)]


@pytest.mark.parametrize("path", golden.cases("mustdrop", "merge*"), ids=lambda p: p.stem)
def test_golden_merge(path):
    case = golden.load(path)
    window = case["window"]
    window = tuple(window.tolist()) if isinstance(window, torch.Tensor) else (int(window), int(window))
    found, sizes, source = merge(case["x"], case["threshold"], window)
    assert (found - case["merged"]).abs().max() <= 1e-6
    assert torch.equal(sizes, case["sizes"].to(sizes.dtype))
    assert torch.equal(source, case["source"].to(source.dtype))


@pytest.mark.skipif(not golden.cases("mustdrop"), reason="golden arrays are not here")
@pytest.mark.parametrize("path", golden.cases("mustdrop", "dual*"), ids=lambda p: p.stem)
def test_golden_filter(path):
    case = golden.load(path)
    start, count = case["v_token_start"], case["img_seq"]
    block = case["attn"][0, :, start + count :, start : start + count].mean(0)  # (T, V)
    assert block.shape[0] == case["text_seq"]
    gone = dropped(block.sum(0), block.amax(0), case["global_thr"], case["individual_thr"])
    assert (~gone).nonzero().flatten().tolist() == case["keep"].tolist()


def test_similarity_is_the_mean_of_all_pairs():
    patches = torch.randn(2, 36, 7, generator=torch.Generator().manual_seed(0))
    members = windows(patches, (3, 2))
    found = similarity(patches, members)
    assert members[1].tolist() == [2, 3, 8, 9, 14, 15]
    for row in range(2):
        for k, member in enumerate(members):
            x = patches[row, member]
            pairs = F.cosine_similarity(x[:, None], x[None], dim=-1)
            wanted = (pairs.sum() - pairs.diagonal().sum()) / (6 * 5)
            assert abs(float(found[row, k] - wanted)) < 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(-1, 1.5), rows=st.integers(1, 3))
def test_merging_keeps_the_sum(seed, threshold, rows):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 37, 5, generator=generator) + torch.randn(rows, 1, 5, generator=generator)
    found, sizes, source = merge(x, threshold)
    assert torch.allclose((found * sizes).sum(1), x.sum(1), atol=1e-4)
    assert torch.equal(sizes.sum(1), torch.full((rows, 1), 37.0))
    assert torch.equal(source.sum(1), torch.ones(rows, 37))
    if threshold > 1:
        assert torch.equal(found, x)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.floats(0, 0.2), more=st.floats(0, 0.2))
def test_higher_thresholds_drop_more(seed, low, more):
    attention = torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    total, largest = attention.sum(0), attention.amax(0)
    less = dropped(total, largest, low, low)
    assert not (less & ~dropped(total, largest, low + more, low + more)).any()
    assert not dropped(total, largest, 0.0, 1.0).any()
    assert not dropped(total, largest, 1.0, 0.0).any()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_decoder_stages(name, tiny):
    """What is dropped follows from the host's own attention; all thinned caches end equally long; positions follow on."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    visual = inputs["input_ids"][0] == host.model.config.image_token_id
    share = 1 / int(visual.sum())
    system = MustDrop(tau_g=share, tau_i=0.9, **LANGUAGE)
    seen = sl.record(maps=True, sinks=False)
    with sl.attach(host.model, seen):
        forward(host.model, inputs)
    with sl.attach(host.model, system) as attached, torch.no_grad():
        cache = made_cache(host.model(**inputs))
    last = int(visual.nonzero().max())
    block = seen.seen.maps[0][0][0].mean(0)[last + 1 :][:, visual[: seen.seen.maps[0][0].shape[-1]]]
    gone = (block.sum(0) < share * block.sum()) & (block.amax(0) < 0.9)
    report = attached.report()["mustdrop"]
    assert report["layers"] == [0, 1]
    assert report["image_tokens_before"] == [int(visual.sum()), int((~gone).sum())]
    assert 0 < report["image_tokens_after"][0] < report["image_tokens_before"][0]
    final = len(visual) - int(visual.sum()) + report["image_tokens_after"][1]
    window = getattr(get(host.model, find(host.model).decoder).config, "sliding_window", None)
    for layer in cache.layers:
        slides = getattr(layer, "is_sliding", False)
        assert layer.keys.shape[-2] == final or (slides and layer.keys.shape[-2] <= min(final, window - 1))


def test_new_tokens_take_the_next_position(tiny):
    """With one axis of positions a new token's is the number of tokens its layer holds; untouched layers count all."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    system = MustDrop(tau_g=1 / 36, tau_i=0.9, **{**LANGUAGE, "prune_layers": (1, 2)})
    with sl.attach(host.model, system), torch.no_grad():
        cache = made_cache(host.model(**inputs))
        shifts = [None if d is None else d.shift for d in cache._sightline.cuts.depths]
        held = [layer.keys.shape[-2] for layer in cache.layers]
    assert shifts[0] is None
    assert held[0] == inputs["input_ids"].shape[1]
    assert held[1] == held[2] == held[3] < held[0]
    for layer in (1, 2, 3):
        holes = (cache._sightline.cuts.held[layer].index < 0).sum(1) if layer < 3 else None
        count = held[layer] - (holes if holes is not None else (cache._sightline.cuts.depths[3].column < 0).sum(1))
        assert torch.equal(inputs["attention_mask"].sum(1) - shifts[layer], count)


def test_the_tower_stage(tiny):
    """Windows merge in the tower, later layers and the decoder run fewer tokens, key tokens outlive every filter."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    lengths = []
    tower = host.model.model.vision_tower
    hook = tower.encoder.layers[1].register_forward_pre_hook(lambda m, args, kw: lengths.append(
        (args[0] if args else kw["hidden_states"]).shape[1]), with_kwargs=True)  # fmt: skip
    system = MustDrop(tau_g=1.0, tau_i=1.0, prune_layers=(0, 1), merge_threshold=-1.0, keep_rate=0.5)
    try:
        with sl.attach(host.model, system) as attached:
            hook_behind = tower.encoder.layers[1].mlp.register_forward_pre_hook(
                lambda m, args: lengths.append(args[0].shape[1])
            )
            _, logits = generate(host.model, inputs)
            hook_behind.remove()
    finally:
        hook.remove()
    assert lengths == [37, 5]  # 36 patches in four windows of nine, all merged
    report = attached.report()["mustdrop"]
    assert report["visual_tokens_merged"] == [36, 4]
    assert report["image_tokens_after"] == [math.ceil(0.5 * 4)] * 2  # thresholds of 1 drop all but the key set
    assert logits.isfinite().all()


def test_merging_nothing_is_the_host(tiny):
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    plain = forward(host.model, inputs)
    with sl.attach(host.model, MustDrop(tau_g=0.0, merge_threshold=1.0, prune_layers=(0, 1))):
        assert torch.equal(forward(host.model, inputs), plain)


def test_merged_patches_are_means(tiny):
    """The tower's states behind layer 0 are those of the official order, put back to where the windows were."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    tower, plain, seen = host.model.model.vision_tower, [], []
    hook = tower.encoder.layers[1].register_forward_pre_hook(
        lambda m, args, kw: plain.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    forward(host.model, inputs)
    hook.remove()
    between = float(similarity(plain[0][:, 1:], windows(plain[0][:, 1:], (3, 3))).median())  # three of four windows
    wanted, sizes, _ = merge(plain[0], between)
    assert (sizes > 1).sum() == 3
    with sl.attach(host.model, MustDrop(tau_g=0.0, merge_threshold=between, keep_rate=0.0, prune_layers=(0, 1))):
        hook = tower.encoder.layers[1].layer_norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
        forward(host.model, inputs)
        hook.remove()
    assert_close("states", seen[0][seen[0][:, 0].argsort()], wanted[0][wanted[0][:, 0].argsort()], 1e-5)


def test_what_is_refused(tiny):
    with pytest.raises(HostError, match="keep_rate=0"):
        sl.attach(tiny("gemma3").model, MustDrop(prune_layers=(0, 1)))
    with pytest.raises(HostError, match="merge_threshold=none"):
        sl.attach(tiny("internvl").model, MustDrop(prune_layers=(0, 1)))
    with pytest.raises(ParameterError, match=r"\[0, 2\]"):
        sl.attach(tiny("llava").model, MustDrop(prune_layers=(2, 6, 10, 14)))
    with pytest.raises(ParameterError, match="must rise"):
        MustDrop(prune_layers=(6, 2))
    with pytest.raises(ParameterError, match="two patches"):
        MustDrop(window=(1, 1))
    host = tiny("llava")
    with (
        sl.attach(host.model, MustDrop(window=(4, 4), prune_layers=(0, 1))),
        pytest.raises(ParameterError, match="tile"),
    ):
        forward(host.model, host.inputs(QUESTIONS[:1], [PICTURES[:1]]))

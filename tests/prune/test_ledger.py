"""Every reducer on every host: cache lengths, the ledger and rotary positions of every layer, exactly, in prompt and steps."""

from __future__ import annotations

import pytest
import torch

import sightline as sl
from sightline import catalog
from sightline.engine.sequences import KEY, made_cache
from sightline.hosts import find, get
from tests.engine.whole import generate
from tests.systems import CASES
from tests.tiny_hosts import TINY, picture

REDUCERS = [slug for slug, entry in catalog.load_all().items() if entry.kind == "prune" and slug in CASES]
PLACES = {"dyvte": "keep"}  # where the positions of later tokens are not counted anew
SEVERAL_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # kept tokens keep their coordinates there
STEPS = 5  # `generate` of the tests makes as many tokens


def run(host, inputs, *systems):
    """Per layer the rotations (M, d) of every forward's tokens, and the cache behind the last one."""
    decoder = get(host.model, find(host.model).decoder)
    rotations, caches = [[] for _ in decoder.layers], []

    def see(k):
        def hook(module, args, kwargs):
            cos, sin = kwargs["position_embeddings"]
            hidden = args[0] if args else kwargs["hidden_states"]
            assert cos.shape[-2] == hidden.shape[1]
            rotations[k].append(torch.cat([cos, sin], -1).reshape(-1, cos.shape[-2], 2 * cos.shape[-1])[-1])

        return hook

    with sl.attach(host.model, *systems):
        hooks = [layer.register_forward_pre_hook(see(k), with_kwargs=True) for k, layer in enumerate(decoder.layers)]
        hooks.append(host.model.register_forward_hook(lambda m, a, out: caches.append(made_cache(out))))
        try:
            generate(host.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return rotations, caches[-1]


_plain: dict[str, list] = {}  # the rotations without systems, per host


@pytest.fixture
def plain(tiny):
    def of(name):
        host = tiny(name)
        inputs = host.inputs(["Is there a dog?"], [[picture(80, 64, 1)]])
        if name not in _plain:
            _plain[name] = run(host, inputs)[0]
        return host, inputs, _plain[name]

    return of


@pytest.mark.parametrize("slug", REDUCERS)
@pytest.mark.parametrize("name", TINY)
def test_lengths_and_positions(name, slug, plain):
    case = CASES[slug]
    if name in case.refused_by:
        pytest.skip(f"{name} cannot run {slug}")
    host, inputs, whole = plain(name)
    rotations, cache = run(host, inputs, case.active)
    sequence, prompt = getattr(cache, KEY), inputs["input_ids"].shape[1]
    for k, layer in enumerate(cache.layers):
        depth = sequence.cuts.depths[k]
        tokens = sequence.tokens if depth is None else depth.tokens
        entered = [len(r) for r in rotations[k]]
        assert entered[1:] == [1] * (STEPS - 1)
        length = sum(entered)
        assert tokens.shape[1] == length
        stored = layer.keys.shape[2] + sum(block.high.shape[1] for block in getattr(layer, "blocks", ()))
        if slug in ("mustdrop", "h2o"):
            assert stored <= length  # tokens are taken out of caches
        elif slug != "zipvl":  # holds some tokens in fewer bits
            assert stored == min(length, whole_length(layer, length))
        column = tokens.position[0].long()
        assert (column.diff() > 0).all()
        text = prompt - int((inputs["input_ids"] == host.model.config.image_token_id).sum())
        assert length - int(tokens.visual.sum()) == text + STEPS - 1
        if name in SEVERAL_AXES:
            continue
        places = column if PLACES.get(slug) == "keep" else torch.arange(length)
        if slug == "mustdrop" and k in sequence.cuts.held:  # new tokens come behind what all stages left
            places = torch.cat([torch.arange(entered[0]), len(rotations[-1][0]) + torch.arange(STEPS - 1)])
        wanted = torch.cat(whole[k])[places]
        assert torch.equal(torch.cat(rotations[k]), wanted), f"positions of layer {k}"


def whole_length(layer, length: int) -> int:
    """How many tokens this layer's cache may hold: sliding windows hold fewer."""
    window = getattr(layer, "sliding_window", None)
    return length if window is None else window - 1 if length >= window else length


def test_several_crops_are_among_the_hosts(tiny):
    """The picture of these tests is seen in more than one view where the host does so."""
    for name in ("llava_next", "llava_onevision", "internvl", "idefics3", "gemma3_pan_and_scan"):
        inputs = tiny(name).inputs(["Is there a dog?"], [[picture(80, 64, 1)]])
        views = inputs["pixel_values"].shape
        assert views[0] * (views[1] if len(views) == 5 else 1) > 1, name

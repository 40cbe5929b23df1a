"""FlowCut on towers that pack all pictures into one row (Qwen2-VL, Qwen2.5-VL), against a plain loop over their blocks."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import sightline as sl
from sightline.errors import HostError, InputError, ParameterError
from sightline.prune import FlowCut, flowcut
from tests.engine.numerics import assert_close
from tests.engine.whole import generate
from tests.tiny_hosts import TINY, TinyHost, picture

HOSTS = ("qwen2_vl", "qwen2_5_vl")
DEPTH, TARGET = 5, 2  # 4 of up to 24 tokens leave the tower, 2 go on in the decoder


@pytest.fixture(scope="module", params=HOSTS)
def host(request) -> TinyHost:
    """A tiny host whose tower has five layers, enough for three cuts; windows in some of Qwen2.5-VL's."""
    small = TINY[request.param]()
    config = copy.deepcopy(small.model.config)
    config.vision_config.depth = DEPTH
    if request.param == "qwen2_5_vl":
        config.vision_config.fullatt_block_indexes = [1, 3]
    torch.manual_seed(0)
    model = type(small.model)(config).eval()
    with torch.no_grad():  # sharp attention, so that layers before the last drop something, too
        for block in model.model.visual.blocks:
            block.attn.qkv.weight[: 2 * config.vision_config.num_heads * 8].mul_(40)
    model.generation_config = small.model.generation_config
    return TinyHost(**{**small.__dict__, "model": model})


def blocks_of(model, inputs):
    """What every tower block is given for these pictures, from a plain run: its borders, and the row and rotations."""
    seen = []
    hooks = [
        block.register_forward_pre_hook(
            lambda m, a, k: seen.append({**k, "hidden_states": a[0] if a else k["hidden_states"]}), with_kwargs=True
        )
        for block in model.model.visual.blocks
    ]
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    return seen


def attention(block, x, rotations, same):
    """One attention module by hand, (M, C) -> its output and query, key, value (H, M, d); `same` (M, M) may attend."""
    module, count = block.attn, len(x)
    q, k, v = module.qkv(x).reshape(count, 3, module.num_heads, -1).permute(1, 2, 0, 3)
    cos, sin = rotations
    turn = lambda z: torch.cat([-z[..., z.shape[-1] // 2 :], z[..., : z.shape[-1] // 2]], -1)  # noqa: E731
    q, k = (z * cos + turn(z) * sin for z in (q, k))
    weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~same, -torch.inf).softmax(-1)
    return module.proj((weights @ v).transpose(0, 1).reshape(count, -1)), q, k, v


@torch.no_grad()
def reference(model, inputs, target: int, unit: str):
    """The released loop, written out: (M', D) merged tokens and the (M,) patches they are made of, in the tower's order.

    Per picture; `unit` "patches" as released, "tokens" by groups of four.
    """
    given = blocks_of(model, inputs)
    x, rotations = given[0]["hidden_states"], given[0]["position_embeddings"]
    owner = torch.repeat_interleave(torch.arange(len(inputs["image_grid_thw"])), inputs["image_grid_thw"].prod(-1))
    alive, cum = torch.arange(len(x)), None
    for i, block in enumerate(model.model.visual.blocks):
        part = torch.bucketize(alive, given[i]["cu_seqlens"][1:], right=True)
        same = part[:, None] == part[None]
        out, q, k, v = attention(block, block.norm1(x), [r[alive] for r in rotations], same)
        x = x + out
        x = x + block.mlp(block.norm2(x))
        left, stay = DEPTH - i - 1, torch.ones(len(x), dtype=torch.bool)
        score, share = torch.zeros(len(x)), {}
        for p in owner.unique():
            mine = owner[alive] == p
            weights = (q[:, mine].mean(1, keepdim=True) @ k[:, mine].transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(
                -1
            )
            share[int(p)] = weights.mean(0)[0]
            score[mine] = share[int(p)] * v[:, mine].mean(0).abs().sum(-1)
        cum = score if cum is None else 0.5 * cum + 0.5 * score
        for p, a in share.items():
            mine = (owner[alive] == p).nonzero()[:, 0]
            if len(mine) <= target * 8 or left % 2:
                continue
            even = -(a * (a + 1e-7).log()).sum() / math.log(len(a))
            gone = int(((len(mine) - target * 8) / left**0.5 * (1 - even**2)).round()) if left else len(mine)
            wanted = max(len(mine) - gone, target * 8)
            if unit == "patches":
                best = cum[mine].topk(wanted).indices
            else:
                best = cum[mine].view(-1, 4).mean(1).topk(math.ceil(wanted / 4)).indices
                best = (best[:, None] * 4 + torch.arange(4)).flatten()
            stay[mine] = False
            stay[mine[best]] = True
        x, alive, cum = x[stay], alive[stay], cum[stay]
    return model.model.visual.merger(x), alive


def embeddings_and_tokens(host, system, inputs):
    """What enters the decoder at visual positions (M', D), their positions (3, M'), and the cache."""
    seen = []

    def see(module, args, kwargs):
        seen.append((kwargs["inputs_embeds"], kwargs["position_ids"]))

    with sl.attach(host.model, system), torch.no_grad():
        handle = host.model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
        cache = host.model(**inputs, use_cache=True).cache
        handle.remove()
    return *seen[0], cache


def order_of(host, inputs):
    """(V,) for every visual token, which group of patches of the tower's row it is."""
    if host.name == "qwen2_vl":
        return torch.arange(int(inputs["image_grid_thw"].prod(-1).sum()) // 4)
    from transformers.vision_utils import get_vision_window_index

    tower = host.model.model.visual
    index = get_vision_window_index(
        inputs["image_grid_thw"], spatial_merge_size=2, window_size=tower.window_size, patch_size=tower.patch_size
    )[0]
    return torch.as_tensor(index).argsort()


@pytest.mark.parametrize("unit", ["tokens", "patches"])
def test_the_tower_is_that_of_the_plain_loop(host, unit):
    inputs = host.inputs(["Is there a dog?"], [[picture(96, 64)]])
    merged, alive = reference(host.model, inputs, TARGET, unit)
    assert len(merged) == 2 * TARGET
    embeds, positions, cache = embeddings_and_tokens(host, FlowCut(TARGET, unit=unit), inputs)
    tokens, ids = cache._sightline.tokens, inputs["input_ids"][0]
    place = (ids == host.model.config.image_token_id).nonzero()[:, 0]  # columns of the V visual tokens
    groups = order_of(host, inputs)
    inverse = groups.argsort()
    if unit == "tokens":
        assert torch.equal(alive.view(-1, 4) % 4, torch.arange(4).expand(2 * TARGET, 4))
        wanted = inverse[alive[::4] // 4]  # visual tokens, in the order of the tower's row
    else:
        wanted = inverse[: 2 * TARGET]
    order = wanted.argsort()
    assert tokens.position[0, tokens.visual[0]].tolist() == place[wanted[order]].tolist()
    if unit == "patches" and host.name == "qwen2_vl":
        assert wanted.tolist() == list(range(2 * TARGET))  # the picture's first positions, as released
    mine = tokens.visual[0][-embeds.shape[1] :]
    assert_close("features", embeds[0, mine], merged[order], 2e-5)
    with torch.no_grad():
        plain = []
        handle = host.model.model.language_model.register_forward_pre_hook(
            lambda m, a, k: plain.append(k["position_ids"]), with_kwargs=True
        )
        host.model(**inputs)
        handle.remove()
    assert torch.equal(positions[-3:, 0, mine], plain[0][-3:, 0, place[wanted[order]]])


def test_layers_get_shorter_and_the_decoder_cuts_once_more(host):
    inputs = host.inputs(["Is there a dog?"], [[picture(96, 64)]])
    lengths = []
    with sl.attach(host.model, FlowCut(TARGET)), torch.no_grad():
        hooks = [
            block.register_forward_pre_hook(
                lambda m, a, k: lengths.append(len(a[0] if a else k["hidden_states"])), with_kwargs=True
            )
            for block in host.model.model.visual.blocks
        ]
        cache = host.model(**inputs, use_cache=True).cache
        for hook in hooks:
            hook.remove()
        _, logits = generate(host.model, inputs)
        _, again = generate(host.model, inputs, use_cache=False)
    patches = int(inputs["image_grid_thw"].prod())
    assert lengths[0] == patches
    assert lengths == sorted(lengths, reverse=True)
    assert 8 * TARGET <= lengths[-1] < lengths[1] < patches  # after layers 0 and 2 of five
    text = inputs["input_ids"].shape[1] - patches // 4
    assert [layer.keys.shape[2] for layer in cache.layers] == [text + 2 * TARGET] * 2 + [text + TARGET] * (
        len(cache.layers) - 2
    )
    assert_close("with and without a cache", logits, again, 2e-5)


def test_pictures_of_a_row_are_judged_by_themselves(host):
    """Two pictures in one forward keep what each keeps alone."""
    pictures = [picture(96, 64), picture(64, 96, 1)]
    both = host.inputs(["Are they the same?"], [pictures])
    merged, alive = reference(host.model, both, TARGET, "tokens")
    assert len(merged) == 4 * TARGET
    embeds, _, cache = embeddings_and_tokens(host, FlowCut(TARGET), both)
    tokens = cache._sightline.tokens
    assert torch.bincount(tokens.image[0, tokens.visual[0]].long()).tolist() == [2 * TARGET] * 2
    features = []
    for one in pictures:
        alone = host.inputs(["Is there a dog?"], [[one]])
        found, _, single = embeddings_and_tokens(host, FlowCut(TARGET), alone)
        features.append(found[0, single._sightline.tokens.visual[0]])
    assert_close("features", embeds[0, tokens.visual[0]], torch.cat(features), 2e-5)
    assert len(alive) == 4 * len(merged)


def test_keeping_all_is_the_host_and_leaving_restores_it(host):
    inputs = host.inputs(["Is there a dog?"], [[picture(96, 64)]])
    with torch.no_grad():
        plain = host.model(**inputs).logits
        with sl.attach(host.model, FlowCut(999)):
            assert torch.equal(host.model(**inputs).logits, plain)
        with sl.attach(host.model, FlowCut(TARGET)):
            assert not torch.equal(host.model(**inputs).logits, plain)
        assert torch.equal(host.model(**inputs).logits, plain)


def test_counts_by_hand():
    uniform = torch.full((16,), 1 / 16)
    assert flowcut.mean_prune_count(uniform, 4, 4) == 0
    assert flowcut.mean_prune_count(uniform, 0, 4) == 12
    assert flowcut.mean_prune_count(torch.eye(16)[0], 4, 4) == 6  # (16 - 4) / sqrt(4)


def test_refusals(host, tiny):
    two = host.inputs(["Are they the same?"], [[picture(), picture(80, 64, 1)]])
    with sl.attach(host.model, FlowCut(1, unit="patches")), pytest.raises(InputError, match="one picture a forward"):
        host.model(**two)
    with pytest.raises(ParameterError, match="unit='rows'"):
        FlowCut(1, unit="rows")
    with pytest.raises(HostError, match="class token"):
        sl.attach(tiny("qwen3_vl").model, FlowCut(1))

"""DAMRO: golden arrays of the official code, the sheet's invariants, and the second stream by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sightline as sl
from sightline.decode.damro import (
    DAMRO,
    cls_attention,
    contrast,
    head_attention,
    merged_heads,
    outlier_columns,
    select,
    top_patches,
)
from sightline.errors import HostError, ParameterError
from tests.engine.numerics import assert_close
from tests.steer.goldens import cases, load
from tests.tiny_hosts import TINY, picture


@cases("damro")
def test_golden(path: Path) -> None:
    case = load(path)
    if "logits" in case:
        alpha, beta = case.get("alpha", 0.5), case.get("beta", 0.1)
        found = contrast(case["logits"], case["logits_neg"], alpha=alpha, beta=beta)
        torch.testing.assert_close(found, case["out"], rtol=0, atol=1e-5)
        return
    if "qkv" in case:
        scores, features = head_attention(case["qkv"], int(case["heads"])), case["embeds"]
    else:
        scores, features = cls_attention(case["q"], case["k"]), case["features"]
    index = top_patches(scores, case["selected"].shape[1])
    assert torch.equal(select(features, index), case["selected"])
    if "cls_attn" in case:
        torch.testing.assert_close(scores, case["cls_attn"], rtol=0, atol=1e-6)
    if "idx" in case:
        assert torch.equal(index, case["idx"].long())


def test_merged_heads_come_from_the_heads_own_weights() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 10, 24), torch.randn(2, 10, 24)
    heads = [x.unflatten(-1, (4, 6)).transpose(1, 2) for x in (query, key)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) * 6**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(merged_heads(weights)[:, 1:], cls_attention(query, key), rtol=1e-5, atol=1e-7)


def test_permuting_patches_selects_the_same() -> None:
    torch.manual_seed(0)
    query, key, features = torch.randn(1, 9, 8), torch.randn(1, 9, 8), torch.randn(1, 8, 5)
    order = torch.randperm(8)
    before = select(features, top_patches(cls_attention(query, key), 3))
    key = torch.cat([key[:, :1], key[:, 1:][:, order]], 1)
    after = select(features[:, order], top_patches(cls_attention(query, key), 3))
    assert torch.equal(before, after)


def test_contrast_keeps_by_the_first_stream_only() -> None:
    torch.manual_seed(0)
    logits, negative = torch.randn(3, 50) * 3, torch.randn(3, 50) * 3
    out = contrast(logits, negative, alpha=1.5, beta=0.1)
    kept = logits.softmax(-1) >= 0.1 * logits.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(out.isfinite(), kept)
    shifted = contrast(logits, negative + torch.tensor([[1.0], [2.0], [-3.0]]), alpha=1.5, beta=0.1)
    torch.testing.assert_close(out.softmax(-1), shifted.softmax(-1))
    assert torch.equal(contrast(logits, negative, alpha=0.0, beta=0.0), logits)


def test_columns_of_two_pictures_in_two_views() -> None:
    """Text, picture 0 (views 1 and 0, a separator), text, picture 1: outliers in order, one separator each, text kept."""
    nan = torch.nan
    scores = torch.tensor([nan, nan, 0.1, 0.4, 0.2, nan, 0.9, 0.3, nan, nan, 0.5, 0.6, nan])
    pictures = torch.tensor([-1, -1, 0, 0, 0, 0, 0, 0, 0, -1, 1, 1, -1])
    views = torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, 2, 2, -1])
    real = torch.tensor([False] + [True] * 12)
    found = outlier_columns(real, scores, pictures, views, topk=2)
    assert found.tolist() == [1, 3, 4, 6, 7, 8, 9, 11, 10, 12]
    found = outlier_columns(real, scores.masked_fill(views == 1, -torch.inf), pictures, views, topk=2)
    assert found.tolist() == [1, 3, 4, 8, 9, 11, 10, 12]


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_one_step_by_hand(name: str, tiny) -> None:
    """The scores of the first token, from two plain forwards."""
    host = tiny(name)
    inputs = host.inputs(["Is there a dog?"], [[picture()]])
    system = DAMRO(alpha=1.5, topk=4, beta=0.0)
    watch = sl.record(tower="cls", sinks=False)
    with sl.attach(host.model, watch), torch.no_grad():
        first = host.model(**inputs).logits[:, -1]
    with sl.attach(host.model, system), torch.no_grad():
        found = host.model(**inputs).logits[:, -1]
    if name == "internvl":
        assert not torch.equal(found, first)
        return
    scores = merged_heads(watch.tower_seen[len(watch.tower_seen) - 2])[
        0, 1:
    ]  # the features are those of the last layer but one
    index = top_patches(scores[None], 4)[0]
    if name == "llava_next":  # four patches of the whole picture, which comes first, and the last newline
        index = torch.cat([index, torch.tensor([-1])])
    given = [inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs]
    with torch.no_grad():
        features = host.model.model.get_image_features(*given, return_dict=True)
        features.pooler_output = [features.pooler_output[0][index]]
        ids = inputs["input_ids"][0]
        image = (ids == host.model.config.image_token_id).nonzero().flatten()
        ids = torch.cat([ids[: image[0] + len(index)], ids[image[-1] + 1 :]])[None]
        second = host.model(input_ids=ids, mm_encoder_outputs={"image": features}).logits[:, -1]
    assert_close("first token", found, 2.5 * first - 1.5 * second, 1e-5)


def test_towers_without_class_token_are_refused(tiny) -> None:
    with pytest.raises(HostError, match="class token"):
        sl.attach(tiny("qwen2_5_vl").model, DAMRO())


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"topk": 0}, {"beta": 2}])
def test_bad_parameters(wrong) -> None:
    with pytest.raises(ParameterError):
        DAMRO(**wrong)


def test_published_hosts_are_all_there() -> None:
    assert {"llava", "llava_next"} <= set(TINY)

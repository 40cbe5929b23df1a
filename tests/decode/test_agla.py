"""AGLA: golden arrays of the official code, the map against scipy, the mask, and both kinds of matcher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sightline as sl
from sightline import scenes
from sightline.decode.agla import AGLA, assemble, gradcam, keep_mask, keep_ratio, masked, relevance
from sightline.errors import ModelError, ParameterError
from sightline.matching import TINY, BLIPMatcher, load_matcher
from tests.engine.numerics import assert_close
from tests.steer.goldens import cases, load
from tests.tiny_hosts import picture


@cases("agla")
def test_golden(path: Path) -> None:
    case = load(path)
    if "logits" in case:
        weights = {"alpha": case.get("alpha", 2), "beta": case.get("beta", 0.5)}
        found = assemble(case["logits"], case["logits_aug"], **weights)
        torch.testing.assert_close(found, case["out"], rtol=0, atol=1e-5)
        return
    attention, gradient = case["cross_attn"], case["cross_attn_grad"]
    words = case.get("attention_mask", torch.ones(attention.shape[2])).view(1, -1)
    cam = gradcam(attention, gradient, words, (24, 24))[0]
    torch.testing.assert_close(cam, case["gradcam_mean_token"], rtol=1e-4, atol=1e-7)
    seen = torch.from_numpy(relevance(cam.numpy())[::8, ::8])
    torch.testing.assert_close(seen.float(), case["att_map_sample"].float(), rtol=0, atol=1e-4)
    mask = np.unpackbits(case["mask_packed"].numpy(), axis=-1).astype(bool)
    similarity = 2 * (1 - case["ratio"]) if "ratio" in case else 0.37
    assert (keep_mask(cam.numpy(), similarity) != mask).mean() < 0.002


def test_relevance_is_what_scipy_computes() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    cam = np.random.default_rng(0).random((24, 20)) ** 3
    large = (cam - cam.min()) / (cam.max() - cam.min())
    zoom = (96 / 24, 96 / 20)
    large = ndimage.zoom(large, zoom, order=3, mode="grid-constant", grid_mode=True).clip(0, 1)
    wanted = ndimage.gaussian_filter(large, 0.02 * 96)
    wanted -= wanted.min()
    np.testing.assert_allclose(relevance(cam, 96), wanted / wanted.max(), atol=1e-9)


def test_masks() -> None:
    cam = np.random.default_rng(1).random((24, 24))
    assert keep_ratio(0.37) == pytest.approx(0.815)
    for similarity in (-1.0, 0.0, 0.37, 1.0):
        assert keep_mask(cam, similarity).mean() == pytest.approx(keep_ratio(similarity), abs=1e-4)
    assert keep_mask(np.ones((24, 24)), 0.9).all(), "a constant map keeps everything"
    half = np.zeros((4, 4), bool)
    half[:, :2] = True
    seen = np.asarray(masked(Image.new("RGB", (80, 60), "red"), half))
    assert (seen[:, :40] == [255, 0, 0]).all()
    assert not seen[:, 40:].any()


def test_assembly() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 40)
    out = assemble(logits, logits, alpha=2.0, beta=0.5)
    assert torch.equal(out.argmax(-1), logits.argmax(-1))
    kept = out.isfinite()
    torch.testing.assert_close(out[kept], 3 * logits[kept])
    assert torch.equal(assemble(logits, torch.randn(3, 40), alpha=0.0, beta=0.0), logits)


@pytest.mark.skipif(not TINY.exists(), reason="the bundled matcher is not here")
def test_the_bundled_matcher_knows_the_generated_world() -> None:
    """It tells kinds that are there from kinds that are not, and looks where they are."""
    assert TINY.stat().st_size < 2**20
    matcher, right, inside = load_matcher("tiny"), [], []
    for seed in range(5_000_000, 5_000_020):
        scene = scenes.draw(seed)
        for kind in scenes.KINDS:
            similarity, cam = matcher.look(scene.image, f"Is there a {kind} in the image?")
            there = [o for o in scene.objects if o.kind == kind]
            right.append((similarity > 0.5) == bool(there))
            if there:
                x, y = np.unravel_index(cam.argmax(), cam.shape)[::-1]
                inside.append(
                    any(
                        o.box[0] - 8 <= 8 * x + 4 <= o.box[2] + 8 and o.box[1] - 8 <= 8 * y + 4 <= o.box[3] + 8
                        for o in there
                    )
                )
    assert np.mean(right) > 0.8
    assert np.mean(inside) > 0.6
    similarity, cam = matcher.look(scene.image, "What is this?")
    assert similarity == 0
    assert (cam == cam[0, 0]).all()


def blip():
    """A tiny random BLIP retrieval model with a real processor."""
    import transformers as tf

    from tests.tiny_parts import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer({})
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                encoder_hidden_size=32, projection_dim=16, max_position_embeddings=64, bos_token_id=1, sep_token_id=2,
                pad_token_id=0)  # fmt: skip
    config = tf.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=16)
    size = {"height": 32, "width": 32}
    return tf.BlipForImageTextRetrieval(config), tf.BlipProcessor(tf.BlipImageProcessor(size=size), tokenizer)


def test_a_blip_matcher_gives_gradcams() -> None:
    """The map of a sum of gradients times attention, at the asked block; the same under inference mode."""
    matcher = BLIPMatcher(*blip(), block=0)  # in the last block only the first word counts
    similarity, cam = matcher.look(picture(), "Is there a dog?")
    assert -1 <= similarity <= 1
    assert cam.shape == (4, 4)
    assert (cam >= 0).all()
    assert cam.max() > 0
    with torch.inference_mode():
        again = matcher.look(picture(), "Is there a dog?")
    np.testing.assert_allclose(again[1], cam, rtol=1e-5)
    with pytest.raises(ParameterError, match="choose"):
        BLIPMatcher(*blip(), block=6)


def test_an_unknown_matcher_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match="choose tiny"):
        load_matcher(str(tmp_path / "nothing"))


@pytest.mark.skipif(not TINY.exists(), reason="the bundled matcher is not here")
def test_one_step_by_hand(tiny) -> None:
    host = tiny("gemma3")
    question, shown = "Is there a dog?", picture()
    similarity, cam = load_matcher("tiny").look(shown, question)
    other = masked(shown, keep_mask(cam, similarity, ratio=0.3))
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        first, second = (
            host.model.generate(**host.inputs([question], [[p]]), **options).logits[0] for p in (shown, other)
        )
    with sl.attach(host.model, AGLA(alpha=1.5, beta=0.0, ratio=0.3)) as attached:
        out = host.model.generate(**host.inputs([question], [[shown]]), **options).logits[0]
    assert_close("first token", out, first + 1.5 * second, 2e-5)
    assert attached.report()["agla"]["pictures"] == 1
    assert attached.report()["agla"]["mean_share_kept"] == pytest.approx(0.3, abs=0.01)

from __future__ import annotations

import numpy as np
import pytest
import torch

from sightline import scenes
from sightline.learn import build, tower
from sightline.learn.recipe import TOY


@pytest.fixture(scope="module")
def scene():
    return next(s for s in map(scenes.draw, range(50)) if any(o.mark for o in s.objects))


def test_normalise_is_what_the_processor_does(toy_processor):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 56, 56, 3), dtype=np.uint8)
    theirs = toy_processor.image_processor(list(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower.normalise(torch.from_numpy(pixels)), theirs, atol=1e-5, rtol=1e-5)


def test_patch_labels_agree_with_the_masks(scene):
    labels = tower.labels_of(scene, 8)
    for y, x in np.ndindex(14, 14):
        window = np.s_[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        shares = [thing.mask[window].mean() for thing in scene.objects]
        if max(shares) < tower.COVERED:
            assert labels["kind"][y, x] == 0
            assert labels["colour"][y, x] == -1
            continue
        owners = [thing for thing, share in zip(scene.objects, shares, strict=True) if share == max(shares)]
        assert tower.KINDS[labels["kind"][y, x] - 1] in {thing.kind for thing in owners}
        assert tower.COLOURS[labels["colour"][y, x]] in {thing.colour for thing in owners}
        centre = (np.array([x, y]) + 0.5) * 8 + labels["offset"][y, x] * scene.size / 4
        assert any(np.allclose(centre, thing.centre, atol=1e-3) for thing in owners)


def test_global_labels_and_marks(scene):
    labels = tower.labels_of(scene, 8)
    assert {tower.KINDS[k] for k in np.flatnonzero(labels["present"])} == set(scene.counts())
    assert tower.CONTEXTS[int(labels["context"])] == scene.context
    marks = {tower.COLOURS[m - 1] for m in labels["mark"][labels["mark"] > 0]}
    assert marks
    assert marks <= {thing.mark for thing in scene.objects}


def test_a_few_steps_lower_the_loss_and_repeat_exactly(toy, tmp_path):
    from dataclasses import replace

    recipe = replace(TOY, tower=replace(TOY.tower, steps=12, batch=4, lr=5e-3))
    first = tower.train(toy.model.vision_tower, recipe, tmp_path / "a", precision=None)
    losses = [row["loss"] for row in first.curve]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:2])
    again = build.model(TOY.shape, _Sized(toy.config.text_config), 0)
    second = tower.train(again.model.vision_tower, recipe, tmp_path / "b", precision=None)
    assert [row["loss"] for row in second.curve] == losses


class _Sized:
    """Just enough of a tokenizer for build.model: the sizes of an existing configuration."""

    def __init__(self, config):
        self.config = config
        self.bos_token_id, self.eos_token_id, self.pad_token_id = 0, 1, 2

    def __len__(self):
        return self.config.vocab_size

    def convert_tokens_to_ids(self, _token):
        return 3

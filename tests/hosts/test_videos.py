"""Videos on the hosts that take them: the ledger and the layouts know the frame of every visual token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sightline as sl
from sightline import hosts
from sightline.clips import Clip
from sightline.engine.record import record
from sightline.engine.select import Keep
from sightline.engine.system import System
from sightline.lvlm import LVLM
from tests.hosts.squares import grey, make_local
from tests.tiny_hosts import TINY

VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
MERGED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # two frames make one group
SIZE = (64, 48)


def lvlm_of(name: str) -> LVLM:
    tiny = TINY[name]()
    return LVLM(tiny.model, tiny.processor, hosts.find(tiny.model), name)


def clip_of(frames) -> Clip:
    return Clip(tuple(frames), tuple(0.5 * k for k in range(len(frames))))


class Catch(System):
    """Keeps the decoder's input."""

    def __init__(self):
        self.seen = []

    def visual_tokens(self, site, embeddings):
        self.seen.append((site.tokens, embeddings.clone(), site.pictures.places))


@torch.no_grad()
def tokens_of(lvlm: LVLM, clip: Clip, questions=("What moves?",)):
    catch = Catch()
    with sl.attach(lvlm.model, catch, host=lvlm.host):
        inputs = lvlm.inputs([clip] * len(questions), list(questions))
        lvlm.model.generate(**inputs, max_new_tokens=1)
    tokens, embeddings, places = catch.seen[0]
    return tokens, embeddings, places, inputs


@pytest.mark.parametrize("name", VIDEO)
def test_the_frame_of_every_token(name) -> None:
    """A white square in one frame changes exactly that frame's tokens, and there those whose boxes it touches."""
    lvlm = lvlm_of(name)
    assert lvlm.takes_videos
    make_local(lvlm.model)
    square = (6, 4, 20, 16)
    plain = clip_of([grey(SIZE)] * 6)
    tokens, before, places, inputs = tokens_of(lvlm, plain)
    layouts = lvlm.host.frame_layouts(lvlm.processor, inputs, [(*SIZE, 6)], lvlm.model)
    groups = 3 if name in MERGED else 6
    assert len(layouts) == groups
    assert int(tokens.image.max()) + 1 == groups
    for k, layout in enumerate(layouts):
        assert int((tokens.image[0] == k).sum()) == len(layout)
    assert len(places.layouts) == groups
    for odd in (0, 3, 5):
        frames = [grey(SIZE, square if k == odd else None) for k in range(6)]
        _, after, _, _ = tokens_of(lvlm, clip_of(frames))
        changed = (after - before)[0].abs().amax(-1) > 1e-4  # (N,)
        group = odd * groups // 6
        assert set(tokens.image[0][changed].tolist()) == {group}
        layout = layouts[group]
        which = tokens.index[0][changed].tolist()
        x0, y0, x1, y1 = layout.boxes[which].T
        grow = 6 * max(SIZE) / 48  # resampling carries a little further
        assert ((x0 < square[2] + grow) & (x1 > square[0] - grow)).all()
        assert ((y0 < square[3] + grow) & (y1 > square[1] - grow)).all()
        centre = layout.token_at(13, 10)
        assert centre in which


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "internvl"])
def test_batches_and_text_between(name) -> None:
    lvlm = lvlm_of(name)
    rng = np.random.default_rng(0)
    from PIL import Image

    clip = clip_of([Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)) for _ in range(4)])
    tokens, _, _, _ = tokens_of(lvlm, clip, ("What moves?", "Is it the red one or the green one?"))
    for row in (0, 1):
        mine = tokens.image[row][tokens.image[row] >= 0]
        assert (mine.diff() >= 0).all()
        assert torch.equal(mine, tokens.image[0][tokens.image[0] >= 0])
    rec = record(sinks=False)
    with sl.attach(lvlm.model, rec, host=lvlm.host):
        lvlm.ask(clip, "What moves?", max_new_tokens=2)
    assert torch.equal(rec.seen.tokens.image[0][rec.seen.tokens.image[0] >= 0], mine)


class Drop(System):
    """Leaves out all tokens of one frame."""

    slug = "drop"

    def visual_tokens(self, site, embeddings):
        return Keep(site.tokens.image[:, site.start :] != 1)


@pytest.mark.parametrize("name", VIDEO)
def test_a_frame_can_be_dropped(name) -> None:
    lvlm = lvlm_of(name)
    clip = clip_of([grey(SIZE, (4 * k, 4, 4 * k + 20, 20)) for k in range(4)])
    inputs = lvlm.inputs(clip, "What moves?")
    tokens, _, _, _ = tokens_of(lvlm, clip)
    with sl.attach(lvlm.model, Drop(), host=lvlm.host), torch.no_grad():
        made = lvlm.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    cache = getattr(made, "past_key_values", None)
    cache = cache if cache is not None else made.cache
    gone = int((tokens.image[0] == 1).sum())
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] - gone + 1

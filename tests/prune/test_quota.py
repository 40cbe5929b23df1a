"""QuoTA: golden arrays of the official code, the sheet's invariants, and its passes on tiny hosts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline import hosts, scenes
from sightline.clips import Clip
from sightline.engine.passes import Passes
from sightline.engine.sequences import made_cache
from sightline.errors import InputError, ParameterError
from sightline.lvlm import LVLM
from sightline.prune.quota import (
    QuoTA,
    assign,
    decided,
    frame_question,
    objects_of,
    scale_weights,
    shares,
    sides,
    soft_match,
    weigh,
)
from tests import goldens
from tests.tiny_hosts import TINY, picture

GOLDEN = goldens.GOLDEN / "quota"
SIX = [picture(48, 48, k) for k in range(6)]


def golden_cases() -> list[Path]:
    return sorted(GOLDEN.glob("*.npz"))


@pytest.mark.skipif(not golden_cases(), reason="golden arrays are not here")
@pytest.mark.parametrize("path", golden_cases(), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case = dict(np.load(path))
    if "frames" not in case:
        np.testing.assert_array_equal(scale_weights(case["weights"], float(case["max_value"])), case["out"])
        return
    np.testing.assert_allclose(weigh(case["yes_prob"]), case["weights"], rtol=1e-12)
    side, budget = int(case["side"]), int(case["enhance_total"] * case["enhance_tokens"])
    out = assign(torch.from_numpy(case["frames"]), case["weights"], budget, (side, side), str(case["version"]))
    wanted = [case[f"out{k}"] for k in range(sum(name.startswith("out") for name in case))]
    assert len(out) == len(wanted)
    for mine, theirs in zip(out, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert np.abs(mine.numpy() - theirs).max() <= 1e-5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20), st.integers(1, 900), st.sampled_from(("v1", "v2", "v3")))
def test_shares_stay_in_the_budget(chances, budget, version) -> None:
    counts = shares(weigh(chances), budget, 36, version)
    assert sum(counts) <= budget
    assert all(n >= 0 for n in counts)
    if version != "v1":
        assert max(counts) <= 36
    for n in counts:
        if n:
            h, w = sides(n, (6, 6))
            assert abs(h - w) <= 1
            assert h * w <= n
            assert n < (h + 1) * (w + 1)


def test_shares_of_equal_frames_are_equal_and_scaling_changes_nothing() -> None:
    assert shares([1.0] * 4, 40, 36) == [10] * 4
    chances = np.array([0.5, 0.1, 0.3])
    assert shares(weigh(chances), 100, 36) == shares(weigh(chances * 0.25), 100, 36)
    assert shares(weigh([0.0, 0.0]), 10, 36) == [5, 5]  # all zero: equal shares


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v5"])
def test_a_whole_share_is_the_frame_itself(version) -> None:
    frames = torch.randn(3, 36, 5)
    out = assign(frames, [1.0] * 3, 3 * 36, (6, 6), version)
    for mine, frame in zip(out, frames, strict=True):
        assert torch.equal(mine.reshape(36, 5), frame)


def test_merging_keeps_the_sum_within_a_round() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    merged = soft_match(x, 6)
    assert merged.shape == (2, 6, 4)
    assert torch.equal(soft_match(x, 9), x)
    twin = torch.cat([x[:, :1], x[:, :1], x[:, 1:4]], 1)  # tokens 0 and 1 are equal: they are what is merged
    assert torch.allclose(soft_match(twin, 4)[:, 2:3], twin[:, :1])


def test_reading_of_the_three_steps() -> None:
    assert objects_of('Step 1: Yes\nStep 2: ["A", "b"]\nStep 3: ["red cup", "Dog "]') == ["red cup", "dog"]
    for bad in ("", "Step 1: no\nStep 3: ['cup']", "Step 1: yes\nStep 3: [open('x')]", "Step 1: yes\nStep 3: null"):
        assert objects_of(bad) == []
    assert "any object of cup, dog?" in frame_question("?", ["cup", "dog"])
    assert frame_question("Who?", []).startswith("Who?\n")


def lvlm_of(name: str) -> LVLM:
    tiny = TINY[name]()
    return LVLM(tiny.model, tiny.processor, hosts.find(tiny.model), name)


def test_tokens_of_every_frame_follow_its_probability(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(["What moves?"], [SIX])
    chances = (0.9, 0.0, 0.4, 0.01, 0.8, 0.2)
    system = QuoTA(enhance_tokens=12, enhance_total=6, probabilities=chances)
    with sl.attach(host.model, system) as attached, torch.no_grad():
        made = host.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    counts = shares(weigh(chances), 72, 36)
    each = [int(np.prod(sides(min(n, 36), (6, 6)))) if n > 0 else 0 for n in counts]
    assert attached.report()["quota"]["tokens_per_frame"] == each
    kept = sum(each)
    cache = getattr(made, "past_key_values", None) or made.cache
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] - 6 * 36 + kept + 1


def test_its_passes_ask_and_score_every_frame() -> None:
    lvlm = lvlm_of("llava")
    passes = Passes(lvlm, SIX, "Where is the cup?")
    found = QuoTA(enhance_tokens=6, enhance_total=6).plan(passes)
    assert len(found.probabilities) == 6
    assert len(set(found.probabilities)) == 6
    question = frame_question("Where is the cup?", [])
    alone = passes.lvlm.inputs(SIX[2], question)
    with torch.no_grad():
        logits = lvlm.model(**alone).logits[0, -1].softmax(-1)
    token = lvlm.processor.tokenizer.encode("A", add_special_tokens=False)[-1]
    assert abs(float(logits[token]) - found.probabilities[2]) < 1e-5  # padding and batch change nothing
    clip = Clip(tuple(SIX), tuple(range(6)))
    plain = lvlm.ask(clip, "Where is the cup?", max_new_tokens=6)
    assert lvlm.ask(clip, "Where is the cup?", systems=[QuoTA(enhance_total=0)], max_new_tokens=6) == plain
    short = lvlm.ask(
        [clip] * 2, "Where is the cup?", systems=[QuoTA(enhance_tokens=2, enhance_total=6)], max_new_tokens=6
    )
    assert short[0] == short[1] != plain


def test_a_still_picture_has_no_more_tokens_than_it_has(tiny) -> None:
    """Its share is the whole budget, far above what there is: the report says what was kept, and nothing changes."""
    host = tiny("llava")
    inputs = host.inputs(["What is it?"], [SIX[:1]])
    plain = host.model.generate(**inputs, max_new_tokens=3)
    with sl.attach(host.model, QuoTA()) as attached:
        assert torch.equal(host.model.generate(**inputs, max_new_tokens=3), plain)
    assert attached.report()["quota"] == {"tokens_per_frame": [36]}


FULL = 'Step 1: Yes\nStep 2: ["A", "b"]\nStep 3: ["red cup", "Dog "]'


@pytest.mark.parametrize(
    "answer", [FULL, "Step 1: no, since\nStep 3: ['cup']", "step 3: [3]\nStep 1: yes, STEP 3: ['x']"]
)
def test_an_answer_is_decided_when_no_more_text_changes_it(answer) -> None:
    """Cut anywhere behind the first decided place, or made longer, it is read alike; before, it is not decided."""
    first = next(k for k in range(len(answer) + 1) if decided(answer[:k]))
    for more in ("", *(answer[first:k] for k in range(first, len(answer) + 1)), "\nStep 1: no\nStep 3: ['y']"):
        assert decided(answer[:first] + more)
        assert objects_of(answer[:first] + more) == objects_of(answer[:first]) == objects_of(answer)
    assert not decided("Step 1: perhaps\nStep 3: ['x']")


def test_nothing_is_generated_behind_what_is_wanted() -> None:
    lvlm = lvlm_of("llava")
    seen: list[str] = []

    def enough(answer: str) -> bool:
        seen.append(answer)
        return len(seen) == 3

    whole = Passes(lvlm, SIX, "?").ask("Which objects?", max_new_tokens=8)
    short = Passes(lvlm, SIX, "?").ask("Which objects?", max_new_tokens=8, until=enough)
    assert len(seen) == 3
    assert short == seen[-1].strip() != whole
    assert whole.startswith(short)


def test_scoring_makes_logits_of_one_token_and_no_cache() -> None:
    lvlm = lvlm_of("llava")
    rows, caches = [], []

    def look(module, args, output) -> None:
        rows.append(output.logits.shape[1])
        caches.append(made_cache(output))

    hook = lvlm.model.register_forward_hook(look)
    Passes(lvlm, SIX, "?").chances("Is it there?", "A", SIX)
    hook.remove()
    assert rows == [1]
    assert caches == [None]


def test_wrong_settings() -> None:
    with pytest.raises(ParameterError, match="v1"):
        QuoTA(enhance_version="v9")
    with pytest.raises(ParameterError):
        QuoTA(weight_scale=(100.0,))
    with pytest.raises(ParameterError):
        QuoTA(probabilities=(0.5, 1.5))
    assert QuoTA().frames_for(1800) == 96 + 32
    host = TINY["llava"]()
    with sl.attach(host.model, QuoTA(probabilities=(0.5, 0.5))), pytest.raises(InputError, match="6"):
        host.model.generate(**host.inputs(["What?"], [SIX]), max_new_tokens=1)


def test_a_film_of_the_world() -> None:
    """The host's own path for videos: tokens of dropped frames are gone, others stay."""
    film = scenes.film(3, frames=8, size=64)
    clip = Clip(film.frames, tuple(k / 2 for k in range(8)))
    lvlm = lvlm_of("llava_onevision")
    inputs = lvlm.inputs(clip, "What moves?")
    system = QuoTA(enhance_tokens=2, enhance_total=8, probabilities=(0.0,) * 6 + (0.5, 0.5))
    with sl.attach(lvlm.model, system), torch.no_grad():
        made = lvlm.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    cache = getattr(made, "past_key_values", None) or made.cache
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] - 6 * 4

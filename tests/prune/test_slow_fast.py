"""Slow-fast: golden arrays of the official code, the sheet's invariants, caching, files, and training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sightline as sl
from sightline import hosts
from sightline.errors import InputError, ParameterError
from sightline.learn import slow_fast as learning
from sightline.lvlm import LVLM
from sightline.prune.parts.slow_branch import SlowBranch, branch_state
from sightline.prune.slow_fast import SlowFast, average, fast_frames, read_slow, sample_fast_frames
from tests import goldens
from tests.engine.whole import forward
from tests.tiny_hosts import TINY, picture

GOLDEN = goldens.GOLDEN / "slow-fast"
SIX = [picture(48, 48, k) for k in range(6)]
SMALL = SlowFast(temporal_stride=2, min_fast_frames=2, every_n_layers=2)


def golden_cases() -> list[Path]:
    return sorted(GOLDEN.glob("*.npz"))


def as_fast(frames: torch.Tensor, case: dict) -> torch.Tensor:
    side = math.isqrt(frames.shape[1])
    names = ("temporal_stride", "min_fast_frames")
    settings = {name: int(case[name]) for name in names} | {"sampling_stride": int(case["temporal_sampling_stride"])}
    fast = fast_frames(frames, **settings)[0] if len(frames) > 1 else frames
    return average(fast, (side, side), int(case["spatial_stride"]))[0].flatten(0, 1)


@pytest.mark.skipif(not golden_cases(), reason="golden arrays are not here")
@pytest.mark.parametrize("path", golden_cases(), ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    case = dict(np.load(path))
    if "frames0" in case:
        for k in range(sum(name.startswith("frames") for name in case)):
            frames = torch.from_numpy(case[f"frames{k}"])
            assert np.abs(as_fast(frames, case).numpy() - case[f"fast{k}"]).max() <= 1e-6
            np.testing.assert_array_equal(frames.flatten(0, 1).numpy(), case[f"slow{k}"])
        return
    case = {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in case.items()}
    output = case["attn_output"]
    branch = SlowBranch(output.shape[2], case["heads"], case["kv_heads"], output.shape[2] // case["heads"])
    branch.load_state_dict({k[2:]: v for k, v in case.items() if k.startswith("w.")})
    given = (case["query_after_rope"], case["slow_tokens_normed"], case["slow_mask"], case["token_type"])
    with torch.no_grad():
        out = read_slow(output, *given, branch, case["impl"])
    assert (out - case["out"]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("total", "stride", "least", "found"), [(8, 4, 2, [0, 4]), (3, 2, 5, [0, 1, 2]), (10, 4, 4, [0, 2, 5, 7])]
)
def test_sampling(total, stride, least, found) -> None:
    assert sample_fast_frames(total, stride, least) == found


def toy(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    branch = SlowBranch(16, 4, 2, 4)
    with torch.no_grad():
        branch.cross_attn_warm_up_gate.fill_(0.7)
    output, slow = (torch.randn(2, n, 16, generator=generator) for n in (7, 9))
    query = torch.randn(2, 7, 4, 4, generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)
    kinds = torch.tensor([[1, 3, 3, 1, 2, 2, 4], [4, 1, 1, 1, 2, 2, 2]])
    return output, query, slow, mask, kinds, branch


@torch.no_grad()
def test_laws() -> None:
    output, query, slow, mask, kinds, branch = toy()
    out = read_slow(output, query, slow, mask, kinds, branch, "text-only-vanilla")
    moved = (out != output).any(-1)
    assert moved[0].tolist() == [True, False, False, True, True, True, False]
    assert not moved[1].any(), "a sample without a video"
    order = torch.randperm(9)
    again = read_slow(output, query, slow[:, order], mask, kinds, branch, "text-only-vanilla")
    assert torch.allclose(again, out, atol=1e-6)
    longer = torch.cat([slow, torch.full((2, 3, 16), 50.0)], 1)
    padded = torch.nn.functional.pad(mask, (0, 3), value=False)
    assert torch.allclose(read_slow(output, query, longer, padded, kinds, branch, "text-only-vanilla"), out, atol=1e-6)
    late = read_slow(output, query, slow, mask, kinds, branch, "text-only-vanilla-masksystem")
    assert torch.equal(late[0, 0], output[0, 0])
    assert torch.allclose(late[0, 1:], out[0, 1:])
    everyone = read_slow(output, query, slow, mask, kinds, branch, "vanilla")
    assert (everyone[0] != output[0]).any(-1).all()
    branch.cross_attn_warm_up_gate.zero_()
    assert torch.equal(read_slow(output, query, slow, mask, kinds, branch, "text-only-vanilla"), output)


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        branch = SlowBranch(3584, 28, 4, 128)
    assert sum(p.numel() for p in branch.parameters()) == 3_674_626


def test_a_new_branch_starts_from_the_layers_own_heads() -> None:
    key, value, branch = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8), SlowBranch(16, 4, 2, 4)
    branch.start_from(key, value)
    x = torch.randn(1, 5, 16)
    k, v = branch.keys_values(x)
    assert torch.allclose(k.transpose(1, 2).flatten(2), key(x), atol=1e-6)
    assert torch.allclose(v.transpose(1, 2).flatten(2), value(x), atol=1e-6)


def opened(attached, alpha: float = 2.0) -> None:
    """Let the branch speak."""
    for part in attached.setup("slow-fast").branch.values():
        with torch.no_grad():
            part.cross_attn_warm_up_gate.fill_(alpha)


def made(host, inputs, system, alpha=2.0, **more):
    with sl.attach(host.model, system) as attached, torch.no_grad():
        opened(attached, alpha)
        out = host.model.generate(**inputs, max_new_tokens=5, output_logits=True, return_dict_in_generate=True, **more)
        return torch.stack(out.logits, 1), getattr(out, "past_key_values", None), attached.report()["slow-fast"]


def test_tokens_and_what_reads_them(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(["What moves?", "Is it a red ball?"], [SIX, SIX[::-1]])
    quiet, cache, report = made(host, inputs, SMALL, alpha=0.0)
    assert report == {"fast_tokens": [27, 27], "slow_tokens": [54, 54]}  # 6 frames of 3 x 3; means of two
    if cache is not None:
        assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] - 6 * 36 + 27 + 4
    loud, _, _ = made(host, inputs, SMALL)
    assert (loud[:, 0] - quiet[:, 0]).abs().max() > 1e-3
    official, _, _ = made(
        host, inputs, SlowFast(temporal_stride=2, min_fast_frames=2, every_n_layers=2, answers_read=False)
    )
    assert torch.equal(official[:, 0], loud[:, 0])
    assert (official[:, 1:] - loud[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_kept_keys_are_those_computed_anew(name, tiny) -> None:
    """A cache against none at all, and a padded row against the row alone."""
    host = tiny(name)
    inputs = host.inputs(["What moves?", "Is it a red ball or a green one?"], [SIX, SIX[::-1]])
    with_cache, _, _ = made(host, inputs, SMALL)
    without, _, _ = made(host, inputs, SMALL, use_cache=False)
    assert (with_cache - without).abs().max() < 2e-4
    alone, _, _ = made(host, host.inputs(["What moves?"], [SIX]), SMALL)
    assert (alone[0] - with_cache[0]).abs().max() < 2e-4


def test_a_still_picture_keeps_its_tokens(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(["What is it?"], [SIX[:1]])
    plain = forward(host.model, inputs)
    with sl.attach(host.model, SMALL):
        assert torch.equal(forward(host.model, inputs), plain)


def test_files(tmp_path, tiny) -> None:
    host = tiny("llava")
    with sl.attach(host.model, SMALL) as attached:
        opened(attached)
        branch = attached.setup("slow-fast").branch
        assert "model.layers.2.self_attn.cross_attn_gate_proj.0.weight" in branch_state(branch)
        learning.save_branch(branch, tmp_path / "branch.safetensors")
    again = SlowFast(
        temporal_stride=2, min_fast_frames=2, every_n_layers=2, weights=str(tmp_path / "branch.safetensors")
    )
    with sl.attach(host.model, again) as attached:
        for name, value in branch_state(attached.setup("slow-fast").branch).items():
            assert torch.equal(value, branch_state(branch)[name])
    with (
        pytest.raises(InputError, match="cross_attn"),
        sl.attach(host.model, SlowFast(every_n_layers=1, weights=again.weights)),
    ):
        pass
    with (
        pytest.raises(InputError, match="cannot read"),
        sl.attach(host.model, SlowFast(weights=str(tmp_path / "none"))),
    ):
        pass
    with pytest.raises(ParameterError):
        SlowFast(implementation="all")


def test_training_learns_and_reads(tmp_path) -> None:
    tiny = TINY["llava"]()
    lvlm = LVLM(tiny.model, tiny.processor, hosts.find(tiny.model), "llava")
    plan = learning.plan_for(2, steps=3, batch=2)
    before = {k: v.clone() for k, v in lvlm.model.state_dict().items()}
    trainer = learning.train(lvlm, SMALL, 2, plan, tmp_path, frames=4, size=56)
    assert trainer.done
    assert len(trainer.curve) == 3
    gates = [p for name, p in trainer.parameters.items() if name.endswith("warm_up_gate")]
    assert all((g != 0).all() for g in gates), "alpha starts at zero and must move"
    changed = {k for k, v in lvlm.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("language_model" in k for k in changed)
    assert not any("vision_tower" in k for k in changed)
    assert SlowFast(every_n_layers=2, weights=str(tmp_path / "branch.safetensors")).weights

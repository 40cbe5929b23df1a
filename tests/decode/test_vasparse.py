"""VASparse: golden arrays of the official score, the sheet's invariants, and each of its three parts alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sightline as sl
from sightline.decode import LQCD, vasparse
from sightline.decode.vasparse import VASparse, budget, keep_mask, relation, score, sink_bias
from sightline.engine.attention import Probe
from sightline.engine.select import best
from sightline.engine.sequences import made_cache
from sightline.engine.tokens import Role
from sightline.errors import AttachError, ParameterError
from sightline.prune import PyramidDrop
from tests.engine.numerics import assert_close
from tests.engine.toys import toy
from tests.engine.whole import generate
from tests.steer.goldens import cases, load
from tests.tiny_hosts import picture

OFF = {"mask_rate": 1.0, "alpha": 0.0, "beta": 0.0, "penalty": 0.0}


def inputs(host):
    return host.inputs(["Is there a dog?", "How many red cups?"], [[picture()], [picture(80, 64, 1)]])


@cases("vasparse")
def test_golden(path: Path) -> None:
    case = load(path)
    received = relation(case["attn"], case["image_begin"], case["image_len"])
    torch.testing.assert_close(received, case["relation"], rtol=0, atol=1e-6)
    scores = score(received, case.get("prior", 1.0), lam=case["lam"], weight=case.get("weight", 1.0))
    assert torch.equal(keep_mask(scores, case["keep_ratio"]), case["keep"].bool())


def test_scores_do_not_know_heads_and_keep_as_many_as_they_should() -> None:
    attention = torch.rand(2, 4, 9, 9).softmax(-1)
    torch.testing.assert_close(relation(attention[:, [2, 0, 3, 1]], 2, 5), relation(attention, 2, 5))
    for ratio in (0.0, 0.3, 0.5, 0.99, 1.0):
        kept = keep_mask(score(relation(attention, 2, 5)), ratio).sum(-1)
        assert kept.tolist() == [min(int(5 * ratio), 4)] * 2
        assert budget(torch.tensor([[True] * 5 + [False] * 2, [False] * 7]), ratio).tolist() == [
            min(int(5 * ratio), 4),
            0,
        ]


def test_only_text_above_the_mean_is_penalised() -> None:
    received = torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.1]])
    text = torch.tensor([[True, True, False, True, True]])
    bias = sink_bias(received, text, 0.5)
    mean = (0.4 + 0.1 + 0.1 + 0.1) / 4
    torch.testing.assert_close(bias, torch.tensor([[-0.5 * np.log(0.4 / mean), 0, 0, 0, 0]], dtype=torch.float32))


def test_the_cache_keeps_half_of_the_picture(tiny) -> None:
    """What is left are the tokens that the text behind the picture looked at most, layer by layer."""
    host = tiny("llava")
    seen = sl.record(maps=True, sinks=False)
    one = host.inputs(["Is there a dog?"], [[picture()]])
    with sl.attach(host.model, VASparse(**{**OFF, "mask_rate": 0.5}), seen) as attached, torch.no_grad():
        cache = made_cache(host.model(**one))
        columns = torch.where(seen.seen.tokens.visual[0])[0]
        for layer, weights in seen.seen.maps[0].items():
            received = weights[0].mean(0)[columns[-1] + 1 :, columns].mean(0)
            wanted = columns[keep_mask(score(received[None]), 0.5)[0]]
            kept = cache.layers[layer].keys.shape[-2]
            assert kept == one["input_ids"].shape[1] - len(columns) + len(wanted)
        assert attached.report()["vasparse"]["mean_share_kept"] == pytest.approx(0.5)


def test_nothing_dropped_means_no_contrast(tiny) -> None:
    """With mask_rate 1 the sparse pass is the pass itself: L* = L."""
    host = tiny("qwen2_5_vl")
    plain = generate(host.model, inputs(host))
    with sl.attach(host.model, VASparse(**{**OFF, "alpha": 2.0, "beta": 1e-6})):
        found = generate(host.model, inputs(host))
    assert torch.equal(found[0], plain[0])
    kept = found[1].isfinite()
    assert_close("logits", found[1][kept], plain[1][kept], 5e-5)


def test_each_part_acts(tiny) -> None:
    host = tiny("llava")
    plain = generate(host.model, inputs(host))[1]
    for part in ({"mask_rate": 0.3}, {"penalty": 3.0}):
        with sl.attach(host.model, VASparse(**{**OFF, **part})):
            found = generate(host.model, inputs(host))[1]
        assert torch.equal(found[:, 0], plain[:, 0]), "neither changes the first token"
        assert (found[:, 1:] - plain[:, 1:]).abs().max() > 1e-3, part
    with sl.attach(host.model, VASparse(**{**OFF, "mask_rate": 0.3, "alpha": 1.0})):
        assert (generate(host.model, inputs(host))[1][:, 0] - plain[:, 0]).abs().max() > 1e-3


def test_it_names_what_it_cannot_run_with(tiny) -> None:
    with pytest.raises(AttachError, match="second prompt"):
        sl.attach(tiny("llava").model, VASparse(), LQCD())
    with pytest.raises(ParameterError, match="sparse_layer"):
        sl.attach(tiny("llava").model, VASparse(sparse_layer=40))


def test_contrast_with_the_head_by_hand(tiny) -> None:
    """Equation 6 without a second stream: no decoder for what is subtracted. Strength 0 is the host."""
    host = tiny("llava")
    plain = generate(host.model, inputs(host), 1)[1][:, 0]
    with sl.attach(host.model, VASparse(**{**OFF, "alpha": 0.4, "beta": 0.3, "contrast_with": "head"})):
        found = generate(host.model, inputs(host), 1)[1][:, 0]
    with torch.no_grad():
        embedded = host.model.lm_head(host.model.get_input_embeddings()(inputs(host)["input_ids"][:, -1]))
    kept = plain.softmax(-1) >= 0.3 * plain.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(found.isfinite(), kept)
    assert_close("first token", found[kept], (1.4 * plain - 0.4 * embedded)[kept], 1e-5)
    with sl.attach(host.model, VASparse(contrast_with="head"), LQCD()):  # no second stream, so company is welcome
        generate(host.model, inputs(host), 2)
    assert VASparse(**{**OFF, "contrast_with": "head"}).idle()
    assert not VASparse(**{**OFF, "alpha": 0.1, "contrast_with": "head"}).idle()
    with sl.attach(host.model, VASparse(**{**OFF, "penalty": 1e-9, "contrast_with": "head"})):
        assert torch.equal(generate(host.model, inputs(host), 1)[1][:, 0], plain)


@pytest.mark.parametrize("dola", [True, False])
def test_as_released_by_hand(dola, tiny) -> None:
    """The last layer's scores against the head on the last token's embedding, step by step, in a padded batch."""
    host = tiny("llava")
    system = VASparse(mode="release", alpha=0.3, beta=0.2, dola=dola)
    with sl.attach(host.model, system):
        ids, scores = generate(host.model, inputs(host))
    prompt = inputs(host)["input_ids"].shape[1]
    with torch.no_grad():
        for step in range(scores.shape[1]):
            read = ids[:, : prompt + step]
            mask = torch.nn.functional.pad(inputs(host)["attention_mask"], (0, step), value=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            given = {**inputs(host), "input_ids": read, "attention_mask": mask}
            last = host.model(**given, position_ids=positions).logits[:, -1]
            embedded = host.model.lm_head(host.model.get_input_embeddings()(read[:, -1]))
            if dola:
                wanted = last.log_softmax(-1) - embedded.log_softmax(-1) - 0.3 * embedded
                kept = last.softmax(-1) >= 0.2 * last.softmax(-1).amax(-1, keepdim=True)
                wanted = wanted.masked_fill(~kept, -torch.inf).log_softmax(-1)
            else:
                wanted = (last - 0.3 * embedded).log_softmax(-1)
            assert torch.equal(scores[:, step].isfinite(), wanted.isfinite())
            here = wanted.isfinite()
            assert_close(f"step {step}", scores[:, step][here], wanted[here], 2e-5)


def test_budgets_are_those_of_python() -> None:
    """int(100 * 0.29) is 28 in double precision, and 29 in single."""
    visual = torch.arange(100)[None] < torch.tensor([[100], [60], [0]])
    assert budget(visual, 0.29).tolist() == [28, 17, 0]
    assert int(keep_mask(torch.randn(1, 100), 0.29).sum()) == 28


def test_little_attention_is_told_apart(tiny, monkeypatch) -> None:
    """576 tokens share little attention each: a constant added to its square would round it to ties."""
    given = []
    monkeypatch.setattr(
        vasparse, "best", lambda scores, *args, **more: given.append(scores) or best(scores, *args, **more)
    )
    host = tiny("llava")
    with sl.attach(host.model, VASparse(alpha=0.0, beta=0.0, sparse_layer=1)):
        generate(host.model, inputs(host))
    assert len(given) == 4, "one choice per layer"
    assert max(scores.max() for scores in given) < 1


def test_the_penalty_falls_on_the_same_text_where_tokens_were_dropped(tiny) -> None:
    """Beside a system that drops tokens inside the model, a layer's columns are what it has seen, not the whole prompt."""
    host, seen = tiny("llava"), []

    def watch(site):
        if not site.prefill and site.layer == 3:
            return Probe(lambda weights, first: seen.append((site.tokens.role, weights[:, :, 0].mean(1))))

    system = VASparse(mask_rate=1.0, alpha=0.0, beta=0.0, penalty=200.0, sparse_layer=1)
    with sl.attach(host.model, PyramidDrop((1, 2), (0.5, 0.25)), system, toy(attention=watch)), torch.no_grad():
        out = host.model.generate(**inputs(host), max_new_tokens=2, return_dict_in_generate=True)
    bias = made_cache(out)._sightline.states[1][3, "bias"]  # (B, M) over what layer 3 has seen of the prompt
    role, weights = seen[0]
    assert role.shape[1] < out.sequences.shape[1], "nothing was dropped"
    sinks = bias < -20
    assert (sinks & (role[:, : bias.shape[1]] == int(Role.AFTER))).any()
    assert weights[:, : bias.shape[1]][sinks].max() < 1e-6


def test_without_a_cache_it_is_refused(tiny) -> None:
    """It takes tokens out of the cache: without one it would quietly do a part of what it says."""
    host = tiny("llava")
    said = pytest.raises(ParameterError, match="use_cache=False: vasparse acts on the cache: leave it out")
    with sl.attach(host.model, VASparse(sparse_layer=1)), said:
        generate(host.model, inputs(host), use_cache=False)
    assert "generate" not in host.model.__dict__


def test_as_released_without_strength_is_the_host(tiny) -> None:
    host = tiny("gemma3")
    plain = generate(host.model, inputs(host))
    with sl.attach(host.model, VASparse(mode="release", alpha=0.0, dola=False)):
        found = generate(host.model, inputs(host))
    assert torch.equal(found[1], plain[1])
    with sl.attach(host.model, VASparse(mode="release", alpha=0.0, beta=1e-9)):
        found = generate(host.model, inputs(host))
        again = generate(host.model, inputs(host), num_beams=3)
        without = generate(host.model, inputs(host), num_beams=3, use_cache=False)
    assert (found[1] - plain[1]).abs().max() > 1e-3
    assert torch.equal(again[0], without[0])

"""Dual-stream emphasis: golden arrays of the official code, its invariants, and the tokens it finds on every host."""

from __future__ import annotations

import copy

import pytest
import torch

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.errors import HostError, InputError, ParameterError
from sightline.hosts import find, get, layouts, prefix, tower_positions
from sightline.steer.dual_stream_emphasis import DualStreamEmphasis, emphasise, outlier_ratio, select_tokens
from tests.engine.numerics import assert_close
from tests.engine.toys import toy
from tests.engine.whole import extended, forward, generate
from tests.steer.goldens import cases, load
from tests.tiny_hosts import picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


def rows(attention: torch.Tensor, count: int) -> torch.Tensor:
    return attention[0, :, 0, -count:].sum(0)


@cases("dual-stream-emphasis", "case_[12]")
def test_golden_tokens(path) -> None:
    case = load(path)
    count = case["num_tokens"]
    first, penultimate = rows(case["vit_attn_first"], count), rows(case["vit_attn_penultimate"], count)
    local, summary = select_tokens(first, penultimate, local_ratio=case["local_ratio"])
    assert local.tolist() == case["local_tokens"].tolist()
    assert summary.tolist() == case["summary_tokens"].tolist()
    assert outlier_ratio(penultimate) == pytest.approx(case["outlier_ratio"])


@cases("dual-stream-emphasis", "case_3")
def test_golden_attention(path) -> None:
    """One attention module of two heads, rotary positions left out: the prompt, then one token more."""
    case = load(path)
    heads = int(case.get("heads", case.get("num_heads", 2)))
    local, summary = (case[f"{name}_tokens"].long() + int(case["image_begin"]) for name in ("local", "summary"))
    prompt, whole = case["hidden"], torch.cat([case["hidden"], case["hidden_step"]], 1)
    found = {}
    for step, states, queries in ((False, prompt, prompt.shape[1]), (True, whole, 1)):
        q, k, v = ((states @ case[f"w{x}"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for x in "qkv")
        length = states.shape[1]
        scores = q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)[:, :, -queries:]
        boost = torch.zeros(1, length)
        boost[:, local], boost[:, summary] = float(case.get("alpha", 0.7)), float(case.get("beta", 0.3))
        for base, given in ((False, boost), (True, torch.zeros_like(boost))):
            weights = emphasise(scores, given).softmax(-1)
            found["attn", step, base] = weights
            found["out", step, base] = (weights @ v).transpose(1, 2).flatten(2) @ case["wo"].T
    assert (found["attn", False, False] - found["attn", False, True])[:, :, :-1].abs().max() == 0
    wanted = [key for key in case if "attn" in key or "out" in key.split("_")]
    assert len(wanted) >= 4
    for key in wanted:
        mine = found["attn" if "attn" in key else "out", "step" in key, "base" in key]
        assert (mine - case[key]).abs().max() <= 1e-5, key


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [7, 36, 576])
def test_groups(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, penultimate = torch.rand(2, count, generator=generator)
    penultimate[:: count // 5] += 3.0
    local, summary = select_tokens(first, penultimate, spatial=first.flip(0), spatial_ratio=0.1)
    assert not set(local.tolist()) & set(summary.tolist())
    assert len(local) <= int(0.25 * count) + int(0.1 * count)
    assert set(summary.tolist()) <= set(
        (penultimate >= penultimate.sort().values[-len(summary)]).nonzero().flatten().tolist()
    )
    assert local.tolist() == sorted(local.tolist())
    everything, none = select_tokens(first, torch.ones(count), local_ratio=1.0)
    assert len(everything) == count  # PAI: all visual tokens
    assert len(none) == 0


def test_emphasis() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 4, 9, generator=generator)
    boost = torch.rand(2, 9, generator=generator) * (torch.rand(2, 9, generator=generator) > 0.5)
    found = emphasise(scores, boost)
    assert torch.equal(found[:, :, :-1], scores[:, :, :-1])
    assert (found >= scores).all()
    before, after = scores.softmax(-1)[:, :, -1], found.softmax(-1)[:, :, -1]
    boosted, left = boost[:, None].expand_as(before) > 0, boost[:, None].expand_as(before) == 0
    ratio = after / before
    assert (ratio[left] <= 1 + 1e-6).all()
    assert (
        torch.where(boosted, ratio, torch.inf).amin(-1) >= torch.where(left, ratio, -torch.inf).amax(-1) - 1e-5
    ).all()
    assert torch.equal(emphasise(scores, torch.zeros(2, 9)), scores)


def wanted_boosts(host, inputs, alpha: float, beta: float) -> torch.Tensor:
    """(B, N) from the tower's own whole maps (eager) and the processor's layouts."""
    model = copy.deepcopy(host.model)
    model.set_attn_implementation("eager")
    seen = []
    attention = [
        get(layer, find(model).tower_attention)
        for layer in get(get(model, find(model).tower), find(model).tower_layers)
    ]
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out[1])) for m in attention]
    forward(model, inputs)
    for hook in hooks:
        hook.remove()
    first, penultimate = seen[0][:, :, 0].sum(1), seen[max(len(attention) - 2, 0)][:, :, 0].sum(1)  # (R, N)
    boosts = torch.zeros(inputs["input_ids"].shape)
    visual = inputs["input_ids"] == host.model.config.image_token_id
    places = layouts(host.model, host.processor, inputs, [p.size for p in PICTURES])
    for row, (layout, table) in enumerate(zip(places, tower_positions(model, places, find(model)), strict=True)):
        columns = visual[row].nonzero().flatten()
        for crop in range(len(layout.grids)):
            mine = [i for i in range(len(layout)) if layout.crop[i] == crop]
            if not mine:
                continue
            values = [
                torch.stack([torch.stack([scores[r, p] for r, p in table[i] if r >= 0]).mean() for i in mine])
                for scores in (first, penultimate)
            ]
            local, summary = select_tokens(*values)
            chosen = columns[mine]
            boosts[row, chosen[local]], boosts[row, chosen[summary]] = alpha, beta
    assert prefix(model, find(model)) == 1
    return boosts


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_the_tokens_of_every_row(name: str, tiny) -> None:
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    edits = []

    class Watched(DualStreamEmphasis):
        def attention(self, site):
            edits.append(super().attention(site))
            return edits[-1]

    with sl.attach(host.model, Watched(alpha=0.7, beta=0.3)):
        forward(host.model, inputs)
        generate(host.model, inputs, 2)
        generate(host.model, inputs, 1, num_beams=2)
    wanted = wanted_boosts(host, inputs, 0.7, 0.3)
    assert edits[:2] == [None, None]  # the first two layers
    assert torch.equal(edits[2].boost[:, 0, 0], wanted)
    assert edits[2].start == inputs["input_ids"].shape[1] - 1
    step = edits[4 + 4 + 2]
    assert (step.start, step.rows) == (0, None)
    assert torch.equal(step.boost[:, 0, 0], wanted)
    assert torch.equal(edits[-1].boost[:, 0, 0], wanted.repeat_interleave(2, 0))


def test_against_whole_scores(tiny) -> None:
    """The last row of layer 3 through `emphasise`, everything else the host's."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    calls: list = []
    keep = toy(attention=lambda site: calls.append(site.call) if site.layer == 3 else None)
    outputs: list[torch.Tensor] = []
    projection = host.model.model.language_model.layers[3].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
    with sl.attach(host.model, DualStreamEmphasis(alpha=2.0, beta=1.0, first_layer=3), keep):
        forward(host.model, inputs)
    hook.remove()
    call = calls[0]
    repeat = call.query.shape[1] // call.key.shape[1]
    scores = call.query @ call.key.repeat_interleave(repeat, 1).transpose(-1, -2) * call.scale
    scores = emphasise(scores, wanted_boosts(host, inputs, 2.0, 1.0)).masked_fill(~call.allowed(), -torch.inf)
    last = (scores.softmax(-1) @ call.value.repeat_interleave(repeat, 1))[:, :, -1]
    assert_close("head outputs", outputs[0][:, -1], last.flatten(1), 1e-5)


def test_only_the_answer_is_touched(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    plain = forward(host.model, inputs)
    with sl.attach(host.model, DualStreamEmphasis(alpha=3.0)) as attached:
        found = forward(host.model, inputs)
    assert torch.equal(found[:, :-1], plain[:, :-1])
    assert not torch.equal(found[:, -1], plain[:, -1])
    report = attached.report()["dual-stream-emphasis"]
    assert report["views"] == 1
    assert 9 - report["mean_summary_tokens"] <= report["mean_local_tokens"] <= 9


def test_head_weights(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    plain = forward(host.model, inputs)
    with sl.attach(host.model, DualStreamEmphasis(head_weights=(1.0,) * 16)):
        ones = forward(host.model, inputs)
    with sl.attach(host.model, DualStreamEmphasis()):
        assert_close("ones", ones, forward(host.model, inputs), 1e-6)
    with sl.attach(host.model, DualStreamEmphasis(head_weights=(0.0,) * 16)):
        assert_close("zeros", forward(host.model, inputs), plain, 1e-5)
    with pytest.raises(ParameterError, match="4 layers x 4 heads"):
        sl.attach(host.model, DualStreamEmphasis(head_weights=(1.0, 2.0)))


def test_spatial_scores_add_tokens(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    with sl.attach(host.model, DualStreamEmphasis(spatial_ratio=0.5)) as attached:
        forward(host.model, inputs)
    assert attached.report()["dual-stream-emphasis"]["mean_local_tokens"] > 9


def test_pictures_encoded_before(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    with torch.no_grad():
        encoded = host.model.get_image_features(pixel_values=inputs["pixel_values"])
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with sl.attach(host.model, DualStreamEmphasis()), pytest.raises(InputError, match="encoded before"):
        host.model(**rest, mm_encoder_outputs={"image": encoded})


def test_towers_without_a_class_token_are_refused(tiny) -> None:
    with pytest.raises(HostError, match="class token"):
        sl.attach(tiny("gemma3").model, DualStreamEmphasis())


def test_guidance_by_hand(tiny) -> None:
    """Every step: the edited stream's log-probabilities against those of the same words without the picture."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    edit = {"alpha": 3.0, "beta": 2.0, "first_layer": 0}
    with sl.attach(host.model, DualStreamEmphasis(**edit, gamma=1.6, cfg_beta=0.2)):
        ids, found = generate(host.model, inputs)
    for row in range(2):
        one = host.inputs(QUESTIONS[row : row + 1], [PICTURES[row : row + 1]])
        words = one["input_ids"][one["input_ids"] != host.model.config.image_token_id][None]
        for step in range(found.shape[1]):
            new = ids[row : row + 1, inputs["input_ids"].shape[1] :][:, :step]
            with sl.attach(host.model, DualStreamEmphasis(**edit)):
                given = extended(one, torch.cat([one["input_ids"], new], 1))
                edited = answer_of(host.model, given, one["input_ids"].shape[1])
            with torch.no_grad():
                blind = host.model(input_ids=torch.cat([words, new], 1)).logits[0, -1]
            s, u = edited.log_softmax(-1), blind.log_softmax(-1)
            wanted = (1.6 * (s - u) + u).masked_fill(s.exp() < 0.2 * s.exp().max(), -torch.inf)
            here = wanted.isfinite()
            assert torch.equal(found[row, step].isfinite(), here)
            assert_close(f"row {row} step {step}", found[row, step][here], wanted[here], 5e-5)


def answer_of(model, given, prompt: int) -> torch.Tensor:
    """(V,) logits of the last position, prompt first and the rest token by token, as they are generated."""
    ids = given.pop("input_ids")
    del given["attention_mask"]
    with torch.no_grad():
        out = model(input_ids=ids[:, :prompt], **given, use_cache=True)
        for k in range(prompt, ids.shape[1]):
            out = model(input_ids=ids[:, k : k + 1], past_key_values=made_cache(out), use_cache=True)
    return out.logits[0, -1]


def test_guidance_of_one_is_none(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    with sl.attach(host.model, DualStreamEmphasis(alpha=1.0)):
        plain = generate(host.model, inputs)[1]
    assert "second" not in DualStreamEmphasis().stations()
    with sl.attach(host.model, DualStreamEmphasis(alpha=1.0, gamma=1.0 + 1e-9, cfg_beta=0.0)):
        found = generate(host.model, inputs)[1]
    assert_close("log-probabilities", found, plain.log_softmax(-1), 1e-5)
    with sl.attach(host.model, DualStreamEmphasis(alpha=0.0, beta=0.0, gamma=1.5, cfg_beta=0.0)):
        assert (generate(host.model, inputs)[1] - plain.log_softmax(-1)).abs().max() > 1e-3


def test_guidance_leaves_rows_without_pictures_alone(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[PICTURES[0]], []])
    plain = generate(host.model, inputs)[1]
    with sl.attach(host.model, DualStreamEmphasis(alpha=0.0, beta=0.0, gamma=1.5)):
        found = generate(host.model, inputs)[1]
    assert torch.equal(found[1], plain[1])
    assert not torch.equal(found[0], plain[0])

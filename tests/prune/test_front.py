"""Reducers that act before the language model: golden arrays of the official code, and the sheets' invariants."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import sightline as sl
from sightline.errors import HostError, ParameterError
from sightline.hosts.anyres import anyres, tiles, unpadded
from sightline.prune import VTCCLS, FlowCut, FoPru, HiRED, Random, flowcut, fopru, hired, vtc_cls
from tests.engine.numerics import assert_close
from tests.engine.whole import forward, generate
from tests.goldens import GOLDEN
from tests.tiny_hosts import TINY, picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


def golden(slug: str, pattern: str = "*"):
    found = sorted((GOLDEN / slug).glob(f"{pattern}.npz"))
    marks = pytest.mark.skipif(not found, reason="golden arrays are not here")
    return [pytest.param(path, marks=marks, id=path.stem) for path in found] or [pytest.param(None, marks=marks)]


def load(path: Path) -> dict:
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(path).items()}


def batch(host):
    return host.inputs(QUESTIONS, [[p] for p in PICTURES])


def ledger(host, system, inputs=None):
    """The ledger of the prompt that is left, and how long it was."""
    inputs = batch(host) if inputs is None else inputs
    with sl.attach(host.model, system), torch.no_grad():
        return host.model(**inputs, use_cache=True).cache._sightline.tokens


def left(host, system, inputs=None) -> list[list[int]]:
    """Per row, which of its visual tokens are left, counted over all pictures of the row."""
    inputs = batch(host) if inputs is None else inputs
    tokens = ledger(host, system, inputs)
    order = (inputs["input_ids"] == host.model.config.image_token_id).long().cumsum(1) - 1
    return [order[b, tokens.position[b, tokens.visual[b]].long()].tolist() for b in range(len(order))]


# -- VTC-CLS ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden("vtc-cls"))
def test_vtc_cls_golden(path):
    case = load(path)
    rows = case["attentions"][case["start_layer"] : -1, :, 0, 1:]  # (L, H, N)
    score = vtc_cls.scores(rows)
    index = vtc_cls.kept(score, case["token_num"])
    assert (score - case["score"]).abs().max() < 1e-6
    assert torch.equal(index, case["kept_indices"].long())
    assert torch.equal(case["hidden_minus2"][:, 1:][:, index], case["kept_features"])


def test_vtc_cls_laws():
    attention = torch.rand(5, 3, 20).softmax(-1)
    score = vtc_cls.scores(attention)
    assert score.sum() <= 5 + 1e-5
    assert vtc_cls.kept(score, 20).tolist() == vtc_cls.kept(score, 99).tolist() == list(range(20))
    assert vtc_cls.kept(score, 7).tolist() == vtc_cls.kept(vtc_cls.scores(attention, "mean") * 3, 7).tolist()
    order = torch.randperm(20)
    moved = set(order[vtc_cls.kept(score[order], 7)].tolist())
    assert moved == set(vtc_cls.kept(score, 7).tolist())
    assert torch.equal(vtc_cls.scores(attention, "max"), attention.mean(1).amax(0))
    assert torch.equal(vtc_cls.scores(attention, "min"), attention.mean(1).amin(0))


def test_vtc_cls_follows_the_tower(tiny):
    """On a host: what whole maps of the eager tower say, for every row of a batch."""
    host = tiny("llava")
    recorder = sl.record(tower="cls", sinks=False)
    with sl.attach(host.model, recorder):
        forward(host.model, batch(host))
    seen = recorder.tower_seen
    feature = len(seen) - 2
    for start in range(feature + 1):
        rows = torch.stack([seen[layer][..., 1:] for layer in range(start, feature + 1)])  # (L, R, H, N)
        wanted = vtc_cls.kept(vtc_cls.scores(rows), 7)
        assert left(host, VTCCLS(7, start_layer=start)) == wanted.tolist()


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "gemma3"])
def test_towers_without_a_class_token_are_ranked_by_what_patches_get(name, tiny):
    host = tiny(name)
    system = VTCCLS(3, score="mean-received")
    with sl.attach(host.model, system) as attached:
        _, logits = generate(host.model, batch(host))
        for row in range(2):
            _, steps = generate(host.model, host.inputs([QUESTIONS[row]], [[PICTURES[row]]]))
            assert_close("row", logits[row], steps[0], 2e-5)
    report = attached.report()["vtc-cls"]
    assert 0 < report["kept"] < report["visual_tokens"]


# -- HiRED ------------------------------------------------------------------------------------------------------------------


def released_pack(
    features: torch.Tensor, mask: torch.Tensor, tiles: tuple[int, int], size, newline=None
) -> torch.Tensor:
    """The kept features (kept, C) of one picture in the released code's order, which swaps rows and columns of tiles.

    features: (P, N, C). mask: (P, N). tiles: (rows, columns). size: (width, height). newline: (C,), behind every row.
    """
    side, (across, down) = math.isqrt(mask.shape[1]), tiles
    place = torch.arange(down * across * side * side).view(down, across, side, side)
    place = place.transpose(1, 2).reshape(down * side, across * side)
    rows, columns = unpadded(tuple(place.shape), size)
    place = place[rows.start : rows.stop, columns.start : columns.stop]
    tokens, chosen = features[1:].flatten(0, 1), mask[1:].flatten()
    ends = [] if newline is None else [newline[None]]
    return torch.cat([features[0][mask[0]], *(part for row in place for part in (tokens[row[chosen[row]]], *ends))])


@pytest.mark.parametrize("path", golden("hired", "case_*"))
def test_hired_golden(path):
    case = load(path)
    late = case["late_layer_attn"][:, :, 0, 1:].sum(1)
    if "first_layer_attn" not in case:
        assert torch.equal(hired.token_mask(late, late, case["token_budget_rate"], 0.5)[0], case["mask"])
        return
    early, begin, packed = case["first_layer_attn"][:, :, 0, 1:].sum(1), 0, []
    for views, size in zip(case["num_partitions"].tolist(), case["image_sizes_hw"].tolist(), strict=True):
        mine, size = slice(begin, begin + views), tuple(size[::-1])
        cut = tiles(size, case["grid_pinpoints"].tolist(), 42, 7)
        mask = hired.token_mask(early[mine], late[mine], case["token_budget_rate"], case["alpha"], cut.shape)
        assert torch.equal(mask, case["mask"][mine])
        assert mask.sum(1).tolist() == case["kept_per_partition"][mine].tolist()
        features = case["features"][mine]
        packed.append(released_pack(features, mask, cut.shape, size, case.get("image_newline")))
        if cut.shape[0] == cut.shape[1] and "image_newline" not in case:  # then hosts have that order, too
            layout = anyres(size, cut, 42, 7)
            order = [(c, p[0]) for c, p in zip(layout.crop, layout.patches, strict=True) if c >= 0]
            assert torch.equal(torch.stack([features[place] for place in order if mask[place]]), packed[-1])
        begin += views
    assert [len(one) for one in packed] == case["packed_lens"].tolist()
    assert torch.equal(torch.cat(packed), case["packed"])


def test_hired_laws():
    early, late = torch.rand(5, 36), torch.rand(5, 36)
    for rate in (0.05, 0.3, 0.61, 1.0):
        for alpha in (0.0, 0.3, 1.0):
            for region in ("strips", "grid"):
                mask = hired.token_mask(early, late, rate, alpha, (2, 2), region)
                total = int(5 * 36 * rate)
                assert mask.sum() <= total
                assert mask[0].sum() == min(int(total * alpha), 36)
                assert torch.equal(mask, hired.token_mask(early / 8, late / 8, rate, alpha, (2, 2), region))
    even = hired.tile_budgets(early[0], (2, 2), 20, 1.0)
    assert even.tolist() == [5, 5, 5, 5]
    corner = torch.zeros(6, 6)
    corner[:3, 3:] = 1  # all content above, on the right
    assert hired.tile_budgets(corner.flatten(), (2, 2), 20, 0.75, "grid").tolist() == [0, 20, 0, 0]
    assert hired.tile_budgets(corner.flatten(), (2, 2), 20, 0.75, "strips").tolist() == [6, 13, 0, 0]
    order = torch.randperm(36)
    shuffled = late.clone()
    shuffled[2] = late[2, order]
    assert torch.equal(
        hired.token_mask(early, shuffled, 0.3, 0.5, (2, 2))[2],
        hired.token_mask(early, late, 0.3, 0.5, (2, 2))[2, order],
    )


def test_hired_on_tiles(tiny):
    """Budgets, unpadding and newlines on a tiled host, against whole maps."""
    host = tiny("llava_next")
    recorder = sl.record(tower="cls", sinks=False)
    with sl.attach(host.model, recorder):
        forward(host.model, batch(host))
    early, late = (recorder.tower_seen[layer][..., 1:].sum(1) for layer in (0, len(recorder.tower_seen) - 2))
    from sightline.hosts import layouts

    begin = 0
    laid = layouts(host.model, host.processor, batch(host), [p.size for p in PICTURES])
    for newlines in (False, True):
        begin, found = 0, left(host, HiRED(0.3, newlines=newlines))
        for row, layout in enumerate(laid):
            mine = slice(begin, begin + len(layout.grids))
            mask = hired.token_mask(early[mine], late[mine], 0.3, 0.5, layout.tiles)
            wanted = [
                k
                for k, (c, p) in enumerate(zip(layout.crop, layout.patches, strict=True))
                if (mask[c, p[0]] if p else newlines)
            ]
            assert found[row] == wanted
            begin += len(layout.grids)


# -- FoPru ------------------------------------------------------------------------------------------------------------------


def test_fopru_laws():
    attention = torch.rand(2, 3, 17, 17).softmax(-1)
    received, given = fopru.candidates(attention, cls=True)
    chosen = fopru.significance(received, given)
    for b in range(2):
        wanted = received[b] if received[b].var() > given[b].var() else given[b]
        assert torch.equal(chosen[b], wanted)
    same = torch.rand(1, 9)
    assert torch.equal(fopru.significance(same, same.flip(-1)), same.flip(-1))  # a tie goes to `given`
    whole = fopru.candidates(attention[..., 1:, 1:] / attention[..., 1:, 1:].sum(-1, keepdim=True), cls=False)
    assert (whole[1].var(-1) < 1e-10).all()  # rows that sum to 1 have no variance


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_fopru_follows_the_tower(name, strategy, tiny):
    """On a host: what whole maps say, tokens and rows alike."""
    host = tiny(name)
    recorder = sl.record(tower="maps", sinks=False)
    with sl.attach(host.model, recorder):
        forward(host.model, batch(host))
    layer = len(recorder.tower_seen) - (2 if name == "llava" else 1)
    maps = recorder.tower_seen[layer]
    received, given = fopru.candidates(maps, cls=name == "llava")
    sigma = fopru.significance(received, given) if name == "llava" else received
    if name == "gemma3":  # 6 x 6 patches are averaged to 3 x 3 tokens
        sigma = torch.nn.functional.avg_pool2d(sigma.view(-1, 1, 6, 6), 2).flatten(1)
    side = round(sigma.shape[1] ** 0.5)
    for ratio in (0.01, 0.34, 0.7):
        found = left(host, FoPru(ratio, strategy=strategy))
        for row in range(2):
            if strategy == "rank":
                wanted = sigma[row].topk(max(1, int(ratio * side * side))).indices
            else:
                lines = sigma[row].view(side, side).sum(1).topk(max(1, int(ratio * side))).indices
                wanted = (lines[:, None] * side + torch.arange(side)).flatten()
            assert found[row] == sorted(wanted.tolist())


# -- FlowCut ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden("flowcut", "case_score*"))
def test_flowcut_scores_golden(path):
    case = load(path)
    found = flowcut.scores(case["cls_attn"], case["semantic_attn"], case["value"])
    assert (found - case["score"]).abs().max() < 1e-6
    for k in range(len(case["ratio_attn"])):
        left_, target = int(case["ratio_rpl"][k]), int(case["ratio_target"][k])
        assert flowcut.prune_count(case["ratio_attn"][k], left_, target) == int(case["ratio_out"][k])
        alone = flowcut.prune_count(case["ratio_attn"][k, :1], left_, target)
        assert alone == int(case["ratio_out_first_sample_only"][k])


def golden_host(case: dict, weights: dict):
    """A LLaVA around the golden vision tower."""
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=case["layers"], num_attention_heads=4, image_size=56,
        patch_size=7, layer_norm_eps=1e-5, hidden_act="quick_gelu",
    )  # fmt: skip
    text = tf.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=64)
    ).eval()
    names = {k.removeprefix("vision_model."): v for k, v in weights.items()}
    missing, unknown = model.model.vision_tower.load_state_dict(names, strict=False)
    assert all("position_ids" in name for name in (*missing, *unknown))
    return model


@pytest.mark.parametrize("path", golden("flowcut", "case_vit*"))
def test_flowcut_tower_golden(path):
    """The whole tower: counts per layer, patches kept, and features."""
    case = load(path)
    model = golden_host(case, {k[2:]: v for k, v in case.items() if k.startswith("w.")})
    rows, features, last = len(case["pixel_values"]), [], []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: features.append(a[0]))
    model.model.vision_tower.encoder.layers[-1].register_forward_hook(
        lambda m, a, output: last.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    lengths: list[int] = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.register_forward_pre_hook(
            lambda m, a, k: lengths.append((a[0] if a else k["hidden_states"]).shape[1]), with_kwargs=True
        )
    inputs = {"input_ids": torch.tensor([[1] + [5] * 64 + [2]] * rows), "pixel_values": case["pixel_values"]}
    with torch.no_grad():
        model(**inputs)
    assert (features.pop() - case["unpruned_features"]).abs().max() < 1e-4
    lengths.clear()
    with sl.attach(model, FlowCut(case["target"])), torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, a, k: lengths.append((a[0] if a else k["hidden_states"]).shape[1]), with_kwargs=True
            )
            for layer in model.model.vision_tower.encoder.layers
        ]
        tokens = model(**inputs, use_cache=True).cache._sightline.tokens
        for hook in hooks:
            hook.remove()
    after = lengths[1::2]  # the second hook sees what the system has left; the first what came in
    assert after[1:] == case["seq_lens"].tolist()[1:-1]
    kept = torch.stack([tokens.index[b, tokens.visual[b]] for b in range(rows)]).long()
    if case["target"] < 64:
        assert torch.equal(kept, case["keep_indices"].long())
    found = features[0].gather(1, kept[..., None].expand(-1, -1, 32))
    assert (found - case["features"]).abs().max() < 1e-4
    assert (last[-1] - case["last_hidden_state"]).abs().max() < 1e-4


def test_flowcut_laws():
    uniform = torch.full((2, 16), 1 / 16)
    assert flowcut.prune_count(uniform, 4, 4) == 0
    assert flowcut.prune_count(uniform, 0, 4) == 12
    sharp = torch.eye(16)[:1]
    assert flowcut.prune_count(sharp, 4, 4) == 6  # (16 - 4) / sqrt(4), and no NaN from 0 log 0
    value = torch.randn(2, 3, 5, 4)
    assert torch.allclose(flowcut.semantics(value).sum(-1), torch.ones(2), atol=1e-6)


def test_flowcut_keeps_exactly_what_is_wanted(tiny):
    host = tiny("llava")
    assert [len(row) for row in left(host, FlowCut(9))] == [9, 9]
    assert [len(row) for row in left(host, FlowCut(36))] == [36, 36]
    alone = [left(host, FlowCut(9), host.inputs([q], [[p]])) for q, p in zip(QUESTIONS, PICTURES, strict=True)]
    assert all(row == sorted(row) for one in alone for row in one)


def test_flowcut_cuts_once_more_in_the_language_model(tiny):
    """Of tiles: half as many of every view in the tower, and exactly the wanted number behind a decoder layer."""
    host = tiny("llava_next")
    with sl.attach(host.model, FlowCut(10)), torch.no_grad():
        cache = host.model(**batch(host), use_cache=True).cache
        _, logits = generate(host.model, batch(host))
        _, again = generate(host.model, batch(host), use_cache=False)
    whole = cache._sightline.tokens
    assert (whole.visual.sum(1) > 10).all()
    views = whole.visual.sum(1)
    assert (views <= 5 * 5).all()
    depths = cache._sightline.cuts.depths
    assert depths[1] is None
    assert depths[2].tokens.visual.sum(1).tolist() == [10, 10]
    assert [layer.keys.shape[2] for layer in cache.layers[:2]] == [whole.shape[1]] * 2
    assert all(layer.keys.shape[2] == depths[2].tokens.shape[1] < whole.shape[1] for layer in cache.layers[2:])
    assert_close("with and without a cache", logits, again, 2e-5)


def test_flowcut_relay_scores_by_definition():
    torch.manual_seed(0)
    query, value, keys, values = torch.randn(4, 8), torch.randn(2, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    wide = [x.repeat_interleave(2, 0) for x in (value, keys, values)]
    relation = torch.stack([(query[h] @ wide[1][h].T / 8**0.5).softmax(-1) for h in range(4)]).mean(0)
    semantic = torch.stack([(wide[0][h] @ wide[2][h].T / 8**0.5).softmax(-1) for h in range(4)]).mean(0)
    wanted = (relation / relation.sum() + semantic / semantic.sum()) * wide[2].mean(0).abs().sum(-1)
    found = flowcut.relay_scores(query, value, keys, values, 8**-0.5)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_before_and_inside_the_language_model_together(tiny):
    """A reducer here and one that drops in the decoder: with and without a cache, the same."""
    from sightline.engine.select import Keep
    from tests.engine.toys import toy

    inside = toy(
        cut=lambda site, x: (
            Keep(~site.tokens.visual[:, site.start :] | (site.tokens.index[:, site.start :] % 2 == 0))
            if site.layer == 2
            else None
        )
    )
    for name in ("llava", "gemma3"):
        host = tiny(name)
        with sl.attach(host.model, FoPru(0.5), inside):
            _, logits = generate(host.model, batch(host))
            _, again = generate(host.model, batch(host), use_cache=False)
        assert_close(name, logits, again, 2e-5)


# -- all --------------------------------------------------------------------------------------------------------------------


def test_more_than_there_are_changes_nothing(tiny):
    host = tiny("llava_next")
    plain = generate(host.model, batch(host))[1]
    for system in (VTCCLS(999), FlowCut(999)):
        with sl.attach(host.model, system):
            assert torch.equal(generate(host.model, batch(host))[1], plain)


@pytest.mark.parametrize("system", [VTCCLS(5), HiRED(0.3), FoPru(0.3), FlowCut(9), Random(0.3)], ids=lambda s: s.slug)
def test_the_question_plays_no_part(system, tiny):
    host = tiny("llava")
    first, second = (left(host, system, host.inputs([q], [PICTURES[:1]])) for q in QUESTIONS)
    assert first == second


def test_random_is_seeded_and_fair(tiny):
    host = tiny("llava_next")
    assert left(host, Random(0.5)) == left(host, Random(0.5))
    assert left(host, Random(0.5)) != left(host, Random(0.5, seed=1))


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (VTCCLS(5, start_layer=9), "choose start_layer in"),
        (HiRED(0.3, late_layer=9), "choose late_layer in"),
        (FoPru(0.3, layer=9), "choose layer in"),
    ],
)
def test_layers_that_are_not_there(system, message, tiny):
    with pytest.raises(ParameterError, match=message):
        sl.attach(tiny("llava").model, system)


def test_bad_parameters_say_what_is_allowed():
    for make in (lambda: VTCCLS(0), lambda: VTCCLS(5, ensemble="most"), lambda: VTCCLS(5, score="none"),
                 lambda: HiRED(1.5), lambda: HiRED(region="rings"), lambda: FoPru(-1), lambda: FoPru(strategy="column"),
                 lambda: FlowCut(0), lambda: Random(2)):  # fmt: skip
        with pytest.raises(ParameterError, match="choose"):
            make()


@pytest.mark.parametrize("name", [n for n in TINY if n.startswith(("gemma3", "qwen2_5", "llava_one"))])
def test_hosts_without_a_class_token_are_told_what_to_use(name, tiny):
    for system in (VTCCLS(5), HiRED(0.3), *(() if name.startswith("qwen2") else (FlowCut(9),))):
        with pytest.raises(HostError, match="mean-received"):
            sl.attach(tiny(name).model, system)


# -- seen in a look ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [VTCCLS(9), FlowCut(9)], ids=lambda s: s.slug)
def test_a_look_shows_what_was_dropped(system, tiny, tmp_path):
    from sightline.hosts import find
    from sightline.lvlm import LVLM

    host = tiny("llava")
    lvlm = LVLM(host.model, host.processor, find(host.model), "tiny")
    look = sl.look(PICTURES[0], "Is there a dog?", model=lvlm, systems=[system], max_new_tokens=3)
    plain, run = look.runs
    assert plain.stages == ()
    named = {stage.name: int(stage.kept.sum()) for stage in run.stages}
    assert list(named)[-1] == ("before the language model" if system.slug == "vtc-cls" else "tower layer 2")
    assert list(named.values())[-1] == 9
    kept = run.stages[-1].kept
    assert np.flatnonzero(kept).tolist() == left(host, system, lvlm.inputs(PICTURES[0], "Is there a dog?"))[0]
    assert run.rows.shape[-1] == run.phi.shape[-1] == len(look.layout) == 36
    assert (run.rows[..., ~kept] == 0).all()
    assert (run.rows[..., kept] > 0).all()
    told = look.to_json()["runs"][1]["kept"]
    assert told[-1]["tokens"] == np.flatnonzero(kept).tolist()
    written = look.save(tmp_path)
    assert written["kept-1"].exists()
    assert "kept-0" not in written
    assert "Visual tokens that are left" in written["report"].read_text(encoding="utf-8")

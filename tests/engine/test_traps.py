"""The traps of the hosts' attention interface: masks, names, causality, caches, sliding windows, eager and flash.

Tolerance: fp32, sums of some hundred terms, four layers: 1e-5 relative RMS where both sides are the same sum in another
order, bit for bit where the engine promises to stay out of the way.
"""

from __future__ import annotations

import copy

import pytest
import torch

import sightline as sl
from sightline.engine import attention
from sightline.engine.seats import NAMES, SEAT, attention_function
from sightline.engine.tokens import Role
from sightline.errors import HostError
from tests.engine.numerics import Largest, assert_close
from tests.engine.toys import lean, look, nothing, toy, watcher, weigh
from tests.engine.whole import LAYERS, forward, generate, plus, times, whole
from tests.systems import CASES
from tests.tiny_hosts import TINY, picture
from tests.traces import differences, trace

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
CLOSE = 2e-5


def batch(host, padding_side: str = "left"):
    """Two questions of different length, each with a picture of its own size: a padded batch."""
    return host.inputs(QUESTIONS, [[picture()], [picture(80, 64, 1)]], padding_side)


def one(host):
    return host.inputs(QUESTIONS[:1], [[picture()]])


@pytest.mark.parametrize("name", TINY)
def test_looking_changes_no_bit(name, tiny):
    """A padded batch with every station taken and every row probed: the host's own numbers."""
    host = tiny(name)
    inputs = batch(host)
    assert (inputs["attention_mask"] == 0).any() or name.startswith("llava_")
    plain, ids = forward(host.model, inputs), generate(host.model, inputs)
    seen = []
    with sl.attach(host.model, nothing(), look(lambda site, w, first: seen.append(w))):
        assert torch.equal(forward(host.model, inputs), plain)
        found = generate(host.model, inputs)
    assert torch.equal(found[0], ids[0])
    assert torch.equal(found[1], ids[1])
    assert len(seen) > 0


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rows", ["padded", "alone"])
@pytest.mark.parametrize("edit", ["factor", "bias"])
def test_edits_through_generate_equal_whole_maps(name, rows, edit, tiny):
    """Cached generation against one forward on whole maps: masks, causality, columns and scales are all as the host's.

    "alone" has no padding, so the mask is None and causality goes without saying; Gemma3's cache drops columns.
    """
    host = tiny(name)
    inputs = batch(host) if rows == "padded" else one(host)
    system, change = (weigh(3.0), times(3.0)) if edit == "factor" else (lean(2.0), plus(2.0))
    with sl.attach(host.model, system):
        ids, logits = generate(host.model, inputs)
    wanted = forward(whole(host, inputs, change), inputs, ids)[:, inputs["input_ids"].shape[1] - 1 : -1]
    assert_close("logits", logits, wanted, CLOSE)
    plain = forward(host.model, inputs, ids)[:, inputs["input_ids"].shape[1] - 1 : -1]
    assert (wanted - plain).abs().max() > 1e-2, "the edit would not be noticed"


def test_the_oracle_is_the_host(tiny):
    """Whole maps without a change give the host's logits, so the tests above compare with the right thing."""
    for name in TINY:
        host = tiny(name)
        inputs = batch(host)
        found, wanted = forward(whole(host, inputs, times(1.0)), inputs), forward(host.model, inputs)
        real = inputs["attention_mask"].bool()
        assert_close(name, found[real], wanted[real], CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(side, tiny):
    host = tiny("llava")
    inputs = batch(host, side)
    with sl.attach(host.model, weigh()):
        together = forward(host.model, inputs)
        for row, question in enumerate(QUESTIONS):
            alone = host.inputs([question], [[[picture()], [picture(80, 64, 1)]][row]])
            real = inputs["attention_mask"][row].bool()
            assert_close(f"row {row}", together[row][real], forward(host.model, alone)[0], CLOSE)


def test_names_do_not_begin_anything_of_the_hosts():
    from transformers import AttentionInterface, AttentionMaskInterface

    assert not any("flash" in name for name in NAMES.values())
    with sl.attach(TINY["llava"]().model, nothing()):
        for name in NAMES.values():
            assert name in AttentionInterface._global_mapping
            assert name in AttentionMaskInterface._global_mapping  # else create_causal_mask returns None


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("system", [weigh, lean])
def test_static_cache(name, system, tiny):
    """Keys beyond the prompt are empty; sliding layers hold a window only."""
    host = tiny(name)
    inputs = batch(host)
    with sl.attach(host.model, system()):
        ids, logits = generate(host.model, inputs, 8)
        static = generate(host.model, inputs, 8, cache_implementation="static")
        again = generate(host.model, inputs, 8, cache_implementation="static")  # the model keeps and reuses the cache
    assert torch.equal(static[0], ids)
    assert_close("logits", static[1], logits, CLOSE)
    assert torch.equal(again[1], static[1])


def test_a_static_cache_without_padding_has_no_mask(tiny):
    """Then the host relies on causality, and the keys behind the prompt are no keys yet."""
    host = tiny("llava")
    inputs = one(host)
    n, widths = inputs["input_ids"].shape[1], []
    with sl.attach(host.model, weigh(), look(lambda site, w, first: widths.append(w.shape[-1]))):
        ids, logits = generate(host.model, inputs, 3, cache_implementation="static", max_length=None)
    assert widths[:4] == [n] * 4
    assert min(widths[4:]) > n
    wanted = forward(whole(host, inputs, times(3.0)), inputs, ids)[:, n - 1 : -1]
    assert_close("logits", logits, wanted, CLOSE)


@pytest.mark.parametrize("name", ["gemma3", "gemma3_pan_and_scan"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_sliding_windows_keep_the_ledger_on_their_keys(name, cache, tiny):
    """The start token has left the window of 16 keys: its column must not fall on another key."""
    host = tiny(name)
    inputs = one(host)
    options = {} if cache is None else {"cache_implementation": cache}
    widths = {}

    def see(site, weights, first):
        widths.setdefault((site.layer, site.prefill), set()).add(weights.shape[-1])

    for role in (Role.START, Role.BEFORE, Role.IMAGE, Role.GENERATED):
        with sl.attach(host.model, weigh(50.0, role, (0, 1, 2, 3)), look(see)):
            ids, logits = generate(host.model, inputs, 8, **options)
            whole_sequence = generate(host.model, inputs, 8, use_cache=False)
        assert torch.equal(whole_sequence[0], ids)
        assert_close(role.name, logits, whole_sequence[1], CLOSE)
    assert max(widths[0, False]) == 16, "the window was not exercised"
    assert max(widths[1, False]) > 16


def eager_copy(host):
    model = copy.deepcopy(host.model)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_an_eager_host_shows_the_edited_weights(name, tiny):
    host = tiny(name)
    inputs = batch(host)
    model = eager_copy(host)
    before = trace(model)
    plain = model.generate(**inputs, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True)
    with sl.attach(model, weigh(3.0)):
        ids, logits = generate(model, inputs, 4)
        out = model.generate(**inputs, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True)
    with sl.attach(host.model, weigh(3.0)):
        sdpa = generate(host.model, inputs, 4)
    assert torch.equal(ids, sdpa[0])
    assert_close("logits", logits, sdpa[1], CLOSE)
    assert differences(before, trace(model)) == []
    n = inputs["input_ids"].shape[1]
    visual = inputs["input_ids"] == model.config.image_token_id
    for step, layers in enumerate(out.attentions):
        for layer, weights in enumerate(layers):
            assert weights.shape[:3] == (2, 4, n if step == 0 else 1)
            if weights.shape[-1] != n + step or layer > LAYERS[0]:  # deeper layers see other states
                continue
            own = plain.attentions[step][layer]
            if not torch.equal(ids[:, : n + step], plain.sequences[:, : n + step]):
                continue
            real = inputs["attention_mask"].bool() if step == 0 else torch.ones(2, 1, dtype=torch.bool)
            scale = torch.where(visual, 3.0, 1.0) if layer in LAYERS else torch.ones(2, n)
            wanted = torch.cat([own[..., :n] * scale[:, None, None], own[..., n:]], -1)
            assert_close("weights", weights.transpose(1, 2)[real], wanted.transpose(1, 2)[real], CLOSE)


def test_an_eager_host_keeps_its_weights_where_nothing_is_edited(tiny):
    host = tiny("llava")
    model = eager_copy(host)
    inputs = one(host)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
        with sl.attach(model, look(lambda *_: None)):
            found = model(**inputs, output_attentions=True)
    assert torch.equal(found.logits, plain.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.attentions, plain.attentions, strict=True))


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager", "whole_maps"]
)
def test_kernels_that_show_no_attention_are_refused(name, tiny):
    host = tiny("llava")
    model = copy.deepcopy(host.model)
    text = model.model.language_model
    text.config._attn_implementation_internal = name
    before = trace(model)
    with pytest.raises(HostError, match="attn_implementation='sdpa'") as error:
        sl.attach(model, nothing())
    assert name in str(error.value)
    assert differences(before, trace(model)) == []
    events = []
    with sl.attach(model, watcher(events, ("logits",))), torch.no_grad():  # what needs no attention still works
        text.config._attn_implementation_internal = "sdpa"
        model(**one(host))
    assert [e["station"] for e in events] == ["logits"]


def test_mixed_implementations_are_restored_config_by_config(tiny):
    host = tiny("llava")
    model = copy.deepcopy(host.model)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    top = model.config._attn_implementation
    before = trace(model)
    inputs = batch(host)
    plain = forward(model, inputs)
    with sl.attach(model, nothing()) as attached:
        assert model.config.text_config._attn_implementation == "sightline_eager"
        assert model.config.vision_config._attn_implementation == "sightline"
        assert model.config._attn_implementation == top
        assert {m.__dict__[SEAT].plain for m in attached.text_attention()} == {"eager"}
        assert {m.__dict__[SEAT].plain for m in attached.tower_attention()} == {"sdpa"}
        assert torch.equal(forward(model, inputs), plain)
    assert differences(before, trace(model)) == []


def test_only_what_is_needed_is_touched(tiny):
    host = tiny("llava")
    with sl.attach(host.model, weigh()):
        assert host.model.config.vision_config._attn_implementation == "sdpa"
        assert not any(SEAT in m.__dict__ for m in host.model.model.vision_tower.modules())
    with sl.attach(host.model, toy(logits=lambda site, x: None)):
        assert host.model.config.text_config._attn_implementation == "sdpa"


def test_two_models_of_one_configuration_are_refused_together(tiny):
    """They share the name of their attention function: leaving one would disarm the other."""
    import transformers as tf

    config = copy.deepcopy(tiny("llava").model.config)
    first, second = (tf.LlavaForConditionalGeneration(config).eval() for _ in range(2))
    if first.model.language_model.config is not second.model.language_model.config:
        pytest.skip("transformers copies configurations")
    before = trace(second)
    with sl.attach(first, nothing()), pytest.raises(HostError, match="shares its configuration"):
        sl.attach(second, nothing())
    assert differences(before, trace(second)) == []


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_attention_that_does_not_ask_by_name_is_noticed(tower, tiny):
    """Remote code mostly calls its own kernel: without this error, systems would silently do nothing."""
    host = tiny("llava")
    model = copy.deepcopy(host.model)
    modules = model.model.language_model if tower == "text" else model.model.vision_tower
    for module in modules.modules():
        if type(module).__name__.endswith("Attention"):
            module.forward = lambda hidden_states, **_: (hidden_states, None)
    forward(model, one(host))
    station = "attention" if tower == "text" else "vision_attention"
    with sl.attach(model, toy(**{station: lambda site: None})), pytest.raises(HostError, match="by itself"):
        forward(model, one(host))


def test_attention_without_a_configuration_is_refused(tiny):
    model = copy.deepcopy(tiny("llava").model)
    del model.model.language_model.layers[3].self_attn.config
    before = trace(model)
    with pytest.raises(HostError, match="keeps no config"):
        sl.attach(model, nothing())
    assert differences(before, trace(model)) == []


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("system", ["weigh", "lean", "var", "record"])
def test_no_map_appears_in_a_long_prompt(name, system, tiny, monkeypatch):
    """Through the whole model, not one tensor as large as a single head's map."""
    host = tiny(name)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 128 << 10)
    inputs = host.inputs(["the red cup " * 200], [[picture()]])
    n = inputs["input_ids"].shape[1]
    assert n > 600
    made = {
        "weigh": weigh,
        "lean": lean,
        "var": lambda: CASES["var"].active,
        "record": lambda: sl.record(image_rows=True),
    }
    with sl.attach(host.model, made[system]()), Largest() as seen, torch.no_grad():
        host.model(**inputs, logits_to_keep=1)
    assert 32 * n < seen.numel < n * n, seen.where


def test_softcaps_and_dropout_are_refused(tiny):
    host = tiny("gemma3")
    states = torch.zeros(1, 4, 3, 8)
    with sl.attach(host.model, weigh()) as attached, pytest.raises(HostError, match="softcap"):
        attention_function(attached.text_attention()[0], states, states, states, None, softcap=30.0)
    model = copy.deepcopy(tiny("llava").model).train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with sl.attach(model, weigh()), pytest.raises(HostError, match=r"dropout.*eval\(\)"):
        forward(model, one(tiny("llava")))

"""The seven stations: called in order, at the right place, with the right site; what they change is exactly that."""

from __future__ import annotations

import copy

import pytest
import torch

import sightline as sl
from sightline.engine.tokens import Role
from tests.engine.numerics import assert_close
from tests.engine.test_traps import CLOSE, batch, one
from tests.engine.toys import look, nothing, toy, watcher, weigh
from tests.engine.whole import forward, generate
from tests.tiny_hosts import TINY, picture

LVLM = [name for name in TINY if name != "gemma3_pan_and_scan"]


LAYERED = ("hidden", "attention", "mlp", "output")


def runs(events: list[dict]) -> list[str]:
    """Names of the stations with what repeats folded: those of every decoder layer, and the mask, are one
    "layers", those of every tower layer "tower"."""
    folded = dict.fromkeys((*LAYERED, "mask", "cut"), "layers") | dict.fromkeys(
        ("vision_hidden", "vision_attention"), "tower"
    )
    found: list[str] = []
    for e in events:
        name = folded.get(e["station"], e["station"])
        if not found or found[-1] != name:
            found.append(name)
    return found


@pytest.mark.parametrize("name", TINY)
def test_the_path_of_one_question(name, tiny):
    host = tiny(name)
    inputs = batch(host)
    rows, n = inputs["input_ids"].shape
    events: list[dict] = []
    with sl.attach(host.model, watcher(events)):
        generate(host.model, inputs, 3)
    every = ["positions", "layers", "cache", "logits"]
    assert runs(events) == ["pixels", "tower", "visual_tokens", *every, "second", *(every * 2)]

    vision = [e for e in events if e["tower"] == "vision"]
    layers = [e["layer"] for e in vision if e["station"] == "vision_attention"]
    assert layers == sorted(layers)
    assert set(layers) == set(range(vision[-1]["layers"]))
    assert all(e["ledger"] is None and e["prefill"] and e["step"] == 0 for e in vision)
    assert all(e["heads"] == 4 for e in vision if e["station"] == "vision_attention")

    text = [e for e in events if e["tower"] == "text"]
    hidden = [e for e in text if e["station"] == "hidden"]
    assert [e["layer"] for e in hidden] == [0, 1, 2, 3] * 3
    inside = [(e["station"], e["layer"]) for e in text if e["station"] in LAYERED]
    assert inside == [(s, i) for i in range(4) for s in LAYERED] * 3
    cuts = [(e["step"], e["layer"]) for e in text if e["station"] == "cut"]
    assert cuts == [(0, i) for i in range(4)], "only in the prompt can tokens be dropped"
    masks = [e for e in text if e["station"] == "mask"]  # once per kind of layer, in the prompt only
    assert [(e["step"], e["shape"][-2:]) for e in masks] == [(0, (n, n))] * (2 if "gemma3" in name else 1)
    axes = 3 if "qwen" in name else 1
    assert [e["shape"] for e in text if e["station"] == "positions"] == [(axes, rows, q) for q in (n, 1, 1)]
    assert [e["shape"] for e in hidden[::4]] == [(rows, n, 32), (rows, 1, 32), (rows, 1, 32)]
    assert [e["shape"] for e in text if e["station"] == "visual_tokens"] == [(rows, n, 32)]
    assert {e["shape"] for e in text if e["station"] == "logits"} == {(rows, host.model.config.text_config.vocab_size)}
    assert all(e["layer"] == -1 for e in text if e["station"] in ("visual_tokens", "cache", "logits"))
    for e in text:
        assert (e["layers"], e["heads"]) == (4, 4), e["station"]
        assert e["prefill"] == (e["step"] == 0)
        assert e["queries"] == (n if e["prefill"] else 1)
        assert e["start"] == (0 if e["prefill"] else n + e["step"] - 1)
        assert e["ledger"].shape == (rows, n + e["step"])
        assert torch.equal(e["ledger"].visual[:, :n], inputs["input_ids"] == host.model.config.image_token_id)
        assert (e["ledger"].role[:, n:] == int(Role.GENERATED)).all()
    assert [e["step"] for e in text if e["station"] == "logits"] == [0, 1, 2]
    assert len({id(e["state"]) for e in events}) == 1, "one sequence, one memory, from the tower to the last token"


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_memory_goes_from_the_tower_to_its_own_sequence_only(how, tiny):
    host = tiny("llava")
    inputs = one(host)
    found = []

    def tower(site):
        assert "answered" not in site.state
        site.state["seen"] = site.state.get("seen", 0) + 1

    def logits(site, x):
        found.append(site.state.get("seen"))
        site.state["answered"] = True

    with sl.attach(host.model, toy(vision_attention=tower, logits=logits)):
        for _ in range(3):
            forward(host.model, inputs) if how == "forward" else generate(host.model, inputs, 2)
    layers = host.model.config.vision_config.num_hidden_layers
    assert found == [layers] * (3 if how == "forward" else 6)


def test_memory_of_a_later_picture_joins_its_sequence(tiny):
    """`generate` encodes pictures before its forward: those of a second question belong to the cache it goes on with."""
    host = tiny("llava")
    more = host.inputs(["And this?"], [[picture(64, 64, 5)]])
    found, turn = [], [0]

    def tower(site):
        site.state[turn[0]] = True

    def logits(site, x):
        found.append(sorted(site.state))
        turn[0] += 1

    with sl.attach(host.model, toy(vision_attention=tower, logits=logits)), torch.no_grad():
        cache = host.model(**one(host)).past_key_values
        encoded = host.model.model.get_image_features(more["pixel_values"])
        features = {"image": encoded}
        host.model(input_ids=more["input_ids"], mm_encoder_outputs=features, past_key_values=cache)
        host.model(**one(host))
    assert found == [[0], [0, 1], [2]]


def test_a_tower_alone_begins_anew_with_every_picture(tiny, tiny_vit):
    for host, model in ((tiny("llava"), tiny("llava").model), (tiny_vit("timm"), tiny_vit("timm").model)):
        seen = []

        def count(site, seen=seen):
            site.state["calls"] = site.state.get("calls", 0) + 1
            seen.append(site.state["calls"])

        inputs = one(host) if hasattr(host, "placeholder") else {"x": host.inputs([picture()])}
        with sl.attach(model, toy(vision_attention=count)), torch.no_grad():
            model(**inputs)
            model(**inputs)
        assert seen == [*range(1, len(seen) // 2 + 1)] * 2


@pytest.mark.parametrize("name", LVLM)
def test_pixels(name, tiny):
    """Grey pictures by the station equal grey pictures given."""
    host = tiny(name)
    inputs = one(host)
    grey = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 0.5)}
    plain = generate(host.model, inputs)
    with sl.attach(host.model, toy(pixels=lambda site, x: torch.full_like(x, 0.5))):
        found = generate(host.model, inputs)
    wanted = generate(host.model, grey)
    assert torch.equal(found[1], wanted[1])
    assert (found[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LVLM)
def test_visual_tokens(name, tiny):
    """Zeros for every visual token equal zeros put into the decoder's input by hand, through generate."""
    host = tiny(name)
    inputs = one(host)

    def blank(site, x):
        assert x.shape[:2] == site.tokens.shape
        return x.masked_fill(site.tokens.visual[..., None], 0.0)

    with sl.attach(host.model, toy(visual_tokens=blank)):
        found = generate(host.model, inputs)
    visual = inputs["input_ids"] == host.model.config.image_token_id
    decoder = (
        host.model.model.text_model if hasattr(host.model.model, "text_model") else host.model.model.language_model
    )

    def by_hand(module, args, kwargs):
        x = kwargs["inputs_embeds"]
        if x.shape[1] == visual.shape[1]:
            kwargs["inputs_embeds"] = torch.where(visual[..., None], torch.zeros(()), x)
        return args, kwargs

    hook = decoder.register_forward_pre_hook(by_hand, with_kwargs=True)
    wanted = generate(host.model, inputs)
    hook.remove()
    plain = generate(host.model, inputs)
    assert torch.equal(found[1], wanted[1])
    assert (found[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LVLM)
def test_hidden(name, tiny):
    host = tiny(name)
    inputs = batch(host)
    shift = torch.linspace(-1, 1, 32)

    def push(site, x):
        return x + shift if site.layer == 2 else None

    with sl.attach(host.model, toy(hidden=push)) as attached:
        found = generate(host.model, inputs)
        owner = attached.text_attention()[2]
    layer = next(m for m in host.model.modules() if owner in m.children())

    def by_hand(module, args, kwargs):
        if args:
            return (args[0] + shift, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + shift}

    hook = layer.register_forward_pre_hook(by_hand, with_kwargs=True)
    wanted = generate(host.model, inputs)
    hook.remove()
    assert torch.equal(found[1], wanted[1])
    assert not torch.equal(found[1], generate(host.model, inputs)[1])


def test_logits(tiny):
    host = tiny("llava")
    inputs = batch(host)
    ids, plain = generate(host.model, inputs)
    chosen = ids[:, -5]
    calls = []

    def forbid(site, x):
        calls.append(x.clone())
        x = x.clone()
        x[torch.arange(2), chosen] = -torch.inf
        return x

    with sl.attach(host.model, toy(logits=forbid)):
        found = generate(host.model, inputs)
        with torch.no_grad():
            whole = host.model(**inputs).logits
    assert torch.equal(calls[0], plain[:, 0])
    assert not (found[0][:, -5:] == chosen[:, None]).any()
    assert (found[1][:, 0] == -torch.inf).sum() == 2
    rest = forward(host.model, inputs)
    assert torch.equal(whole[:, :-1], rest[:, :-1]), "only the next token's scores are the station's"


def test_the_next_token_under_right_padding(tiny):
    """Its scores are those of the last position that is not padding."""
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?", "Dog?"], [[picture()], [picture(80, 64, 1)]], padding_side="right")
    seen = []
    with sl.attach(host.model, toy(logits=lambda site, x: seen.append(x.clone()))):
        whole = forward(host.model, inputs)
    last = inputs["attention_mask"].sum(1) - 1
    assert last[0] != last[1]
    assert torch.equal(seen[0], whole[torch.arange(2), last])


def test_cache(tiny):
    """Values zeroed in the cache after the prompt equal the same done by hand between two forwards."""
    host = tiny("llava")
    inputs = one(host)

    def forget(site, cache):
        if site.prefill:
            assert cache.get_seq_length() == site.tokens.shape[1]
            cache.layers[1].values[:, :, site.tokens.visual[0]] = 0

    with sl.attach(host.model, toy(cache=forget)):
        found = generate(host.model, inputs, 3)
    with torch.no_grad():
        out = host.model(**inputs)
        visual = (inputs["input_ids"] == host.model.config.image_token_id)[0]
        out.past_key_values.layers[1].values[:, :, visual] = 0
        second = host.model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    assert_close("first token", found[1][:, 0], out.logits[:, -1], 1e-6)
    assert_close("second token", found[1][:, 1], second.logits[:, -1], 1e-6)
    assert not torch.equal(found[1], generate(host.model, inputs, 3)[1])


def test_attention_sees_what_the_host_computes(tiny):
    """The rows a probe sees are the weights an eager host returns, on every layer and step."""
    host = tiny("llava")
    inputs = batch(host)
    seen = {}

    def see(site, weights, first):
        assert first == 0
        assert weights.shape[2] == site.queries
        seen[site.step, site.layer] = weights

    with sl.attach(host.model, look(see)):
        generate(host.model, inputs, 3)
    model = copy.deepcopy(host.model)
    model.set_attn_implementation("eager")
    out = model.generate(**inputs, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    real = inputs["attention_mask"].bool()
    for (step, layer), weights in seen.items():
        wanted = out.attentions[step][layer]
        rows = real if step == 0 else torch.ones(2, 1, dtype=torch.bool)
        assert_close(f"{step}, {layer}", weights.transpose(1, 2)[rows], wanted.transpose(1, 2)[rows], CLOSE)
        assert torch.allclose(weights.transpose(1, 2)[rows].sum(-1), torch.ones(()), atol=1e-5)
        empty = weights.transpose(1, 2)[~rows]
        assert (empty == 0).all(), "a padding query attends to nothing"
    assert len(seen) == 12


def test_tuples_and_losses(tiny):
    host = tiny("llava")
    inputs = one(host)
    with torch.no_grad():
        plain = host.model(**inputs, labels=inputs["input_ids"], return_dict=False)
        with sl.attach(host.model, nothing()):
            found = host.model(**inputs, labels=inputs["input_ids"], return_dict=False)
            named = host.model(**inputs, labels=inputs["input_ids"])
    assert isinstance(found, tuple)
    assert len(found) == len(plain)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    assert torch.equal(named.loss, plain[0])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_positional_arguments(name, tiny):
    """Inputs may come by position: the ledger reads them off the host's signature."""
    host = tiny(name)
    inputs = dict(one(host))
    with sl.attach(host.model, weigh()):
        wanted = forward(host.model, inputs)
        with torch.no_grad():
            found = host.model(inputs.pop("input_ids"), inputs.pop("pixel_values"), **inputs).logits
    assert torch.equal(found, wanted)

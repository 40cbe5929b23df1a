"""Cuts inside the language model, on every host: the same numbers as an oracle that masks, and really fewer rows."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import sightline as sl
from sightline.engine.attach import MARK
from sightline.engine.attention import Edit, Probe
from sightline.engine.select import Keep
from sightline.engine.system import Site, System
from sightline.engine.tokens import Role, Tokens
from sightline.errors import AttachError, HostError, InputError
from sightline.hosts import find, get
from sightline.steer.var import VAR
from tests.engine.masked import without, without_gaps
from tests.engine.numerics import Questions, assert_close
from tests.engine.toys import toy, watcher
from tests.engine.whole import forward, generate
from tests.tiny_hosts import TINY, picture

CLOSE = 2e-5
QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]

everywhere = pytest.mark.parametrize("name", TINY)
both = pytest.mark.parametrize("positions", ["keep", "renumber"])


def wanted(tokens: Tokens, layer: int) -> Tensor:
    """(B, N) bool: what a cut before this layer keeps; rows keep different numbers."""
    row = torch.arange(tokens.shape[0])[:, None]
    return ~tokens.visual | ((tokens.position + layer) % (2 + row % 2) == 0)


def dropper(layers: tuple[int, ...] = (1, 3), positions: str = "keep") -> System:
    def station(site: Site, hidden: Tensor) -> Keep | None:
        assert hidden.shape[:2] == (site.tokens.shape[0], site.queries)
        if site.layer in layers:
            return Keep(wanted(site.tokens, site.layer)[:, site.start :], positions)
        return None

    return toy(cut=station, name="dropper")


def inputs_of(host, padding_side: str = "left"):
    return host.inputs(QUESTIONS, [[PICTURES[0]], PICTURES], padding_side=padding_side)


def ledger(host, inputs) -> Tokens:
    seen = []
    with sl.attach(host.model, watcher(seen, ("visual_tokens",))):
        forward(host.model, inputs)
    return seen[-1]["ledger"]


def oracle(host, inputs, layers: tuple[int, ...], positions: str):
    tokens = ledger(host, inputs)
    real = inputs["attention_mask"].bool()
    return without(host.model, {k: ~wanted(tokens, k) & real for k in layers}, real, positions == "renumber")


def lengths(tokens: Tokens, layers: tuple[int, ...], depth: int) -> list[int]:
    """Cache length of every layer after the prompt: the longest row, without padding once something was cut."""
    keep, found = torch.ones_like(tokens.visual), []
    for layer in range(depth):
        if layer in layers:
            keep = keep & wanted(tokens, layer) & (tokens.role != int(Role.PAD))
        found.append(int(keep.sum(1).max()))
    return found


@everywhere
@both
def test_generation_equals_masking(name, positions, tiny):
    """Padded rows, two pictures in one of them, two cuts, decode steps: all as if the dropped tokens were masked."""
    host = tiny(name)
    inputs = inputs_of(host)
    with sl.attach(host.model, dropper(positions=positions)):
        ids, logits = generate(host.model, inputs)
    answers = forward(oracle(host, inputs, (1, 3), positions), inputs, ids)
    assert_close("steps", logits, answers[:, -logits.shape[1] - 1 : -1], CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@both
def test_rows_without_padding(name, positions, tiny):
    """Without padding hosts make no mask; rows that keep different numbers need one all the same."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS[:1] * 2, [PICTURES[:1]] * 2)
    assert inputs["attention_mask"].all()
    with sl.attach(host.model, dropper(positions=positions)):
        ids, logits = generate(host.model, inputs)
    answers = forward(oracle(host, inputs, (1, 3), positions), inputs, ids)
    assert_close("cut", logits, answers[:, -logits.shape[1] - 1 : -1], CLOSE)
    with sl.attach(host.model, evictor((0, 1, 2, 3))):
        ids, logits = generate(host.model, inputs)
    gone = ~wanted(ledger(host, inputs), 1)
    assert_close("evicted", logits[:, 1:], _later(host, inputs, gone, ids)[:, 1:], CLOSE)


@everywhere
@both
def test_right_padding_equals_masking(name, positions, tiny):
    """Scoring: all logits of kept tokens; those of dropped ones are there too, with the host's shape."""
    host = tiny(name)
    inputs = inputs_of(host, "right")
    plain = forward(host.model, inputs)
    with sl.attach(host.model, dropper(positions=positions)):
        logits = forward(host.model, inputs)
    tokens = ledger(host, inputs)
    kept = inputs["attention_mask"].bool() & wanted(tokens, 1) & wanted(tokens, 3)
    assert logits.shape == plain.shape
    assert logits.isfinite().all()
    assert_close("kept", logits[kept], forward(oracle(host, inputs, (1, 3), positions), inputs)[kept], CLOSE)


@everywhere
@pytest.mark.parametrize("layers", [(1,), (1, 3), (2,)])
def test_caches_and_rows_are_shorter(name, layers, tiny):
    """Every layer computes and caches exactly the tokens that are left, and reports the whole length."""
    host = tiny(name)
    inputs, decoder = inputs_of(host), get(host.model, find(host.model).decoder)
    rows, hooks = [], []
    with sl.attach(host.model, dropper(layers)):
        for layer in decoder.layers:
            hooks.append(layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1])))
        with torch.no_grad():
            output = host.model(**inputs)
    for hook in hooks:
        hook.remove()
    expected = lengths(ledger(host, inputs), layers, len(decoder.layers))
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    window = getattr(decoder.config, "sliding_window", None)
    slides = [getattr(layer, "is_sliding", False) for layer in cache.layers]
    stored = [min(n, window - 1) if s else n for n, s in zip(expected, slides, strict=True)]
    assert rows == expected
    assert [layer.keys.shape[-2] for layer in cache.layers] == stored
    assert min(expected) < max(expected)
    width = inputs["input_ids"].shape[1]
    assert [cache.get_seq_length(i) for i in range(len(cache.layers))] == [width] * len(cache.layers)


@pytest.mark.parametrize(("name", "axes"), [("llava", 1), ("qwen2_5_vl", 3)])
def test_positions_without_gaps(name, axes, tiny):
    """Renumbered positions follow one another on one axis; on three they are what counting gives."""
    host = tiny(name)
    inputs = inputs_of(host)
    seen = []

    def look(site: Site, hidden: Tensor) -> None:
        seen.append(host.model.__dict__[MARK].sequences.current.cuts.depths[site.layer])

    with sl.attach(host.model, dropper((1,), "renumber"), toy(hidden=look)):
        forward(host.model, inputs)
    tokens, real = ledger(host, inputs), inputs["attention_mask"].bool()
    moved = without_gaps(places_of(host, inputs), ~wanted(tokens, 1) & real, real)
    depth = seen[1]
    assert seen[0] is None
    assert depth.places.shape[0] == axes
    for row in range(2):
        mine = depth.block[row] >= 0
        found = depth.places[:, row, mine]
        assert torch.equal(found, moved.view(-1, *moved.shape[-2:])[:, row, depth.block[row][mine]])
        first = int(found.min())  # without `generate`, padding on the left counts
        assert axes > 1 or found[0].tolist() == list(range(first, first + int(mine.sum())))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_without_cache(name, tiny):
    """Generation that repeats the whole sequence at every step drops the same tokens."""
    host = tiny(name)
    with sl.attach(host.model, dropper(positions="renumber")):
        ids, logits = generate(host.model, inputs_of(host))
        again, repeated = generate(host.model, inputs_of(host), use_cache=False)
    assert torch.equal(ids, again)
    assert_close("steps", logits, repeated, CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@both
def test_eager(name, positions, tiny):
    host = copy.deepcopy(TINY[name]())
    with sl.attach(host.model, dropper(positions=positions)):
        ids, logits = generate(host.model, inputs_of(host))
    host.model.set_attn_implementation("eager")
    with sl.attach(host.model, dropper(positions=positions)):
        again, eager = generate(host.model, inputs_of(host))
    assert torch.equal(ids, again)
    assert_close("steps", logits, eager, CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@both
def test_beams(name, positions, tiny):
    """Rows of one prompt drop the same tokens, so that a reordered cache stays true."""
    host = tiny(name)
    options = {"num_beams": 3, "num_return_sequences": 2}

    def half(site: Site, hidden: Tensor) -> Keep | None:
        keep = ~site.tokens.visual | (site.tokens.index % 2 == 0)
        return Keep(keep[:, site.start :], positions) if site.layer == 2 else None

    with sl.attach(host.model, toy(cut=half)):
        ids, _ = generate(host.model, inputs_of(host), **options)
        one, _ = generate(host.model, host.inputs(QUESTIONS[:1], [PICTURES[:1]]), **options)
    assert torch.equal(ids[:2, -5:], one[:, -5:])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_other_systems_behind_a_cut(name, tiny):
    """A system that edits by columns of its layer's ledger, and a recorder, do the same to a row in a batch and alone."""
    host = tiny(name)
    var = VAR(sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False, p=0.2)

    def half(site: Site, hidden: Tensor) -> Keep | None:
        keep = ~site.tokens.visual | (site.tokens.index % 2 == 0)
        return Keep(keep[:, site.start :]) if site.layer == 2 else None

    def thin(site: Site, cache) -> None:
        if site.step == 0:
            for layer in range(3):
                tokens = site.cuts.tokens(layer)
                site.cuts.evict(layer, ~tokens.visual | (tokens.index % 3 > 0))

    def answer(rows: list[int]):
        watch = sl.record(image_rows=True)
        with sl.attach(host.model, var, toy(cut=half, cache=thin), watch):
            ids, logits = generate(host.model, host.inputs([QUESTIONS[r] for r in rows], [[PICTURES[r]] for r in rows]))
        return ids[:, -5:], logits, watch.seen

    ids, logits, seen = answer([0, 1])
    with sl.attach(host.model, toy(cut=half, cache=thin)):
        plain = generate(host.model, host.inputs(QUESTIONS, [[p] for p in PICTURES]))[1]
    assert (logits - plain).abs().max() > 1e-3, "VAR acts"
    for row in range(2):
        one, steps, alone = answer([row])
        assert torch.equal(ids[row], one[0])
        assert_close("logits", logits[row], steps[0], CLOSE)
        assert_close("masses", seen.masses[:, :, row], alone.masses[:, :, 0], CLOSE)
        count = alone.rows.shape[-1]
        assert torch.allclose(seen.rows[:, :, row, :, :count].float(), alone.rows[:, :, 0].float(), atol=2e-3)
    assert torch.allclose(seen.masses.sum(-1), torch.ones(seen.masses.shape[:-1]), atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@both
def test_a_second_question_in_the_same_cache(name, positions, tiny):
    """A later block with a picture is cut too, behind what is left of the first one; so is one of text."""
    host = tiny(name)
    inputs = host.inputs(["Both?"], [PICTURES])
    width = inputs["input_ids"].shape[1] - 3
    with sl.attach(host.model, dropper(positions=positions)), torch.no_grad():
        once = host.model(**inputs).logits
        places = places_of(host, inputs)
        first = {k: v[:, :width] if k in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids") else v
                 for k, v in inputs.items()}  # fmt: skip
        cache = host.model(**first, position_ids=places[..., :width]).past_key_values
        rest = {"input_ids": inputs["input_ids"][:, width:], "attention_mask": inputs["attention_mask"]}
        more = {"token_type_ids": inputs["token_type_ids"][:, width:]} if "token_type_ids" in inputs else {}
        chunk = host.model(**rest, **more, position_ids=places[..., width:], past_key_values=cache).logits
    assert_close("text behind", chunk[:, -3:], once[:, -3:], CLOSE)


def places_of(host, inputs) -> Tensor:
    """The host's own position ids of a prompt."""
    given = []
    rotary = get(get(host.model, find(host.model).decoder), "rotary_emb")

    def keep(module, args, kwargs, output):
        given.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    hook = rotary.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        host.model(**inputs)
    hook.remove()
    return given[0]


@everywhere
def test_keeping_everything_is_the_host(name, tiny):
    """Bit for bit, although the station acts."""
    host = tiny(name)
    inputs = inputs_of(host)
    plain = generate(host.model, inputs)
    every = toy(cut=lambda site, hidden: Keep(torch.ones(hidden.shape[:2], dtype=torch.bool)))
    with sl.attach(host.model, every):
        found = generate(host.model, inputs)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_before_the_cut(name, tiny):
    """What `site.cuts.rows` shows is what the layer then gives to these queries, on the same keys."""
    host = tiny(name)
    inputs = inputs_of(host)
    early, late = {}, {}

    def ask(site: Site, hidden: Tensor) -> None:
        last = torch.full((2, 1), site.queries - 1)
        early[site.layer] = site.cuts.rows(torch.cat([last, last - 2], 1))

    def see(site: Site):
        return Probe(lambda w, first: late.__setitem__((site.layer, first), w), start=site.queries - 3)

    first = dropper((1,), "renumber")
    with sl.attach(host.model, first, toy(cut=ask), toy(attention=see)):
        plain = forward(host.model, inputs)
    for layer in range(4):
        seen = torch.cat([w for (at, _), w in late.items() if at == layer], 2)
        assert_close(f"layer {layer}", early[layer], seen[:, :, [2, 0]], CLOSE)
    with sl.attach(host.model, first):
        assert torch.equal(forward(host.model, inputs), plain), "looking changes nothing"


def test_a_static_cache_is_refused(tiny):
    host = tiny("llava")
    with sl.attach(host.model, dropper()), pytest.raises(HostError, match="dynamic"):
        generate(host.model, inputs_of(host), cache_implementation="static")


def test_going_on_without_the_system(tiny):
    """A shortened cache goes on under the same system attached again, and is refused under others."""
    host = tiny("llava")
    inputs = inputs_of(host)
    token = {"input_ids": torch.full((2, 1), 300)}
    token["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        with sl.attach(host.model, dropper()):
            cache = host.model(**inputs).past_key_values
            wanted_logits = host.model(**token, past_key_values=copy.deepcopy(cache)).logits
        with (
            sl.attach(host.model, toy(hidden=lambda site, x: None)),
            pytest.raises(AttachError, match="attach them again"),
        ):
            host.model(**token, past_key_values=copy.deepcopy(cache))
        with sl.attach(host.model, dropper()):
            assert torch.equal(host.model(**token, past_key_values=cache).logits, wanted_logits)


def test_a_cut_of_another_size_is_refused(tiny):
    host = tiny("llava")
    bad = toy(cut=lambda site, hidden: Keep(torch.ones(1, 3, dtype=torch.bool)))
    with sl.attach(host.model, bad), pytest.raises(InputError, match="block of"):
        forward(host.model, inputs_of(host))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_decoding_asks_the_device_nothing(name, tiny):
    host = tiny(name)

    def decode() -> list[str]:
        with torch.no_grad():
            cache = host.model(**inputs_of(host)).past_key_values
            n, token = inputs_of(host)["input_ids"].shape[1], torch.full((2, 1), 300)
            for step in range(2):
                mask = torch.nn.functional.pad(inputs_of(host)["attention_mask"], (0, step + 1), value=1)
                with Questions() as questions:
                    host.model(input_ids=token, attention_mask=mask, position_ids=torch.full((2, 1), n + step),
                               past_key_values=cache)  # fmt: skip
        return questions.asked

    own = decode()
    with sl.attach(host.model, dropper(positions="renumber")):
        assert decode() == own


def test_gradients_flow_through_kept_tokens(tiny):
    host = tiny("llava")
    model, inputs = copy.deepcopy(host.model), inputs_of(host)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    with sl.attach(model, dropper(positions="renumber")):
        model(**inputs, labels=labels).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# -- taking out of the cache --------------------------------------------------------------------------------------------


def evictor(layers: tuple[int, ...], positions: str = "keep") -> System:
    def station(site: Site, cache) -> None:
        if site.step == 0:
            for layer in layers:
                tokens = site.cuts.tokens(layer)
                site.cuts.evict(layer, wanted(tokens, 1))

    return toy(cache=station, name="evictor")


@everywhere
def test_a_thinned_cache_equals_masking(name, tiny):
    """After the prompt tokens leave the caches of all layers: decode steps are as if they were masked from then on."""
    host = tiny(name)
    inputs = inputs_of(host)
    tokens, width = ledger(host, inputs), inputs["input_ids"].shape[1]
    with sl.attach(host.model, evictor((0, 1, 2, 3))), torch.no_grad():
        output = host.model(**inputs)
        cache, sizes = output.past_key_values, [layer.keys.shape[-2] for layer in output.past_key_values.layers]
        assert cache.get_seq_length() == width
    real = inputs["attention_mask"].bool()
    slides = [getattr(layer, "is_sliding", False) for layer in cache.layers]
    assert [s for s, slide in zip(sizes, slides, strict=True) if not slide] == [
        int((wanted(tokens, 1) & real).sum(1).max())
    ] * slides.count(False)
    with sl.attach(host.model, evictor((0, 1, 2, 3))):
        ids, logits = generate(host.model, inputs)
    assert_close("first", logits[:, 0], generate(host.model, inputs)[1][:, 0], 1e-6)
    gone = ~wanted(tokens, 1) & real
    masked = _later(host, inputs, gone, ids)
    assert_close("later", logits[:, 1:], masked[:, 1:], CLOSE)


def test_a_reordered_cache_stays_true(tiny):
    """Beams swap rows whose caches lost other tokens: what is held, and its padding, moves with them."""
    host = tiny("llava")
    inputs = host.inputs([QUESTIONS[0]] * 2, [PICTURES[:1]] * 2)
    width = inputs["input_ids"].shape[1]
    token = {"input_ids": torch.tensor([[300], [300]]), "attention_mask": torch.ones(2, width + 1, dtype=torch.long)}
    found = []
    with sl.attach(host.model, evictor((0, 1, 2, 3))), torch.no_grad():
        for order in ([0, 1], [1, 0]):
            cache = host.model(**inputs).past_key_values
            cache.reorder_cache(torch.tensor(order))
            found.append(host.model(**token, past_key_values=cache).logits[torch.tensor(order)])
    assert (found[0][0] - found[0][1]).abs().max() > 1e-3
    assert_close("swapped", found[1], found[0], 1e-5)


def _later(host, inputs, gone: Tensor, ids: Tensor) -> Tensor:
    """Step logits of the plain host along `ids` when its generated tokens do not see `gone` prompt tokens."""

    def blind(site: Site) -> Edit | None:
        if site.prefill:
            return None
        bias = torch.zeros(gone.shape[0], 1, 1, site.tokens.shape[1])
        bias[..., : gone.shape[1]].masked_fill_(gone[:, None, None], -torch.inf)
        return Edit(bias=bias)

    width, steps = inputs["input_ids"].shape[1], []

    def forced(input_ids, scores):
        steps.append(1)
        return torch.full_like(scores, -1e9).scatter(1, ids[:, width + len(steps) - 1, None], 0.0)

    with sl.attach(host.model, toy(attention=blind)):
        return generate(host.model, inputs, logits_processor=[forced])[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_rows_cost_keys_and_the_queries_that_ask(name, tiny):
    """The rows are those of the whole layer; of the projections only keys see all tokens."""
    from sightline.engine import cuts

    host, found, widths = tiny(name), [], []
    inputs = host.inputs(["Is there a dog?"], [[picture()]])

    def look(site, hidden):
        if site.layer == 1:
            found.append(site.cuts.rows(torch.tensor([[2, site.queries - 1]])))

    attention = get(get(host.model, find(host.model).decoder).layers[1], "self_attn")
    projections = [getattr(attention, f"{n}_proj") for n in "qkv"]

    with sl.attach(host.model, toy(cut=look)):
        forward(host.model, inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuts, "lean", lambda *_: nullcontext())
            forward(host.model, inputs)
        assert_close("rows", found[0], found[1], 1e-6)
        patched = {id(p): k for k, p in enumerate(projections)}
        plain = torch.nn.Linear.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn.Linear,
                "forward",
                lambda m, x: (widths.append((patched[id(m)], x.shape[1])) if id(m) in patched else None, plain(m, x))[
                    1
                ],
            )
            forward(host.model, inputs)
    whole = inputs["input_ids"].shape[1]
    assert sorted(widths) == sorted([(0, 2), (1, whole), (0, whole), (1, whole), (2, whole)])  # looked at, then run
    assert all("forward" not in p.__dict__ for p in projections)

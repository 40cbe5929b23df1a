"""`generate` in all its forms on an attached model, against whole maps or against itself.

The edit is `weigh(3.0)` on image keys of layers 1 and 2; the oracle runs the same generation on whole maps.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.engine.tokens import Role
from sightline.errors import AttachError
from tests.engine.numerics import assert_close
from tests.engine.test_traps import CLOSE, batch, one
from tests.engine.toys import nothing, toy, watcher, weigh
from tests.engine.whole import extended, forward, generate, times, whole
from tests.tiny_hosts import TINY, picture

FACTOR = 3.0


def both(host, inputs, tokens: int = 5, **options):
    """(ids, logits) attached, and of the oracle."""
    with sl.attach(host.model, weigh(FACTOR)):
        found = generate(host.model, inputs, tokens, **options)
    return found, generate(whole(host, inputs, times(FACTOR)), inputs, tokens, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 2, "use_cache": False},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
        {"use_cache": False},
        {"do_sample": True, "top_k": 5, "use_cache": False, "num_return_sequences": 2},
    ],
    ids=lambda o: ",".join(o),
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_beams_samples_and_no_cache(name, options, tiny):
    host = tiny(name)
    inputs = batch(host)
    torch.manual_seed(0)
    with sl.attach(host.model, weigh(FACTOR)):
        ids, logits = generate(host.model, inputs, **options)
    torch.manual_seed(0)
    wanted, right = generate(whole(host, inputs, times(FACTOR)), inputs, **options)
    assert torch.equal(ids, wanted)
    assert_close("logits", logits, right, CLOSE)
    torch.manual_seed(0)
    assert (generate(host.model, inputs, **options)[1] - right).abs().max() > 1e-2


@pytest.mark.parametrize("name", TINY)
def test_without_cache_equals_with(name, tiny):
    host = tiny(name)
    inputs = batch(host)
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))):
        cached = generate(host.model, inputs)
        del events[:]
        uncached = generate(host.model, inputs, use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    assert_close("logits", uncached[1], cached[1], CLOSE)
    n = inputs["input_ids"].shape[1]
    for step, e in enumerate(events):
        assert (e["step"], e["start"], e["queries"]) == (step, 0, n + step)
        assert (e["ledger"].role[:, n:] == int(Role.GENERATED)).all()
        assert e["ledger"].shape[1] == n + step
        assert not (e["ledger"].role[:, :n] == int(Role.GENERATED)).any()


def test_another_prompt_without_cache_is_another_sequence(tiny):
    host = tiny("llava")
    events: list[dict] = []
    with sl.attach(host.model, watcher(events, ("logits",))):
        for question in ("Is there a dog?", "Is there a cat? Yes, there is a cat."):
            generate(
                host.model,
                one(host) if "dog" in question else host.inputs([question], [[picture()]]),
                2,
                use_cache=False,
            )
    assert [e["step"] for e in events] == [0, 1, 0, 1]
    assert events[0]["state"] is events[1]["state"]
    assert events[1]["state"] is not events[2]["state"]


def test_guidance_runs_a_second_sequence_without_a_picture(tiny):
    """Classifier-free guidance: the branch without the picture has its own cache, ledger and memory."""
    host = tiny("llava")
    inputs = one(host)
    n = inputs["input_ids"].shape[1]
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))):
        out = host.model.generate(
            **inputs,
            max_new_tokens=4,
            guidance_scale=1.5,
            output_scores=True,
            return_dict_in_generate=True,
            suppress_tokens=None,
        )
    with_image = [e for e in events if e["ledger"].has_image]
    without = [e for e in events if not e["ledger"].has_image]
    assert [e["ledger"].shape[1] for e in with_image] == [n, n + 1, n + 2, n + 3]
    assert [e["ledger"].shape[1] for e in without] == [1, 2, 3, 4]
    assert [e["step"] for e in with_image] == [e["step"] for e in without] == [0, 1, 2, 3]
    assert len({id(e["state"]) for e in with_image}) == len({id(e["state"]) for e in without}) == 1
    assert with_image[0]["state"] is not without[0]["state"]

    ids = out.sequences
    conditional = forward(whole(host, inputs, times(FACTOR)), inputs, ids)[:, n - 1 : -1].log_softmax(-1)
    tail = ids[:, n - 1 : -1]
    with torch.no_grad():
        free = host.model(input_ids=tail).logits.log_softmax(-1)
    assert_close("scores", torch.stack(out.scores, 1), free + 1.5 * (conditional - free), CLOSE)


def test_a_row_without_a_picture_among_others(tiny):
    for name in ("llava", "qwen2_5_vl", "gemma3", "idefics3"):
        host = tiny(name)
        questions = ["Is there a dog?", "How many red cups are on the table?"]
        inputs = host.inputs(questions, [[], [picture()]])
        with sl.attach(host.model, weigh(FACTOR)):
            together = generate(host.model, inputs)
            with_picture = generate(host.model, host.inputs(questions[1:], [[picture()]]))
        text = generate(host.model, host.inputs(questions[:1]))  # nothing is attached: nothing is to be edited
        assert_close(f"{name}, text", together[1][0], text[1][0], CLOSE)
        assert_close(f"{name}, picture", together[1][1], with_picture[1][0], CLOSE)


def test_several_pictures(tiny):
    for name in ("llava", "llava_next", "qwen3_vl"):
        host = tiny(name)
        inputs = host.inputs(["One.", "Two?"], [[picture(), picture(80, 64, 1)], [picture(64, 64, 2)]])
        found, wanted = both(host, inputs)
        assert torch.equal(found[0], wanted[0])
        assert_close(name, found[1], wanted[1], CLOSE)


# -- caches that go on ----------------------------------------------------------------------------------------------------


def second_question(host, ids, text: str = " Is there a cat?"):
    """ids of the conversation so far, with another question behind it."""
    more = host.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return torch.cat([ids, more.expand(ids.shape[0], -1)], 1)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "qwen2_5_vl", "gemma3"])
def test_a_second_question_on_the_same_cache(name, tiny):
    host = tiny(name)
    inputs = batch(host)
    n = inputs["input_ids"].shape[1]
    with sl.attach(host.model, weigh(FACTOR)):
        first = host.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
        ids = second_question(host, first.sequences)
        mask = F.pad(inputs["attention_mask"], (0, ids.shape[1] - n), value=1)
        out = host.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_logits=True,
        )
    wanted = forward(whole(host, inputs, times(FACTOR)), inputs, out.sequences)[:, ids.shape[1] - 1 : -1]
    assert_close("logits", torch.stack(out.logits, 1), wanted, CLOSE)


def test_a_second_question_with_another_picture(tiny):
    host = tiny("llava")
    inputs, more = one(host), host.inputs(["And this?"], [[picture(64, 64, 5)]])
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))), torch.no_grad():
        first = host.model(**inputs)
        n = inputs["input_ids"].shape[1]
        mask = torch.ones(1, n + more["input_ids"].shape[1], dtype=torch.long)
        second = host.model(**{**more, "attention_mask": mask}, past_key_values=first.past_key_values)
    together = {
        "input_ids": torch.cat([inputs["input_ids"], more["input_ids"]], 1),
        "attention_mask": mask,
        "pixel_values": torch.cat([inputs["pixel_values"], more["pixel_values"]]),
    }
    wanted = forward(whole(host, together, times(FACTOR)), together)
    assert_close("logits", second.logits, wanted[:, n:], CLOSE)
    assert events[-1]["ledger"].image.max() == 1
    assert events[-1]["prefill"]
    assert (events[-1]["start"], events[-1]["step"]) == (n, 1)


@pytest.mark.parametrize("cuts", [(-5,), (2, -6, -4)], ids=["behind the picture", "in the padding, too"])
def test_a_prompt_in_chunks(cuts, tiny):
    """Edits of a chunk know the keys of the chunks before."""
    host = tiny("llava")
    inputs = batch(host)
    n = inputs["input_ids"].shape[1]
    image_end = int((inputs["input_ids"] == host.model.config.image_token_id).any(0).nonzero().max())
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))), torch.no_grad():
        cache, parts, at = None, [], 0
        for stop in (*[c % n for c in cuts], n):
            images = {"pixel_values": inputs["pixel_values"]} if at <= image_end - 35 < stop else {}
            part = {"input_ids": inputs["input_ids"][:, at:stop], "attention_mask": inputs["attention_mask"][:, :stop]}
            positions = (part["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, at:]
            out = host.model(**part, **images, past_key_values=cache, position_ids=positions)
            cache, at = out.past_key_values, stop
            parts.append(out.logits)
        ledger = events[-1]["ledger"]
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        whole_prompt = host.model(**inputs, position_ids=positions).logits
    real = inputs["attention_mask"].bool()
    assert_close("logits", torch.cat(parts, 1)[real], whole_prompt[real], CLOSE)
    assert torch.equal(ledger.role, events[-1]["ledger"].role)
    assert torch.equal(ledger.role != int(Role.PAD), real)
    assert not real.all()


def test_a_copied_cache_goes_on_by_itself(tiny):
    """Prefill once, then answer two ways: each copy has its own ledger and memory."""
    host = tiny("llava")
    inputs = one(host)
    n = inputs["input_ids"].shape[1]
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))), torch.no_grad():
        first = host.model(**inputs).past_key_values
        second = copy.deepcopy(first)
        for token, cache in ((300, first), (310, second), (301, first), (311, second)):
            out = host.model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    assert [e["ledger"].shape[1] for e in events] == [n, n + 1, n + 1, n + 2, n + 2]
    assert [e["step"] for e in events] == [0, 1, 1, 2, 2]
    assert events[1]["state"] is events[3]["state"]
    assert events[2]["state"] is events[4]["state"]
    assert events[1]["state"] is not events[2]["state"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[310, 311]])], 1)
    wanted = forward(whole(host, inputs, times(FACTOR)), inputs, ids)[:, -1]
    assert_close("logits", out.logits[:, -1], wanted, CLOSE)


def test_a_cropped_cache_goes_on_from_there(tiny):
    host = tiny("llava")
    inputs = one(host)
    with sl.attach(host.model, weigh(FACTOR)), torch.no_grad():
        cache = host.model(**inputs).past_key_values
        for token in (300, 301, 302):
            host.model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-2)
        out = host.model(input_ids=torch.tensor([[305]]), past_key_values=cache)
        cache.crop(-5)
        tail = inputs["input_ids"][:, -3:]
        again = host.model(input_ids=tail, past_key_values=cache)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[300, 305]])], 1)
    oracle = whole(host, inputs, times(FACTOR))
    assert_close("logits", out.logits[:, -1], forward(oracle, inputs, ids)[:, -1], CLOSE)
    assert_close("logits", again.logits, forward(oracle, inputs)[:, -3:], CLOSE)


def test_a_cache_filled_before_attaching_warns(tiny):
    host = tiny("llava")
    inputs = one(host)
    n = inputs["input_ids"].shape[1]
    events: list[dict] = []
    with torch.no_grad():
        cache = host.model(**inputs).past_key_values
        with sl.attach(host.model, nothing(), watcher(events, ("logits",))):
            with pytest.warns(UserWarning, match="filled before the systems were attached"):
                host.model(input_ids=torch.tensor([[300]]), past_key_values=cache)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # once is enough
                host.model(input_ids=torch.tensor([[301, 302]]), past_key_values=cache)
    ledger = events[-1]["ledger"]
    assert ledger.shape == (1, n + 3)
    assert (ledger.role[:, :n] == int(Role.BEFORE)).all()
    assert ledger.role[0, n:].tolist() == [Role.GENERATED, Role.BEFORE, Role.BEFORE]


def test_a_cache_that_went_on_while_detached(tiny):
    """The ledger knows the prompt; what came while nobody looked counts as generated."""
    host = tiny("llava")
    inputs = one(host)
    n = inputs["input_ids"].shape[1]
    events: list[dict] = []
    with torch.no_grad():
        with sl.attach(host.model, weigh(FACTOR)):
            cache = host.model(**inputs).past_key_values
        for token in (300, 301):
            host.model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))):
            host.model(input_ids=torch.tensor([[302]]), past_key_values=cache)
    ledger = events[0]["ledger"]
    assert ledger.shape == (1, n + 3)
    assert (ledger.role[:, n:] == int(Role.GENERATED)).all()
    assert torch.equal(ledger.visual[:, :n], inputs["input_ids"] == host.model.config.image_token_id)
    assert ledger.position.tolist() == [list(range(n + 3))]


def test_another_attachment_takes_a_cache_over_without_its_memory(tiny):
    host = tiny("llava")
    inputs = one(host)
    states = []
    with torch.no_grad():
        with sl.attach(host.model, toy(hidden=lambda site, x: site.state.setdefault("mine", 1) and None)):
            cache = host.model(**inputs).past_key_values
        with sl.attach(host.model, toy(logits=lambda site, x: states.append(dict(site.state)))) as attached:
            host.model(input_ids=torch.tensor([[300]]), past_key_values=cache)
            assert cache._sightline.owner is attached.sequences.owner
    assert states == [{}]


def test_a_cache_of_other_rows_is_refused(tiny):
    host = tiny("llava")
    with sl.attach(host.model, weigh()), torch.no_grad():
        cache = host.model(**one(host)).past_key_values
        with pytest.raises(AttachError, match=r"holds 1 rows, the new block 2"):
            host.model(input_ids=torch.tensor([[300], [301]]), past_key_values=cache)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_speculation_with_prompt_lookup(name, tiny):
    """Blocks of several new tokens, some taken back: the same answer, token by token."""
    host = tiny(name)
    question = "the red cup the red cup the red cup the red cup"
    inputs = host.inputs([question], [[picture()]])
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))):
        wanted = host.model.generate(**inputs, max_new_tokens=12)
        del events[:]
        found = host.model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(found, wanted)
    assert any(e["queries"] > 1 and e["step"] > 0 for e in events), "nothing was looked up"
    n = inputs["input_ids"].shape[1]
    for e in events:
        assert (e["ledger"].role[:, n:] != int(Role.IMAGE)).all()
        assert e["ledger"].shape[1] == e["start"] + e["queries"]


def test_features_encoded_beforehand(tiny):
    """`mm_encoder_outputs` instead of pixels."""
    host = tiny("llava")
    inputs = batch(host)
    with torch.no_grad():
        encoded = host.model.model.get_image_features(inputs["pixel_values"])
    counts = [len(f) for f in encoded.pooler_output]
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))):
        wanted = generate(host.model, inputs)
        found = generate(host.model, rest, mm_encoder_outputs={"image": encoded})
    assert torch.equal(found[0], wanted[0])
    assert_close("logits", found[1], wanted[1], CLOSE)
    assert counts == [36, 36]
    two = host.inputs(["Both?"], [[picture(), picture(80, 64, 1)]])
    with torch.no_grad():
        both_encoded = host.model.model.get_image_features(two["pixel_values"])
    rest = {k: v for k, v in two.items() if k != "pixel_values"}
    with sl.attach(host.model, watcher(events, ("logits",))), torch.no_grad():
        host.model(**rest, mm_encoder_outputs={"image": both_encoded})
    image = events[-1]["ledger"].image[0]
    assert [(image == k).sum() for k in range(3)] == [36, 36, 0], "adjacent pictures are told apart by their features"


@pytest.mark.parametrize("name", TINY)
def test_pictures_side_by_side_in_a_plain_forward(name, tiny):
    """Without text between them, and without `generate`'s encoded features, every picture is still one image."""
    host = tiny(name)
    images = [[picture(80, 64), picture(64, 96, 1)], [picture(96, 96, 2)]]
    inputs = host.inputs(["Both?", "One?"], images)
    events: list[dict] = []
    with sl.attach(host.model, watcher(events, ("logits",))), torch.no_grad():
        host.model(**inputs)
        host.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    plain, generated = (event["ledger"].image for event in events)
    assert torch.equal(plain, generated)
    if name != "gemma3_pan_and_scan":  # there every crop stands by itself, and is an image of its own
        assert [len(set(row.tolist()) - {-1}) for row in plain] == [2, 1]


def test_features_thinned_beforehand(tiny):
    """Tokens taken out before the decoder, another number in each row: the ledger counts what is left."""
    host = tiny("llava")
    inputs = batch(host)
    image = host.model.config.image_token_id
    with torch.no_grad():
        features = host.model.model.get_image_features(inputs["pixel_values"]).pooler_output
    rows = []
    for ids, mask, keep in zip(inputs["input_ids"], inputs["attention_mask"], (8, 4), strict=True):
        places = (ids == image).nonzero().flatten()
        stay = mask.bool()
        stay[places[keep:]] = False
        rows.append(ids[stay])
    width = max(map(len, rows))
    thin = {
        "input_ids": torch.stack(
            [F.pad(r, (width - len(r), 0), value=host.processor.tokenizer.pad_token_id) for r in rows]
        ),
        "attention_mask": torch.stack([F.pad(torch.ones_like(r), (width - len(r), 0)) for r in rows]),
    }
    encoded = {
        "image": BaseModelOutputWithPooling(pooler_output=[f[:k] for f, k in zip(features, (8, 4), strict=True)])
    }
    events: list[dict] = []
    with sl.attach(host.model, weigh(FACTOR), watcher(events, ("logits",))):
        ids, logits = generate(host.model, thin, mm_encoder_outputs=encoded)
    wanted = forward(whole(host, thin, times(FACTOR)), {**thin, "mm_encoder_outputs": encoded}, ids)
    assert_close("logits", logits, wanted[:, width - 1 : -1], CLOSE)
    assert events[0]["ledger"].visual.sum(1).tolist() == [8, 4]


def test_extended_inputs_are_the_prompts(tiny):
    """The oracle's inputs: nothing is lost when a prompt grows by what was generated."""
    inputs = one(tiny("gemma3"))
    more = extended(inputs, F.pad(inputs["input_ids"], (0, 3), value=5))
    assert more["input_ids"].shape == more["attention_mask"].shape == more["token_type_ids"].shape


def test_the_old_name_of_a_cache_is_left_alone():
    """transformers warns of it, also where a forward made no cache."""

    class Output:
        cache = None

        @property
        def past_key_values(self):
            raise AssertionError("asked for the deprecated name")

    assert made_cache(Output()) is None

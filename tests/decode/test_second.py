"""The machinery of second streams: one forward for both, caches that are copied, cropped and given back, and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import sightline as sl
from sightline.decode import AGLA, DAMRO, LQCD, VDGD
from sightline.engine import joined, prompts
from sightline.engine.sequences import KEY, made_cache
from sightline.errors import InputError
from tests.engine.numerics import assert_close
from tests.engine.whole import generate
from tests.tiny_hosts import picture

QUESTIONS, PICTURES = ["Is there a dog?", "How many red cups are on the table?"], [[picture()], [picture(80, 64, 1)]]
LONGER = LQCD(alpha=2.0, beta=0.0, lead="I think that the answer is yes.")  # its second prompt is the longer one
SHORTER = DAMRO(alpha=2.0, topk=3, beta=0.0)
CASES = {"longer": LONGER, "shorter": SHORTER, "as long": AGLA(alpha=2.0, beta=0.0, ratio=0.3)}


def inputs(host):
    return host.inputs(QUESTIONS, PICTURES)


@pytest.fixture
def apart(monkeypatch):
    """Two forwards per token, never one for both."""

    def refuse():
        monkeypatch.setattr(joined, "fits", lambda *_: False)

    return refuse


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_one_forward_for_both_is_two_forwards(case, options, tiny, apart) -> None:
    host = tiny("llava")
    with sl.attach(host.model, CASES[case]):
        forwards = []
        hook = host.model.lm_head.register_forward_hook(lambda m, a, out: forwards.append(out.shape[0]))
        try:
            together = generate(host.model, inputs(host), **options)
        finally:
            hook.remove()
        rows = 6 if options else 2
        assert forwards[2:] == [2 * rows] * 4, "after the two prompts, one forward of both streams per token"
        apart()
        alone = generate(host.model, inputs(host), **options)
    assert torch.equal(together[0], alone[0])
    assert_close("logits", together[1], alone[1], 2e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_and_samples_follow_from_their_own_tokens(name, tiny) -> None:
    """Every step's scores of a chosen beam are those of a forward over its tokens, without cache."""
    host = tiny(name)
    with sl.attach(host.model, LONGER):
        for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0}):
            torch.manual_seed(0)
            cached = generate(host.model, inputs(host), **options)
            torch.manual_seed(0)
            anew = generate(host.model, inputs(host), use_cache=False, **options)
            assert torch.equal(cached[0], anew[0])
            assert_close(str(options), cached[1], anew[1], 5e-5)


def test_beams_that_tie_give_each_row_its_own_answer(tiny) -> None:
    """VDGD's scores hardly depend on what came before; the cut by plausibility does."""
    host = tiny("llava")
    with sl.attach(host.model, VDGD(alpha=0.3, description_tokens=4)):
        ids, _ = generate(host.model, inputs(host), num_beams=2)
        for row in range(2):
            one, _ = generate(host.model, host.inputs([QUESTIONS[row]], [PICTURES[row]]), num_beams=2)
            assert torch.equal(ids[row, -5:], one[0, -5:])


@pytest.mark.parametrize("case", ["longer", "shorter"])
def test_a_cache_is_given_back_as_it_was(case, tiny) -> None:
    """After leaving, the cache holds the first stream alone, bit for bit what two forwards would have left there."""
    host = tiny("llava")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True}
    with sl.attach(host.model, CASES[case]):
        out = host.model.generate(**inputs(host), **options)
        cache, twin = made_cache(out), copy.deepcopy(made_cache(out))
        assert cache.layers[0].keys.shape[0] == twin.layers[0].keys.shape[0] == 4
    mask = torch.nn.functional.pad(inputs(host)["attention_mask"], (0, 3), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = host.model(**{**inputs(host), "input_ids": out.sequences[:, :-1], "attention_mask": mask},
                           position_ids=positions)  # fmt: skip
    for found in (cache, twin):
        assert found.get_seq_length() == mask.shape[1]
        for a, b in zip(found.layers, made_cache(whole).layers, strict=True):
            real = mask.bool()[:, None, :, None].expand_as(b.keys)
            assert_close("keys", a.keys[real], b.keys[real], 2e-5)
    with torch.no_grad():
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        again = host.model(input_ids=out.sequences[:, -1:], attention_mask=mask, cache=cache).logits
    assert again.isfinite().all()


def test_caches_go_with_their_last_reference(tiny) -> None:
    """Keys and values of both streams leave at once, not when the garbage collector comes around."""
    host = tiny("llava")
    gc.collect()
    gc.disable()
    try:
        with sl.attach(host.model, DAMRO()):
            out = host.model.generate(
                **inputs(host), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            cache = weakref.ref(made_cache(out))
            second = weakref.ref(next(iter(getattr(cache(), KEY).seconds.values())))
            assert second() is not None
            del out
        assert cache() is None
        assert second() is None
    finally:
        gc.enable()


def test_a_copied_cache_goes_on_alone(tiny) -> None:
    """Two continuations of one prompt, one from a copy, do not see each other; a cropped one repeats itself."""
    host = tiny("llava")
    one = host.inputs(QUESTIONS[:1], PICTURES[:1])

    def step(cache, token: int, at: int):
        places = torch.tensor([[one["input_ids"].shape[1] + at]])
        return host.model(input_ids=torch.tensor([[token]]), cache=cache, position_ids=places).logits

    with torch.no_grad(), sl.attach(host.model, SHORTER):
        cache = made_cache(host.model(**one))
        step(cache, 300, 0)
        twin = copy.deepcopy(cache)
        first = step(cache, 301, 1)
        step(twin, 305, 1)
        second = step(cache, 302, 2)
        cache.crop(-2)
        assert_close("after crop", step(cache, 301, 1), first, 1e-5)
        assert_close("and on", step(cache, 302, 2), second, 1e-5)
        twin.crop(-1)
        assert_close("the copy", step(twin, 301, 1), first, 1e-5)


def test_with_another_system_the_streams_stay_apart(tiny) -> None:
    """VAR acts in both streams; what it does to each is what it does to that prompt alone."""
    host = tiny("llava")
    var = sl.steer.VAR(p=0.3, sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False)
    asked, other = QUESTIONS, [f"{q} {LONGER.lead}" for q in QUESTIONS]
    with sl.attach(host.model, var):
        first, second = (generate(host.model, host.inputs(q, PICTURES), tokens=1)[1] for q in (asked, other))
    with sl.attach(host.model, var, LONGER):
        found = generate(host.model, host.inputs(asked, PICTURES), tokens=4)[1]
    assert_close("first token", found[:, :1], 3 * first - 2 * second, 2e-5)


def test_two_contrasts_follow_each_other(tiny) -> None:
    host = tiny("llava")
    with sl.attach(host.model, SHORTER):
        first = generate(host.model, inputs(host), tokens=1)[1]
    with sl.attach(host.model, LONGER):
        plain = generate(host.model, inputs(host), tokens=1)[1]
    own = generate(host.model, inputs(host), tokens=1)[1]
    with sl.attach(host.model, SHORTER, LONGER):
        both = generate(host.model, inputs(host), tokens=4)[1]
    # L1 = damro(L); L2 = 3 L1 - 2 lead, where lead = (3 L - plain) / 2
    assert_close("both", both[:, :1], 3 * first - (3 * own - plain), 5e-5)


def test_the_callers_random_draws_stay(tiny) -> None:
    host = tiny("llava")
    draws = []
    for system in (LQCD(alpha=0.0, beta=1e-9), None):
        torch.manual_seed(3)
        with sl.attach(host.model, *([system] if system else [])):
            generate(host.model, inputs(host), do_sample=True, num_return_sequences=2)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_unknown_words_are_refused_with_the_mend(tiny) -> None:
    host = tiny("llava")
    made = inputs(host)
    unknown = {**made, "input_ids": made["input_ids"].clone()}
    unknown["input_ids"][:, -1] += 1
    with sl.attach(host.model, LONGER), pytest.raises(InputError, match="token ids do not tell"):
        host.model.generate(**unknown, max_new_tokens=2)
    assert prompts.noted(unknown["input_ids"]) is None
    with sl.attach(host.model, SHORTER):  # needs no words
        host.model.generate(**unknown, max_new_tokens=2)


def test_the_same_question_about_two_pictures(tiny) -> None:
    """Equal ids, other pixels: each prompt has its own note, also in another precision and for beams."""
    host = tiny("llava")
    made = [host.inputs(QUESTIONS[:1], [[p]]) for p in (picture(), picture(80, 64, 1), picture(64, 48, 5))]
    for inputs in made:
        pixels = inputs["pixel_values"].bfloat16()
        found = prompts.noted(inputs["input_ids"].clone().repeat(3, 1), pixels)[0]
        assert torch.equal(found.inputs["pixel_values"].bfloat16(), pixels)
    alone = [made[1]["input_ids"].clone(), made[1]["pixel_values"].clone()]
    with sl.attach(host.model, AGLA(alpha=2.0, beta=0.0, ratio=0.3)):
        found = [generate(host.model, x)[1] for x in made]
        again = generate(host.model, {**made[1], "input_ids": alone[0], "pixel_values": alone[1]})[1]
    assert torch.equal(found[1], again)
    assert not torch.equal(found[0], found[1])


def test_notes_live_as_long_as_their_inputs(tiny) -> None:
    made = inputs(tiny("llava"))
    ids = made["input_ids"].clone()
    assert prompts.noted(ids)[1] == 1
    assert prompts.noted(ids.repeat_interleave(3, 0))[1] == 3
    before = len(prompts._notes)
    del made
    assert len(prompts._notes) < before


def test_a_conversation_goes_on(tiny) -> None:
    """A second turn of text is read by both streams; further pictures are refused."""
    host = tiny("llava")
    one = host.inputs(QUESTIONS[:1], PICTURES[:1])
    more = host.processor.tokenizer(" And a cat?", return_tensors="pt")["input_ids"]
    with torch.no_grad(), sl.attach(host.model, SHORTER):
        cache = made_cache(host.model(**one))
        turn = host.model(input_ids=more, cache=cache).logits[:, -1]
        whole = {**one, "input_ids": torch.cat([one["input_ids"], more], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        assert_close("the turn", turn, host.model(**whole).logits[:, -1], 2e-5)
        with pytest.raises(InputError, match="further pictures"):
            host.model(input_ids=one["input_ids"], pixel_values=one["pixel_values"], cache=cache)


@pytest.mark.filterwarnings("error::sightline.errors.SightlineWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_conversation_goes_on_in_generate(case, tiny, apart) -> None:
    """`generate` asks the cache how much it has read: it must count the first stream, whichever is longer."""
    host = tiny("llava")
    more = torch.arange(300, 306)[None]

    def answers() -> torch.Tensor:
        with sl.attach(host.model, CASES[case]):
            out = host.model.generate(
                **host.inputs(QUESTIONS[:1], PICTURES[:1]), max_new_tokens=4, return_dict_in_generate=True
            )
            ids = torch.cat([out.sequences, more], 1)
            return host.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), cache=made_cache(out), max_new_tokens=4
            )

    together = answers()
    apart()
    assert torch.equal(answers(), together)


def test_guidance_goes_with_a_second_stream(tiny) -> None:
    """The branch that `guidance_scale` adds begins with one token: it asks nothing, so it has no second stream."""
    host = tiny("llava")
    with sl.attach(host.model, LONGER) as attached:
        found, _ = generate(host.model, inputs(host), guidance_scale=1.5)
        alone, _ = generate(host.model, inputs(host), guidance_scale=1.0)
    assert found.shape == alone.shape
    assert attached.report()["lqcd"]["questions"] == 4


@pytest.mark.parametrize("spec", ["damro:topk=4", "lqcd", "vdgd:description_tokens=5"])
def test_look_answers_with_it(spec) -> None:
    """Through the command line's own path, on the bundled model."""
    from sightline.catalog import parse

    seen = sl.look(systems=parse(spec), max_new_tokens=3)
    assert [run.label for run in seen.runs] == ["none", spec]
    assert seen.runs[1].rows.shape[0] == len(seen.runs[1].pieces)
    assert seen.runs[1].notes[spec.partition(":")[0]]

"""Every system on every host: what must hold whatever the system does.

The plain checks run everywhere; the longer ones on three hosts that differ most (LLaVA: no grouped heads; Qwen2.5-VL:
rotary positions of three axes; Gemma3: sliding windows and a mask even without padding), and on the others with `-m slow`.
Tolerance: fp32 and four layers, so 2e-5 relative RMS between two ways of computing the same sums.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import cache
from typing import Any

import pytest
import torch

import sightline as sl
from sightline import catalog
from sightline.engine.system import System
from sightline.errors import AttachError, HostError, ParameterError, SightlineError
from tests.engine.numerics import Questions, assert_close, relative_rms
from tests.engine.whole import forward, generate
from tests.systems import CASES
from tests.tiny_hosts import TINY, picture
from tests.traces import differences, trace

CLOSE = 2e-5
CORE = ("llava", "qwen2_5_vl", "gemma3")
QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]

systems = pytest.mark.parametrize("slug", CASES)
everywhere = pytest.mark.parametrize("name", TINY)
mostly = pytest.mark.parametrize("name", [n if n in CORE else pytest.param(n, marks=pytest.mark.slow) for n in TINY])


@pytest.fixture
def host(name, slug, tiny):
    if name in CASES[slug].refused_by:
        pytest.skip(f"{name} cannot run {slug}")
    return tiny(name)


def batch(host):
    return host.inputs(QUESTIONS, [[p] for p in PICTURES])


def alone(host, row: int):
    return host.inputs([QUESTIONS[row]], [[PICTURES[row]]])


_plain: dict[Any, tuple] = {}  # model -> what it gives without systems


def plain(host) -> tuple:
    """Logits, ids and step logits of the host itself on the batch; computed once per process."""
    if host.model not in _plain:
        _plain[host.model] = (forward(host.model, batch(host)), *generate(host.model, batch(host)))
    return _plain[host.model]


# -- the table itself -----------------------------------------------------------------------------------------------------


def test_every_system_has_a_case():
    attached = {slug for slug, entry in catalog.load_all().items() if issubclass(entry.cls, System)}
    assert attached == set(CASES), "add one line to tests/systems.py"


@systems
def test_cases_are_what_they_say(slug):
    case = CASES[slug]
    assert case.idle.idle()
    assert not case.active.idle()
    assert case.active.slug == case.idle.slug == slug
    assert case.active.stations(), "it has no station"
    assert set(case.refused_by) < set(TINY)


@systems
def test_the_active_case_acts(slug, tiny):
    """Else nothing below could fail. At least one host answers other tokens, not only other numbers."""
    moved, spoken = [], []
    for name in set(TINY) - set(CASES[slug].refused_by):
        host = tiny(name)
        logits, ids, steps = plain(host)
        with sl.attach(host.model, CASES[slug].active):
            found = generate(host.model, batch(host))
            change = found[1] - steps if CASES[slug].late else forward(host.model, batch(host)) - logits
            if change.abs().max() > 1e-3:
                moved.append(name)
            if not torch.equal(found[0], ids):
                spoken.append(name)
    assert len(moved) >= (len(TINY) - len(CASES[slug].refused_by)) / 2, f"it acts on {moved} only"
    assert spoken


@systems
@pytest.mark.parametrize("which", ["active", "idle"])
def test_configurations_survive_json_and_the_command_line(slug, which):
    system = getattr(CASES[slug], which)
    assert catalog.from_dict(json.loads(json.dumps(catalog.to_dict(system)))) == system
    assert catalog.parse(catalog.to_spec([system])) == [system]
    assert catalog.parse(f"{catalog.to_spec([system])}+none") == [system]


@systems
def test_parameters_of_the_wrong_type(slug):
    """Whatever a parameter asks for, this is none: said at once, not after the model has worked."""
    system = CASES[slug].active
    for field in dataclasses.fields(system):
        with pytest.raises(ParameterError, match=field.name):
            dataclasses.replace(system, **{field.name: object()})


# -- on and off -------------------------------------------------------------------------------------------------------------


@systems
@everywhere
def test_no_strength_no_difference(slug, host):
    """Bit for bit, because the engine leaves the host alone."""
    logits, ids, steps = plain(host)
    before = trace(host.model)
    with sl.attach(host.model, CASES[slug].idle):
        assert not any("hooks" in d or "attention" in d for d in differences(before, trace(host.model)))
        assert torch.equal(forward(host.model, batch(host)), logits)
        found = generate(host.model, batch(host))
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], steps)


@systems
@everywhere
def test_on_and_off(slug, host):
    """Attached once only, the same every time, and gone without a trace."""
    case = CASES[slug]
    before = trace(host.model)
    with sl.attach(host.model, case.active) as attached:
        first = generate(host.model, batch(host))
        with pytest.raises(AttachError, match=f"already carries.*{slug}"):
            sl.attach(host.model, case.active)
        second = generate(host.model, batch(host))
    assert differences(before, trace(host.model)) == []
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(generate(host.model, batch(host))[1], plain(host)[2])
    report = attached.report()[slug]
    assert json.loads(json.dumps(report)) == report, "a report is plain numbers"
    with pytest.raises(AttachError, match="cannot run together"):
        sl.attach(host.model, case.active, case.active)


@pytest.fixture
def apart(host, slug):
    """The host, for tests in which rows of a batch must not depend on each other."""
    if CASES[slug].coupled:
        pytest.skip(f"{slug} decides for all pictures of a batch together, as published")
    return host


# -- rows, beams, pictures ----------------------------------------------------------------------------------------------------


@systems
@mostly
def test_a_batch_is_its_rows(slug, apart):
    """Padding and neighbours change no row: a batch of two equals two batches of one."""
    with sl.attach(apart.model, CASES[slug].active):
        ids, logits = generate(apart.model, batch(apart))
        for row in range(2):
            one, steps = generate(apart.model, alone(apart, row))
            assert torch.equal(ids[row, -5:], one[0, -5:])
            assert_close(f"row {row}", logits[row], steps[0], CLOSE)


@systems
@mostly
def test_right_padding(slug, apart):
    """One forward over right-padded rows, as in scoring and training."""
    inputs = apart.inputs(QUESTIONS, [[p] for p in PICTURES], padding_side="right")
    with sl.attach(apart.model, CASES[slug].active):
        logits = forward(apart.model, inputs)
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            assert_close(f"row {row}", logits[row][real], forward(apart.model, alone(apart, row))[0], CLOSE)


@systems
@mostly
def test_beams(slug, apart):
    options = {"num_beams": 3, "num_return_sequences": 2}
    if CASES[slug].ties:
        pytest.skip("its beams tie: it has a beam test of its own")
    with sl.attach(apart.model, CASES[slug].active):
        ids, _ = generate(apart.model, batch(apart), **options)
        for row in range(2):
            one, _ = generate(apart.model, alone(apart, row), **options)
            assert torch.equal(ids[2 * row : 2 * row + 2, -5:], one[:, -5:])


@systems
@mostly
def test_several_answers_to_one_question(slug, host):
    """Each sampled answer is computed as if it were the only one: its scores follow from its own tokens."""
    with sl.attach(host.model, CASES[slug].active):
        torch.manual_seed(0)
        ids, logits = generate(host.model, alone(host, 0), do_sample=True, num_return_sequences=3, temperature=2.0)
        assert len({tuple(row) for row in ids.tolist()}) > 1
        greedy, first = generate(host.model, alone(host, 0))
        for row in range(3):
            assert_close("first token", logits[row, 0], first[0, 0], CLOSE)
        assert ids.shape == (3, greedy.shape[1])


@systems
@mostly
def test_several_pictures(slug, apart):
    inputs = apart.inputs(["Both?", "One?"], [PICTURES, PICTURES[:1]])
    with sl.attach(apart.model, CASES[slug].active):
        ids, logits = generate(apart.model, inputs)
        two, steps = generate(apart.model, apart.inputs(["Both?"], [PICTURES]))
    assert torch.equal(ids[0, -5:], two[0, -5:])
    assert_close("two pictures", logits[0], steps[0], CLOSE)


@systems
@mostly
def test_no_picture(slug, host):
    inputs = host.inputs(QUESTIONS)
    _, logits = generate(host.model, inputs)
    with sl.attach(host.model, CASES[slug].active):
        _, found = generate(host.model, inputs)
        mixed = generate(host.model, host.inputs(QUESTIONS, [[], PICTURES[1:]]))
        with_picture = generate(host.model, alone(host, 1))  # one picture either way: coupling does not show
    assert torch.isfinite(found).all()
    assert CASES[slug].text_too or torch.equal(found, logits)
    assert_close("the row with a picture", mixed[1][1], with_picture[1][0], CLOSE)
    if not CASES[slug].text_too:
        _, text = generate(host.model, host.inputs(QUESTIONS[:1]))
        assert_close("the row without", mixed[1][0], text[0], CLOSE)


@systems
@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding(slug, how, host):
    """The same answer as token by token, or a refusal before any work: drafts would stand in the prompt."""
    inputs = host.inputs(["the red cup the red cup the red cup the red cup"], [PICTURES[:1]])
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": copy.deepcopy(host.model)}
    with sl.attach(host.model, CASES[slug].active):
        wanted = host.model.generate(**inputs, max_new_tokens=8)
        if CASES[slug].active.drafts:
            assert torch.equal(host.model.generate(**inputs, max_new_tokens=8, **options), wanted)
        else:
            with pytest.raises(ParameterError, match=f"{slug} acts on one new token at a time"):
                host.model.generate(**inputs, max_new_tokens=8, **options)
        with pytest.raises(ParameterError, match=f"{slug} must see a prompt with all its pictures in one piece"):
            host.model.generate(**inputs, max_new_tokens=8, prefill_chunk_size=8)


@systems
@mostly
def test_static_cache(slug, apart):
    """Masks that `generate` makes beforehand tell padding too; who cannot use such a cache says so."""
    with sl.attach(apart.model, CASES[slug].active):
        ids, logits = generate(apart.model, batch(apart))
        try:
            found, steps = generate(apart.model, batch(apart), cache_implementation="static")
        except HostError as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert "static" in refusal.lower()
    else:
        assert torch.equal(found, ids)
        assert_close("logits", steps, logits, CLOSE)


# -- precision and company ------------------------------------------------------------------------------------------------


@cache
def half(name: str):
    return copy.deepcopy(TINY[name]().model).to(torch.bfloat16)


@systems
@mostly
def test_half_precision(slug, host, name):
    """No NaN, and an error like that of the plain host in bfloat16. Decisions by threshold may fall otherwise here."""
    model, inputs = half(name), batch(host)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    real = inputs["attention_mask"].bool()
    own = relative_rms(forward(model, inputs)[real].float(), plain(host)[0][real])
    with sl.attach(host.model, CASES[slug].active):
        wanted = forward(host.model, batch(host))[real]
    with sl.attach(model, CASES[slug].active):
        found = forward(model, inputs)
        answers = generate(model, inputs)[1]
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert answers.isfinite().all()
    assert CASES[slug].chooses or relative_rms(found[real].float(), wanted) < max(0.1, 3 * own)


@systems
@mostly
def test_watched_by_a_recorder(slug, host):
    """Seeing what a system does changes nothing of it, and no row of attention gains or loses mass unasked."""
    with sl.attach(host.model, CASES[slug].active):
        wanted = generate(host.model, batch(host))
    watch = sl.record(image_rows=True, sinks=False)
    with sl.attach(host.model, CASES[slug].active, watch):
        found = generate(host.model, batch(host))
    assert torch.equal(found[0], wanted[0])
    assert_close("logits", found[1], wanted[1], CLOSE)
    assert watch.seen.masses.shape[:4] == (5, 4, 2, 4)


@systems
@mostly
def test_decoding_asks_the_device_nothing(slug, host):
    """No host-device sync in the decode loop beyond the host's own."""

    def decode() -> list[str]:
        with torch.no_grad():
            cache = host.model(**batch(host)).past_key_values
            n, token = batch(host)["input_ids"].shape[1], torch.full((2, 1), 300)
            for step in range(2):  # the first token may settle things once
                mask = torch.nn.functional.pad(batch(host)["attention_mask"], (0, step + 1), value=1)
                places = torch.full((2, 1), n + step)
                with Questions() as questions:
                    host.model(input_ids=token, attention_mask=mask, position_ids=places, past_key_values=cache)
        return questions.asked

    own = decode()
    streams = 2 if "second" in CASES[slug].active.stations() else 1  # a second stream may be a forward of its own
    with sl.attach(host.model, CASES[slug].active):
        assert decode() in (own, streams * own)


# -- hosts that cannot ------------------------------------------------------------------------------------------------------


@systems
@pytest.mark.parametrize("name", ["clip", "timm"])
def test_plain_vision_transformers_say_what_they_lack(slug, name, tiny_vit):
    if set(CASES[slug].active.stations()) <= {"pixels", "vision_attention"}:
        pytest.skip("it needs no language model")
    with pytest.raises(HostError, match="no language model"):
        sl.attach(tiny_vit(name).model, CASES[slug].active)


@pytest.mark.parametrize(("slug", "name"), [(s, n) for s, case in CASES.items() for n in case.refused_by])
def test_hosts_that_cannot_run_it_say_why(slug, name, tiny):
    with pytest.raises(SightlineError) as error:
        sl.attach(tiny(name).model, CASES[slug].active)
    assert len(str(error.value)) > 20

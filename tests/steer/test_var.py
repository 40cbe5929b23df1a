"""VAR: golden arrays of the official code, the sheet's invariants, and the fast path against whole maps on every host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from benchmarks.reference import naive_var
from sightline.catalog import build
from sightline.engine import sinks as engine_sinks
from sightline.engine.sequences import made_cache
from sightline.errors import ParameterError
from sightline.steer.var import VAR, edited_rows, factors, group_members, redistribute, sink_mask
from tests.steer.goldens import cases, load
from tests.tiny_hosts import TINY, picture

ACTIVE = VAR(p=0.3, sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False)


@cases("var")
def test_golden(path: Path) -> None:
    case = load(path)
    attention, begin, count = case["attn_in"], case["image_begin"], case["image_len"]
    batch, _, queries, keys = attention.shape
    dims = tuple(int(d) for d in case.get("sink_dims", torch.tensor([])))
    prompt = case.get("prefill_hidden", case.get("hidden"))
    sinks = torch.zeros(batch, keys, dtype=torch.bool)
    sinks[:, : prompt.shape[1]] = sink_mask(prompt, dims, case["tau"])
    if "sink_mask" in case:
        assert torch.equal(sinks[:, : prompt.shape[1]], case["sink_mask"])
    elif "sink_idx" in case:
        assert sinks[0].nonzero().flatten().tolist() == sorted(case["sink_idx"].tolist())
    visual = torch.zeros(batch, keys, dtype=torch.bool)
    visual[:, begin : begin + count] = True
    rows = torch.arange(queries).expand(batch, -1) >= begin + count if case["phase_prefill"] else None
    out = redistribute(attention, sinks, visual, p=case["p"], rho=case["rho"], summ=case["summ"], rows=rows)
    assert (out - case["attn_out"]).abs().max() <= 1e-6
    if "context_out" in case:
        assert (out @ case["values"] - case["context_out"]).abs().max() <= 1e-5
    if "selected_bhq" in case:
        masses = attention @ group_members(sinks, visual)[:, None]
        chosen = edited_rows(masses[..., 0] + masses[..., 1], masses[..., 1], count, rho=case["rho"], summ=case["summ"])
        chosen = chosen & (sinks & visual).any(-1)[:, None, None]  # without a visual sink none is tested
        assert chosen.nonzero().tolist() == case["selected_bhq"].tolist()
    if any(word in path.stem for word in ("identity", "only_text", "no_sinks")):
        assert torch.equal(out, attention)


def maps(
    seed: int, batch: int = 2, keys: int = 23, sharp: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random causal maps (B, 3, K, K) with sinks and an image span."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, 3, keys, keys, generator=generator) * sharp
    attention = scores.masked_fill(torch.ones(keys, keys).triu(1).bool(), -torch.inf).softmax(-1)
    visual = torch.zeros(batch, keys, dtype=torch.bool)
    visual[:, 4:15] = True
    sinks = torch.rand(batch, keys, generator=generator) < 0.2
    return attention, sinks, visual


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.floats(0, 1), rho=st.floats(0, 1), summ=st.floats(0, 1))
def test_laws(seed: int, p: float, rho: float, summ: float) -> None:
    attention, sinks, visual = maps(seed)
    out = redistribute(attention, sinks, visual, p=p, rho=rho, summ=summ)
    assert torch.allclose(out.sum(-1), attention.sum(-1), atol=1e-5)  # mass is kept
    assert (out >= 0).all()
    assert (out[attention == 0] == 0).all()  # masked entries stay zero
    outside = ~(sinks | visual)[:, None, None].expand_as(out)
    assert torch.equal(out[outside], attention[outside])
    changed = (out != attention).any(-1, keepdim=True)
    sink = (sinks[:, None, None] & changed).expand_as(out)
    assert torch.allclose(out[sink], p * attention[sink], rtol=1e-5, atol=1e-7)
    others = (visual & ~sinks)[:, None, None] & changed & (attention > 1e-6)
    ratio = torch.where(others, out / attention.clamp(min=1e-9), torch.nan)  # one factor for all non-sinks of a row
    spread = ratio.nan_to_num(-torch.inf).amax(-1) - ratio.nan_to_num(torch.inf).amin(-1)
    assert (spread[others.any(-1)] < 1e-3 * ratio.nan_to_num(0).amax(-1)[others.any(-1)] + 1e-4).all()


@pytest.mark.parametrize("what", ["p is one", "no visual sink", "no row selected"])
def test_identity(what: str) -> None:
    attention, sinks, visual = maps(3)
    settings = {"p": 1.0} if what == "p is one" else {"summ": 1.1} if what == "no row selected" else {}
    sinks = sinks & ~visual if what == "no visual sink" else sinks
    assert torch.equal(redistribute(attention, sinks, visual, **settings), attention)


def test_rows_are_independent() -> None:
    attention, sinks, visual = maps(5)
    whole = redistribute(attention, sinks, visual, summ=0.1)
    parts = [redistribute(attention[:, :, a : a + 5], sinks, visual, summ=0.1) for a in range(0, 23, 5)]
    assert torch.equal(torch.cat(parts, 2), whole)
    assert not torch.equal(whole, attention)


def test_batch_is_per_sample() -> None:
    attention, sinks, visual = maps(7)
    both = redistribute(attention, sinks, visual, summ=0.1)
    for b in range(2):
        alone = redistribute(attention[b : b + 1], sinks[b : b + 1], visual[b : b + 1], summ=0.1)
        assert torch.equal(both[b : b + 1], alone)


def test_epsilon_counts_visual_tokens() -> None:
    """The official test adds 1e-6 per visual token, not once."""
    masses = torch.tensor([[0.2, 0.2 + 1e-5, 0.0]])
    assert factors(masses, 1, p=0.5, rho=0.5, summ=0.1)[0, 1] == 1
    assert factors(masses, 576, p=0.5, rho=0.5, summ=0.1)[0, 1] == 0.5


def test_all_image_mass_on_sinks_is_guarded() -> None:
    out = factors(torch.tensor([[0.0, 0.9, 0.1]]), 4, p=0.5, rho=1.0, summ=0.2)
    assert torch.equal(out, torch.ones(1, 3))


def batches(host: object) -> dict[str, tuple[list[str], list[list]]]:
    a, b = picture(seed=1), picture(width=40, height=60, seed=2)
    return {
        "one": (["What is this?"], [[a]]),
        "padded": (["What is this?", "A rather longer question about what is seen here?"], [[a], [b]]),
        "two images": (["Which of them is red?"], [[a, b]]),
        "no image": (["What is this?"], [[]]),
    }


@pytest.mark.parametrize("case", ["one", "padded", "two images", "no image"])
@pytest.mark.parametrize("name", TINY)
def test_matches_whole_maps(name: str, case: str) -> None:
    """Prefill logits and every decoding step equal the reference that materialises all maps."""
    tiny = TINY[name]()
    inputs = tiny.inputs(*batches(tiny)[case])
    options = dict(max_new_tokens=4, output_logits=True, return_dict_in_generate=True, **tiny.generate_kwargs)
    with torch.no_grad():
        plain = tiny.model.generate(**inputs, **options)
        with naive_var(tiny.model, ACTIVE):
            slow = tiny.model.generate(**inputs, **options)
        with sl.attach(tiny.model, ACTIVE) as attached:
            fast = tiny.model.generate(**inputs, **options)
        after = tiny.model.generate(**inputs, **options)
    for a, b in zip(fast.logits, slow.logits, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{(a - b).abs().max()} against {b.abs().max()}"
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, after.logits, strict=True))
    if case == "no image":
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, fast.logits, strict=True))
    else:
        assert attached.report()["var"]["rows_edited"] > 0
        assert not torch.equal(plain.logits[0], fast.logits[0])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_beams_match_whole_maps(name: str) -> None:
    tiny = TINY[name]()
    inputs = tiny.inputs(*batches(tiny)["padded"])
    options = dict(max_new_tokens=4, num_beams=3, num_return_sequences=2, **tiny.generate_kwargs)
    with torch.no_grad():
        with naive_var(tiny.model, ACTIVE):
            slow = tiny.model.generate(**inputs, **options)
        with sl.attach(tiny.model, ACTIVE):
            fast = tiny.model.generate(**inputs, **options)
    assert torch.equal(fast, slow)


def test_second_turn_with_a_second_image() -> None:
    """Sinks of a later prompt chunk are found too: one cache over two turns equals one long prompt."""
    tiny = TINY["llava"]()
    first = tiny.inputs(["What is this?"], [[picture(seed=1)]])
    second = tiny.inputs(["And this one?"], [[picture(seed=2)]])
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    with torch.no_grad(), sl.attach(tiny.model, ACTIVE):
        cache = tiny.model(input_ids=first["input_ids"], pixel_values=first["pixel_values"]).past_key_values
        turns = tiny.model(
            input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache
        ).logits[:, -1]
        long = tiny.model(**whole).logits[:, -1]
    assert (turns - long).abs().max() <= 1e-5 * long.abs().max()


def test_a_cache_cropped_into_the_prompt() -> None:
    """The end of the prompt taken back and read again, as assisted decoding does."""
    tiny = TINY["llava"]()
    inputs = tiny.inputs(["Is there a dog?"], [[picture()]])
    with sl.attach(tiny.model, ACTIVE), torch.no_grad():
        out = tiny.model(**inputs, use_cache=True)
        cache = made_cache(out)
        cache.crop(-3)
        again = tiny.model(
            input_ids=inputs["input_ids"][:, -3:], attention_mask=inputs["attention_mask"], past_key_values=cache
        )
    torch.testing.assert_close(again.logits, out.logits[:, -3:], atol=1e-4, rtol=1e-4)


def test_tau_above_its_bound_is_refused() -> None:
    tiny = TINY["llava"]()  # width 32: phi <= 5.66
    with pytest.raises(ParameterError, match=r"tau=20 can never be exceeded.*sqrt\(hidden size 32\) = 5\.7.*1\.8"):
        sl.attach(tiny.model, VAR(tau=20.0, sink_dims=(1,)))
    assert not tiny.model.__dict__.get("_sightline_attachment")


def test_no_sink_dimension_warns_and_changes_nothing() -> None:
    tiny = TINY["llava"]()
    inputs = tiny.inputs(["What is this?"], [[picture()]])
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        with pytest.warns(UserWarning, match="shows no sinks"), sl.attach(tiny.model, VAR(tau=5.5)):
            assert torch.equal(tiny.model(**inputs).logits, plain)


@pytest.mark.parametrize("bad", [{"p": 1.2}, {"p": -0.1}, {"summ": 2.0}, {"min_nonsink_ratio": "x"}, {"tau": -1.0}])
def test_parameters_out_of_range(bad: dict) -> None:
    with pytest.raises(ParameterError, match=next(iter(bad))):
        VAR(**bad)


def test_settings_from_text() -> None:
    var = build("var", {"p": "0.4", "sink_dims": "3/7", "tau": "none", "skip_last_layer": "false"})
    assert var == VAR(p=0.4, sink_dims=(3, 7), skip_last_layer=False)


def test_sink_dims_are_found_where_they_are_planted() -> None:
    """Hidden states of a start token with two huge dimensions in the middle layers give exactly these two."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, 512, generator=generator)
    states[2:7, 100] = 300.0
    states[2:7, 7] = -250.0
    states[3, 50] = 400.0  # once is not enough
    assert engine_sinks.outlier_dims(states, 10.0) == (100, 7)


def test_known_models_are_looked_up() -> None:
    from sightline.engine.system import Shape

    shape = Shape("llama", 32, 32, 32, 4096, first_states=lambda: pytest.fail("the table knows this model"))
    assert engine_sinks.sink_dims_of(shape) == (2533, 1415)
    mistral = Shape("mistral", 32, 32, 8, 4096, first_states=lambda: torch.zeros(32, 4096))
    assert engine_sinks.sink_dims_of(mistral) == ()  # same sizes, another model


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.1, 1e3), seed=st.integers(0, 1000))
def test_phi_ignores_scale_and_is_bounded(scale: float, seed: int) -> None:
    hidden = torch.randn(5, 96, generator=torch.Generator().manual_seed(seed)) + 0.1
    phi = engine_sinks.sink_value(hidden, (3, 40))
    assert torch.allclose(engine_sinks.sink_value(hidden * scale, (3, 40)), phi, rtol=1e-3)
    assert (phi <= 96**0.5).all()


def test_default_tau_keeps_the_energy_share() -> None:
    assert engine_sinks.default_tau(4096) == engine_sinks.default_tau(2048) == 20
    assert engine_sinks.default_tau(256) == pytest.approx(5.0)

"""Positions, masks, feed-forward and layer outputs, extra runs, head, boosts and gains: each against another way to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

import sightline as sl
from sightline.engine.attention import Call, Edit, attend
from sightline.engine.streams import answering, last_prompt
from sightline.engine.tokens import Tokens
from sightline.engine.views import grids
from sightline.hosts import get, layouts
from tests.engine.numerics import assert_close
from tests.engine.toys import toy
from tests.engine.whole import forward, generate
from tests.tiny_hosts import TINY, picture

CLOSE = 2e-5
everywhere = pytest.mark.parametrize("name", TINY)
QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


def batch(host, **options):
    return host.inputs(QUESTIONS, [[p] for p in PICTURES], **options)


def words(host) -> dict[str, torch.Tensor]:
    """The batch with its placeholders cut out of the ids, left-padded."""
    inputs = batch(host)
    token, padding = host.model.config.image_token_id, host.processor.tokenizer.pad_token_id
    rows = [
        ids[(ids != token) & m.bool()] for ids, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    width = max(map(len, rows))
    return {
        "input_ids": torch.stack([pad(row, (width - len(row), 0), value=padding) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]),
    }


@everywhere
def test_positions_are_those_that_the_decoder_reads(name, tiny):
    host = tiny(name)
    inputs = batch(host)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) * 2
    with torch.no_grad():
        wanted = host.model(**inputs, position_ids=places, use_cache=False).logits
    system = toy(positions=lambda site, given: places.expand_as(given))
    with sl.attach(host.model, system):
        found = forward(host.model, inputs)
    real = inputs["attention_mask"].bool()
    assert_close("logits", found[real], wanted[real], CLOSE)
    assert not torch.allclose(found[real], forward(host.model, inputs)[real])


def test_uneven_positions_are_no_packed_sequences(tiny):
    """Without mask and cache transformers reads jumps in the positions as borders between packed sequences."""
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?"], [[picture()]])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    jumps = torch.arange(ids.shape[1])[None] // 5 * 5
    with sl.attach(host.model, toy(positions=lambda site, given: jumps.expand_as(given))), torch.no_grad():
        bare = host.model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        cached = host.model(input_ids=ids, pixel_values=pixels, use_cache=True).logits
    assert_close("logits", bare, cached, CLOSE)


@everywhere
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_mask_that_hides_is_a_bias_of_minus_infinity(name, kernel):
    host = TINY[name]()
    host.model.set_attn_implementation(kernel)
    inputs = batch(host)
    visual = inputs["input_ids"] == host.model.config.image_token_id
    hidden = visual[:, None, None, :]

    def mask(site, allowed):
        return allowed & ~hidden[..., : allowed.shape[-1]]

    def attention(site):
        return Edit(bias=torch.where(hidden, -torch.inf, 0.0)) if site.prefill else None

    with sl.attach(host.model, toy(mask=mask)):
        found = forward(host.model, inputs)
    with sl.attach(host.model, toy(attention=attention)):
        wanted = forward(host.model, inputs)
    rows = inputs["attention_mask"].bool() & ~visual  # what a row without any key gives is the kernel's own affair
    assert_close("logits", found[rows], wanted[rows], CLOSE)


def test_a_mask_in_a_static_cache(tiny):
    host = tiny("llava")
    hide = toy(mask=lambda site, allowed: allowed & ~site.tokens.visual[:, None, None])
    with sl.attach(host.model, hide):
        wanted, steps = generate(host.model, batch(host))
        found, again = generate(host.model, batch(host), cache_implementation="static", disable_compile=True)
    assert torch.equal(found, wanted)
    assert_close("logits", again, steps, CLOSE)


@everywhere
def test_feed_forward_and_layer_outputs(name):
    """A layer's output is the next one's input, and doubling the feed-forward part is doubling its last matrix."""
    host = TINY[name]()
    seen: dict[Any, torch.Tensor] = {}
    watch = toy(
        hidden=lambda site, x: seen.__setitem__(("in", site.layer), x.clone()),
        output=lambda site, x: seen.__setitem__(("out", site.layer), x.clone()),
    )
    deep = {"qwen3_vl": 2}.get(name, 0)  # there features of the tower are added between the first layers
    with sl.attach(host.model, watch):
        forward(host.model, batch(host))
    assert all(torch.equal(seen["out", i], seen["in", i + 1]) for i in range(deep, 3))
    layer = get(get(host.model, sl.hosts.find(host.model).decoder), "layers")[1]
    with sl.attach(host.model, toy(mlp=lambda site, x: 2 * x if site.layer == 1 else None)):
        found = forward(host.model, batch(host))
    with torch.no_grad():
        layer.mlp.down_proj.weight *= 2
    wanted = forward(host.model, batch(host))
    assert_close("logits", found, wanted, CLOSE)


def runner(seen: dict[Any, torch.Tensor], *streams: str):
    """A system that asks for extra runs and keeps the last states of every layer in each."""

    def output(site, hidden):
        assert site.tokens.shape[1] == hidden.shape[1] or not site.prefill
        seen[site.stream, site.layer, site.step] = hidden[torch.arange(len(hidden)), last_prompt(site.tokens)].clone() \
            if site.prefill else hidden[:, -1].clone()  # fmt: skip

    system = toy(output=output)
    type(system).streams = lambda self: streams
    return system


@everywhere
def test_extra_runs(name, tiny):
    """The plain run is the prompt's, the text run that of the prompt without its placeholders; neither leaves a trace."""
    host = tiny(name)
    inputs, seen = batch(host), {}
    plain = generate(host.model, inputs)
    double = toy(mlp=lambda site, x: 1.5 * x)
    with sl.attach(host.model, runner(seen, "text", "plain")):
        found = generate(host.model, inputs)
        with torch.no_grad():
            states = host.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(found[1], plain[1])
    assert len(states) == 5
    with torch.no_grad():
        text = host.model(**words(host), output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(3):  # the last state of the tuple is behind the final norm
        assert_close(f"plain {layer}", seen["plain", layer, 0], seen["", layer, 0], CLOSE)
        assert_close(f"plain {layer}", seen["plain", layer, 0], states[layer + 1][:, -1], CLOSE)
        assert_close(f"text {layer}", seen["text", layer, 0], text[layer + 1][:, -1], CLOSE)
    alone, together = {}, {}
    with sl.attach(host.model, runner(alone, "text", "plain")):
        forward(host.model, inputs)
    with sl.attach(host.model, double, runner(together, "text", "plain")):
        forward(host.model, inputs)
    for stream in ("text", "plain"):  # other systems do not act there
        assert torch.equal(alone[stream, 3, 0], together[stream, 3, 0])
    assert not torch.allclose(alone["", 3, 0], together["", 3, 0])


def test_extra_runs_of_rows_with_and_without_padding_and_pictures(tiny):
    host = tiny("llava")
    seen: dict[Any, torch.Tensor] = {}
    with sl.attach(host.model, runner(seen, "text")):
        forward(host.model, host.inputs(QUESTIONS))
        assert not any(stream for stream, *_ in seen), "no picture, nothing to leave out"
        forward(host.model, batch(host, padding_side="right"))
    with torch.no_grad():
        text = host.model(**words(host), output_hidden_states=True, use_cache=False).hidden_states
    assert_close("text", seen["text", 1, 0], text[2][:, -1], CLOSE)


def test_parts_of_the_model_act_in_extra_runs(tiny):
    host = tiny("llava")
    seen: dict[Any, torch.Tensor] = {}
    everywhere = toy(mlp=lambda site, x: 1.5 * x)
    type(everywhere).everywhere = True
    with sl.attach(host.model, everywhere, runner(seen, "plain")):
        forward(host.model, batch(host))
    assert_close("plain", seen["plain", 2, 0], seen["", 2, 0], CLOSE)


@everywhere
def test_the_head_and_the_last_position(name, tiny):
    """Scores of the last layer's state through norm and head are the model's own, right padding or not."""
    host = tiny(name)
    states: list[torch.Tensor] = []
    gaps: list[torch.Tensor] = []

    def output(site, hidden):
        if site.layer == 3:
            states.append(hidden[torch.arange(len(hidden)), last_prompt(site.tokens)])

    def logits(site, scores):
        gaps.append(site.head(states[-1], norm=True) - scores)
        return torch.zeros_like(scores)

    inputs = batch(host, padding_side="right")
    with sl.attach(host.model, toy(output=output, logits=logits)):
        found = forward(host.model, inputs)
    assert gaps[0].abs().max() < 1e-4
    last = inputs["attention_mask"].sum(1) - 1
    assert (found[torch.arange(2), last] == 0).all()
    assert (found != 0).any(-1).sum() == found.shape[0] * found.shape[1] - 2


@everywhere
def test_grids_hold_all_visual_tokens(name, tiny):
    """A grid for every view, newlines as a last column: together they are the picture's tokens, none left over."""
    host = tiny(name)
    found = layouts(host.model, host.processor, batch(host), [p.size for p in PICTURES])
    for layout in found:
        cut = grids([layout])
        assert sum(rows * columns for rows, columns in cut) == len(layout)
        lines = (layout.crop == -1).sum()
        if lines == 0:
            assert cut == [tuple(g) for g in layout.grids]
        else:
            assert cut[0] == tuple(layout.grids[0])
            assert cut[1] == (lines, (len(layout) - len(layout.cell[layout.crop == 0])) // lines)


def test_rows_that_answer():
    ids = torch.tensor([[0, 7, 9, 9, 8, 5, 6], [7, 9, 8, 5, 6, 0, 0]])
    tokens = Tokens.from_ids(ids, 9, ids != 0, prompt=6)
    assert last_prompt(tokens).tolist() == [5, 4]
    assert answering(tokens, 4).tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("queries", "kv"), [(7, 2), (1, 4), (1, 1)])
def test_boosts_and_what_is_made_of_outputs(dtype, queries, kv):
    """w + g |w| on the logits and a factor made of the head's output, forward and backward, against whole maps."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    q, k, v = draw(2, 4, queries, 6), draw(2, kv, 13, 6), draw(2, kv, 13, 6)
    boost = torch.rand(2, 4, 1, 11, generator=generator)
    mask = torch.ones(queries, 13, dtype=torch.bool).tril(13 - queries)[None, None]
    call = Call(q, k, v, mask, False, 0.4)

    def plain():
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    def swell(outputs, first):
        assert outputs.shape == (2, 1, 4, 6)
        assert first == queries - 1
        return outputs * (1 + outputs.float().norm(dim=-1, keepdim=True))

    edit = Edit(start=queries - 1, boost=boost, after=swell)
    found, _ = attend(call, plain, [edit], [])
    keys, values = (x.repeat_interleave(4 // kv, 1).float() for x in (k, v))
    scores = q.float() @ keys.transpose(-1, -2) * 0.4
    scores = torch.cat([scores[:, :, :-1], scores[:, :, -1:] + pad(boost, (0, 2)) * scores[:, :, -1:].abs()], 2)
    wanted = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    last = wanted[:, -1:] * (1 + wanted[:, -1:].norm(dim=-1, keepdim=True))
    wanted = torch.cat([wanted[:, :-1], last], 1)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (found.float() - wanted).abs().max() < tolerance
    ours = torch.autograd.grad(found.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * 10 * b.float().abs().max()


def test_looking_at_outputs_changes_nothing(tiny):
    host = tiny("llava")
    seen = []
    look = toy(attention=lambda site: Edit(after=lambda outputs, first: seen.append(outputs.shape)))
    plain = generate(host.model, batch(host))
    with sl.attach(host.model, look):
        found = generate(host.model, batch(host))
    assert torch.equal(found[1], plain[1])
    assert seen[0][2:] == (4, 8)

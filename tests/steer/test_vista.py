"""VISTA: golden arrays of the official code, the vector's laws, and a reference made of hooks on plain hosts."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import sightline as sl
from sightline.errors import ParameterError
from sightline.hosts import find, get
from sightline.steer.vista import VISTA, augment, default_window, direction, steer, steer_one
from tests.engine.numerics import assert_close
from tests.engine.test_doors import words
from tests.engine.whole import forward, generate
from tests.steer.goldens import cases, load
from tests.tiny_hosts import picture

QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


@cases("vista", "case_[123]")
def test_golden_layer(path) -> None:
    case = load(path)
    simple = bool(case.get("simple_mode", "simple" in path.stem))
    count = 1 if simple else len(case["vsv"])  # the simple form knows the first vector and strength only
    found = steer(case["x"], case["vsv"][:count], case["lam"].flatten().tolist()[:count], simple=simple)
    assert (found - case["y"]).abs().max() <= 1e-6


@cases("vista", "case_4")
def test_golden_model(path) -> None:
    case = load(path)
    weights = {k[2:]: v for k, v in case.items() if k.startswith("w.")}
    config = tf.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=float(case.get("rms_norm_eps", case.get("rms_eps", 1e-6))),
        rope_parameters={"rope_type": "default", "rope_theta": float(case.get("rope_theta", 1e4))},
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    found = model.load_state_dict(weights, strict=False)
    assert set(found.missing_keys) <= {"model.embed_tokens.weight"}
    assert all("inv_freq" in key for key in found.unexpected_keys)
    states: dict[str, list[torch.Tensor]] = {"pos": [], "neg": []}
    for sign, kept in states.items():
        hooks = [
            layer.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out[0, -1]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(inputs_embeds=case[f"{sign}_embeds"])
        for hook in hooks:
            hook.remove()
        if f"last_token_hidden_{sign}" in case:
            assert (torch.stack(kept) - case[f"last_token_hidden_{sign}"]).abs().max() <= 1e-4
    found = direction(torch.stack(states["pos"])[None], torch.stack(states["neg"])[None], compat=True)
    assert (found - case["direction"]).abs().max() <= 1e-4
    kept: list[torch.Tensor] = []
    hooks = []
    lam, alpha = float(case.get("lam", 0.17)), float(case.get("alpha", 0.3))
    with torch.no_grad():
        assert (model(inputs_embeds=case["pos_embeds"]).logits - case["base_logits"]).abs().max() <= 1e-4
    for layer, vector in zip(model.model.layers, case["direction"], strict=True):
        hooks.append(layer.mlp.register_forward_hook(lambda m, a, out, v=vector: steer(out, [v], [lam])))
        hooks.append(layer.register_forward_hook(lambda m, a, out: kept.append(out)))
    with torch.no_grad():
        steered = model(inputs_embeds=case["pos_embeds"]).logits
        window = torch.stack([model.lm_head(h) for h in kept[1:3]])
    for hook in hooks:
        hook.remove()
    assert (steered - case["steered_logits"]).abs().max() <= 1e-4
    assert (augment(steered, window, alpha) - case["sla_logits"]).abs().max() <= 1e-4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), lam=st.floats(-3, 3), scale=st.floats(0.01, 100), simple=st.booleans())
def test_laws(seed: int, lam: float, scale: float, simple: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, generator=generator)
    found = steer(x, [v], [lam], simple=simple)
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(steer(x, [scale * v], [lam], simple=simple), found, atol=1e-4)
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    assert torch.allclose(steer(x @ turn, [v @ turn], [lam], simple=simple), found @ turn, atol=1e-4)
    assert torch.allclose(steer(x[:, 2:4], [v], [lam], simple=simple), found[:, 2:4], atol=1e-6)
    assert torch.allclose(steer(x, [v], [0.0], simple=simple), x, atol=1e-5)
    assert torch.allclose(steer(x, [torch.zeros(2, 16)], [lam], simple=simple), x, atol=1e-5)
    assert (steer(torch.zeros(1, 1, 16), [v[:1]], [lam], simple=simple) == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_closed_form(seed: int, lam: float, simple: bool, dtype: torch.dtype) -> None:
    """`steer_one` against `steer`; a row without a vector stays bit for bit."""
    rng = torch.Generator().manual_seed(seed)
    x, v = torch.randn(3, 5, 17, generator=rng).to(dtype), torch.randn(3, 17, generator=rng)
    x[1, 2], v[2] = 0, 0
    unit = torch.nn.functional.normalize(v, dim=-1)
    found, naive = steer_one(x, unit, lam, simple=simple), steer(x, [v], [lam], simple=simple)
    assert found.dtype == dtype
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    assert torch.allclose(found.float(), naive.float(), **tolerance)
    assert torch.equal(found[2], x[2])


def test_the_gate_pushes_back_what_points_away() -> None:
    v = torch.tensor([1.0, 0.0])
    away, along = torch.tensor([[[-1.0, 0.1]]]), torch.tensor([[[1.0, 0.1]]])
    gain = lambda x: float((steer(x, [v], [0.3]) - steer(x, [v], [0.3], simple=True)).abs().max())  # noqa: E731
    assert gain(along) == 0
    assert gain(away) > 0.01


def test_several_pairs_add_the_first_principal_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.nn.functional.normalize(torch.randn(12, generator=generator), dim=0)
    amounts = torch.tensor([-3.0, -1.0, 0.5, 9.0])
    positive = (torch.ones(12) + amounts[:, None] * line).view(4, 3, 4)
    found = direction(positive, torch.zeros_like(positive)).flatten()
    centre = torch.ones(12) + amounts.mean() * line
    assert torch.allclose(found, centre + line, atol=1e-5)  # the largest entry of U, of the pair at 9, is positive
    alone = direction(positive[:1], torch.zeros(1, 3, 4))
    assert torch.equal(alone, positive[0])
    assert float((direction(positive[:1], torch.zeros(1, 3, 4), compat=True) - alone).sum()) == 1.0


def test_windows() -> None:
    assert default_window(32) == (25, 30)
    assert default_window(4) == (2, 2)
    logits, window = torch.randn(2, 7), torch.randn(3, 2, 7)
    assert torch.equal(augment(logits, window, 0.0), logits)
    assert torch.equal(augment(logits, window, 1.0), window.mean(0))


class ByHooks:
    """VISTA on a plain host, left-padded rows, written out."""

    def __init__(self, host, inputs: Any, lam: float, window: tuple[int, int]) -> None:
        self.host, self.lam, self.window = host, lam, window
        self.layers = list(get(get(host.model, find(host.model).decoder), "layers"))
        self.kept: dict[int, torch.Tensor] = {}
        with self.hooked(mlp=False):
            forward(host.model, inputs)
            seeing = dict(self.kept)
            forward(host.model, words(host))
        self.vectors = {i: seeing[i] - self.kept[i] for i in seeing}
        for i, v in self.vectors.items():  # a sliding window may hide the picture: what is left is rounding
            v[v.norm(dim=-1) < 1e-5 * seeing[i].norm(dim=-1)] = 0

    def keep(self, layer: int, module, args, output) -> None:
        self.kept[layer] = output[:, -1].clone()

    def turn(self, layer: int, module, args, output):
        v = self.vectors[layer][:, None]
        x = torch.nn.functional.normalize(output, dim=-1)
        gate = 1 + torch.nn.functional.cosine_similarity(output, -v, dim=-1).clamp(min=0)[..., None]
        moved = x + self.lam * gate * torch.nn.functional.normalize(v, dim=-1)
        return torch.nn.functional.normalize(moved, dim=-1) * output.norm(dim=-1, keepdim=True)

    def hooked(self, mlp: bool = True) -> ExitStack:
        stack = ExitStack()
        for i, layer in enumerate(self.layers):
            stack.callback(layer.register_forward_hook(partial(self.keep, i)).remove)
            if mlp:
                stack.callback(layer.mlp.register_forward_hook(partial(self.turn, i)).remove)
        return stack

    def mixed(self, logits: torch.Tensor, alpha: float) -> torch.Tensor:
        head = self.host.model.get_output_embeddings()
        first, last = self.window
        window = torch.stack([head(self.kept[i]) for i in range(first, last + 1)]).mean(0)
        return alpha * window + (1 - alpha) * logits


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm", "gemma3"])
def test_against_hooks(name: str, tiny) -> None:
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    reference = ByHooks(host, inputs, 0.4, (1, 2))
    with reference.hooked():
        prompt = reference.mixed(forward(host.model, inputs)[:, -1], 0.3)
        ids, steps = generate(host.model, inputs)  # kept: the last step's states
        last = reference.mixed(steps[:, -1], 0.3)
    with sl.attach(host.model, VISTA(lam=0.4, logits_layers=(1, 2), logits_alpha=0.0)) as attached:
        found, ours = generate(host.model, inputs)
    assert torch.equal(found, ids)
    assert_close("steered", ours, steps, 5e-5)
    norms = [round(float(v.norm(dim=-1).mean()), 3) for v in reference.vectors.values()]
    assert attached.report()["vista"]["vector_norm"] == pytest.approx(norms, abs=2e-3)
    with sl.attach(host.model, VISTA(lam=0.4, logits_layers=(1, 2))):
        assert_close("first", generate(host.model, inputs, 1)[1][:, 0], prompt, 5e-5)
        forced = lambda row, sofar: [int(ids[row, len(sofar)])]  # noqa: E731  the same tokens, other scores
        mixed = generate(host.model, inputs, prefix_allowed_tokens_fn=forced)[1]
    assert_close("last", mixed[:, -1], last, 5e-5)


def test_the_window_costs_one_product(tiny) -> None:
    """Scores of a window are those of its layers one by one, from a single call of the head; the last layer counts as the logits."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    reference = ByHooks(host, inputs, 0.0, (1, 2))
    with reference.hooked(mlp=False):
        plain = forward(host.model, inputs)[:, -1]
    head, calls = host.model.get_output_embeddings(), []
    scores = [head(reference.kept[layer]) for layer in (1, 2)]
    for window, mean in (((1, 2), sum(scores) / 2), ((1, 3), (sum(scores) + plain) / 3)):
        calls.clear()
        hook = head.register_forward_hook(lambda *_: calls.append(1))
        with sl.attach(host.model, VISTA(lam=0.0, logits_layers=window, logits_alpha=0.4)):
            found = forward(host.model, inputs)[:, -1]
        hook.remove()
        assert_close("window", found, 0.4 * mean + 0.6 * plain, 1e-6)
        assert len(calls) == 2  # the model's own, and the window's


def test_a_window_of_the_last_layer_changes_nothing(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    plain = forward(host.model, inputs)
    with sl.attach(host.model, VISTA(lam=0.0, logits_layers=(3, 3), logits_alpha=0.7)):
        assert_close("logits", forward(host.model, inputs), plain, 1e-6)


@pytest.mark.parametrize("prompt", [True, False])
def test_with_and_without_cache(prompt: bool, tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    with sl.attach(host.model, VISTA(lam=0.5, steer_prompt=prompt)):
        ids, steps = generate(host.model, inputs)
        again, whole = generate(host.model, inputs, use_cache=False)
    assert torch.equal(ids, again)
    assert_close("steps", steps, whole, 5e-5)


def test_the_prompt_may_be_left_alone(tiny) -> None:
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    _, plain = generate(host.model, inputs)
    with sl.attach(host.model, VISTA(lam=0.5, logits_alpha=0.0, steer_prompt=False)):
        _, steps = generate(host.model, inputs)
    assert torch.equal(steps[:, 0], plain[:, 0])
    assert not torch.allclose(steps[:, 1], plain[:, 1], atol=1e-2)


@pytest.mark.parametrize("layers", [(1, 3), (1, 3, 0, 2)])
def test_ranges_of_layers(layers: tuple[int, ...], tiny) -> None:
    """a/b restricts layers and vectors; c/d says whose vectors they get."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    reference = ByHooks(host, inputs, 0.4, (1, 2))
    source = layers[2] if len(layers) == 4 else layers[0]
    with ExitStack() as stack:
        for i in range(*layers[:2]):
            hook = partial(reference.turn, i - layers[0] + source)
            stack.callback(reference.layers[i].mlp.register_forward_hook(hook).remove)
        wanted = forward(host.model, inputs)
    with sl.attach(host.model, VISTA(lam=0.4, layers=layers, logits_alpha=0.0)):
        assert_close("logits", forward(host.model, inputs), wanted, 5e-5)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"layers": (1, 2, 3)}, "two or four"),
        ({"logits_layers": (3, 2)}, "first and last"),
        ({"logits_alpha": 1.5}, "logits_alpha"),
    ],
)
def test_parameters_out_of_range(bad: dict, match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        VISTA(**bad)


@pytest.mark.parametrize("bad", [{"layers": (0, 9)}, {"layers": (0, 2, 1, 4)}, {"logits_layers": (2, 4)}])
def test_layers_beyond_the_model_are_refused(bad: dict, tiny) -> None:
    host = tiny("llava")
    with pytest.raises(ParameterError, match="layers"):
        sl.attach(host.model, VISTA(**bad))

"""DyVTE: the official gates and labels, exits row by row, and training of gates on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.errors import InputError, ParameterError
from sightline.learn.exit_gates import answer_loss, gate_labels, judged, train
from sightline.learn.recipe import Plan
from sightline.prune.dyvte import NAME, DyVTE, Gate, features, gate
from sightline.prune.pyramiddrop import PyramidDrop
from tests.engine.masked import without
from tests.engine.numerics import assert_close
from tests.engine.whole import forward, generate
from tests.prune import golden
from tests.tiny_hosts import picture

QUESTIONS, PICTURES = ["Is there a dog?", "How many red cups are on the table?"], [picture(), picture(80, 64, 1)]


@pytest.mark.parametrize("path", golden.cases("dyvte", "router*"), ids=lambda p: p.stem)
def test_golden_gate(path):
    case = golden.load(path)
    assert (gate(case["x"], case["w.w1.weight"], case["w.w2.weight"]) - case["logits"]).abs().max() <= 1e-5


@pytest.mark.skipif(not golden.cases("dyvte"), reason="golden arrays are not here")
@pytest.mark.parametrize("path", golden.cases("dyvte", "gate_label*"), ids=lambda p: p.stem)
def test_golden_labels(path):
    case = golden.load(path)
    full, exited, labels = case["logits_full"], case["logits_exit"], case["labels"]
    assert (answer_loss(full, labels) - case["loss_full"]).abs().max() <= 1e-5
    assert (answer_loss(exited, labels) - case["loss_exit"]).abs().max() <= 1e-5
    assert torch.equal(gate_labels(full, exited, labels), case["gate_label"].long())


@pytest.mark.skipif(not golden.cases("dyvte"), reason="golden arrays are not here")
@pytest.mark.parametrize("path", golden.cases("dyvte", "model*"), ids=lambda p: p.stem)
def test_golden_model(path, tmp_path):
    """The official decoder with gates: where it exits, what is cached, what comes out."""
    case = golden.load(path)
    model = golden.llama(case, 2)
    inputs, inject = golden.inputs(case)
    gates = {f"model.{k[2:]}": v.contiguous() for k, v in case.items() if "visual_gates_router" in k}
    save_file(gates, tmp_path / "gates.safetensors")
    with sl.attach(model, inject, DyVTE(gates=str(tmp_path / "gates.safetensors"))) as attached:
        found, cache = golden.states(model, inputs)
    exits, last = attached.report()["dyvte"]["exits"], len(cache.layers) - 1
    assert exits == ({str(case["exit_layer"]): 1} if 0 <= case["exit_layer"] < last else {})  # the last is not asked
    for layer, (seen, logits) in enumerate(zip(case["gate_inputs"], case["gate_logits"], strict=True)):
        w1, w2 = (case[f"w.visual_gates_router.{layer}.{name}.weight"] for name in ("w1", "w2"))
        assert (gate(seen[None], w1, w2)[0] - logits).abs().max() <= 1e-6 * max(10.0, float(logits.abs().max()))
    assert [layer.keys.shape[-2] for layer in cache.layers] == case["kv_len_per_layer"].tolist()
    columns = torch.arange(found.shape[1])
    if case["exit_layer"] >= 0:
        columns = columns[inputs["input_ids"][0] != golden.IMAGE]
    assert (found[:, columns] - case["last_hidden_state"]).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_tie(dtype):
    """At the published width rounding must not decide."""
    for seed in range(20):
        one = torch.randn(1 + seed % 3, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        w1 = torch.randn(2048, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        w2 = torch.randn(1, 2048, generator=torch.Generator().manual_seed(seed)).to(dtype).repeat(2, 1)
        z = gate(one, w1, w2)
        assert torch.equal(z[:, 0], z[:, 1])
    wanted = (torch.nn.functional.gelu(one.double() @ w1.double().T) @ w2.double().T).float()
    assert_close("gate", z.float(), wanted, 1e-5 if dtype == torch.float32 else 3e-2)


def test_what_a_gate_sees():
    hidden = torch.arange(12.0).view(1, 6, 2).repeat(3, 1, 1)
    text = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    seen = features(hidden, text)
    assert seen[0].tolist() == [5.0, 6.0, 8.0, 9.0]
    assert seen[1].tolist() == [6.0, 7.0, 6.0, 7.0]  # one token: its own mean
    assert seen[2].tolist() == [0.0] * 4


def gate_file(path: Path, exits: dict[int, bool], layers: int = 4, hidden: int = 32) -> str:
    """Gates that always stay (False) or leave (True)."""
    found = {}
    for layer in range(layers):
        one = Gate(2 * hidden, 8)
        with torch.no_grad():
            one.w2.weight[1] = one.w2.weight[0]  # a tie: stay
        found[NAME.format(layer, "w1")], found[NAME.format(layer, "w2")] = (
            one.w1.weight.detach(),
            one.w2.weight.detach(),
        )
        if exits.get(layer):
            w1 = torch.zeros(8, 2 * hidden)
            w1[0], w1[1] = torch.ones(2 * hidden), -torch.ones(2 * hidden)
            w2 = torch.zeros(2, 8)
            w2[1, :2] = 5.0  # GELU(a) + GELU(-a) > 0 unless a = 0
            found[NAME.format(layer, "w1")], found[NAME.format(layer, "w2")] = w1, w2
    file = path / "gates.safetensors"
    save_file({k: v.contiguous().clone() for k, v in found.items()}, file)
    return str(file)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_tie_stays_and_a_gate_leaves(name, tiny, tmp_path):
    """Gates that tie: the host, bit for bit. One that fires: as a fixed exit, and as masking the picture from there."""
    host = tiny(name)
    inputs = host.inputs(QUESTIONS, [[p] for p in PICTURES])
    plain = generate(host.model, inputs)
    with sl.attach(host.model, DyVTE(gates=gate_file(tmp_path, {}))) as attached:
        found = generate(host.model, inputs)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    assert attached.report()["dyvte"]["mean_layers_with_image"] == 4.0
    with sl.attach(host.model, DyVTE(gates=gate_file(tmp_path, {0: True, 2: True}))) as attached:
        ids, logits = generate(host.model, inputs)
    assert attached.report()["dyvte"]["exits"] == {"0": 2}
    with sl.attach(host.model, DyVTE(exit_layer=0)):
        again, fixed = generate(host.model, inputs)
    assert torch.equal(ids, again)
    assert torch.equal(logits, fixed)
    visual = inputs["input_ids"] == host.model.config.image_token_id
    masked = without(host.model, {1: visual}, inputs["attention_mask"].bool(), renumber=False)
    assert_close("masked", logits, forward(masked, inputs, ids)[:, -6:-1], 2e-5)


def test_after_another_reducer(tiny):
    """As in the paper, where half of the tokens go early and the rest exits later."""
    host = tiny("llava")
    inputs = host.inputs(QUESTIONS[:1], [PICTURES[:1]])
    n = inputs["input_ids"].shape[1]
    with sl.attach(host.model, PyramidDrop((1,), (0.5,)), DyVTE(exit_layer=2)), torch.no_grad():
        cache = made_cache(host.model(**inputs))
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n, n - 18, n - 18, n - 36]


def answers(host) -> dict[str, Any]:
    inputs = dict(host.inputs(QUESTIONS, [[p] for p in PICTURES], padding_side="right"))
    real = inputs["attention_mask"].bool()
    order = torch.arange(real.shape[1])
    last = torch.where(real, order, -1).amax(1, keepdim=True)
    return {**inputs, "labels": inputs["input_ids"].masked_fill((order <= last - 3) | ~real, -100)}


def test_training_learns_and_resumes(tiny, tmp_path):
    """Gates of a tiny model learn their labels; a killed run goes on as if it had not been; the host is untouched."""
    host = tiny("llava")
    batch = answers(host)
    before = {k: v.clone() for k, v in host.model.state_dict().items()}

    def batches(step: int) -> Iterator[dict[str, Any]]:
        while True:
            yield batch

    def run(folder: Path, steps: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        plan = Plan(steps=steps, batch=2, lr=3e-3, weight_decay=0.0, warmup=2)
        return load_file(train(host.model, batches, folder, plan=plan, width=16, save_every=10))

    whole = run(tmp_path / "whole", 60)
    file = tmp_path / "whole" / "exit_gates.safetensors"
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    assert whole[NAME.format(3, "w1")].shape == (16, 64)
    right = []
    for layer in range(3):
        seen, wanted = judged(host.model, batch, layer)
        z = gate(seen, whole[NAME.format(layer, "w1")], whole[NAME.format(layer, "w2")])
        right += (z.argmax(-1) == wanted).tolist()
    assert sum(right) / len(right) > 0.8
    with sl.attach(host.model, DyVTE(gates=str(file))):
        generate(host.model, host.inputs(QUESTIONS, [[p] for p in PICTURES]))
    assert torch.equal(load_file(train(host.model, batches, tmp_path / "whole", width=16,
                                       plan=Plan(60, 2, 3e-3, 0.0, 2)))[NAME.format(0, "w1")], whole[NAME.format(0, "w1")])  # fmt: skip


def test_labels_of_gates(tiny):
    """Leaving behind the last layer but one of a model whose picture matters not at all is right."""
    host = tiny("llava")
    batch = answers(host)
    seen, wanted = judged(host.model, batch, 2)
    assert seen.shape == (2, 64)
    assert set(wanted.tolist()) <= {0, 1}
    logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 7), -100)
    labels[:, 4:] = 3
    assert gate_labels(logits, logits, labels).tolist() == [1, 1]
    worse = logits.clone()
    worse[1, 4, 3] -= 3.0
    assert gate_labels(logits, worse, labels).tolist() == [1, 0]


def test_what_is_refused(tiny, tmp_path):
    host = tiny("llava")
    with pytest.raises(ParameterError, match="needs trained gates"):
        sl.attach(host.model, DyVTE())
    with pytest.raises(ParameterError, match=r"\[-1, 3\]"):
        sl.attach(host.model, DyVTE(exit_layer=4))
    with pytest.raises(InputError, match="not a file"):
        sl.attach(host.model, DyVTE(gates=str(tmp_path / "none.safetensors")))
    with pytest.raises(InputError, match="another model"):
        sl.attach(host.model, DyVTE(gates=gate_file(tmp_path, {}, layers=3)))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        sl.attach(host.model, DyVTE(gates=str(tmp_path / "bad.safetensors")))
    with pytest.raises(InputError, match="labels"):
        judged(host.model, dict(host.inputs(QUESTIONS, [[p] for p in PICTURES])), 1)
    text = dict(host.inputs(QUESTIONS))
    with pytest.raises(InputError, match="pictures"):
        judged(host.model, {**text, "labels": text["input_ids"]}, 1)

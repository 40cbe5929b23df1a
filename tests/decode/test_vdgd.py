"""VDGD: golden arrays of the official code, the sheet's invariants, and descriptions written and given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sightline as sl
from sightline.decode.contrast import plausible
from sightline.decode.vdgd import DESCRIBE, DESCRIBED, VDGD, distances, nucleus, rescore
from sightline.errors import ModelError, ParameterError
from tests.engine.numerics import assert_close
from tests.steer.goldens import cases, load
from tests.tiny_hosts import picture


@cases("vdgd")
def test_golden(path: Path) -> None:
    case = load(path)
    settings = {k: case[k] for k in ("top_p", "temperature") if k in case}
    kept = nucleus(case["raw_logits"].view(1, -1), **settings)[0]
    wanted = case["kept"]
    if wanted.dtype != torch.bool and wanted.shape != kept.shape:  # as indices
        assert kept.nonzero().flatten().tolist() == wanted.flatten().tolist()
    else:
        assert torch.equal(kept, wanted.bool())
    for reduction in ("min", "avg", "sum"):
        found = rescore(kept, distances(case["description_logits"], reduction), scale="release")
        torch.testing.assert_close(found, case[f"logits_{reduction}"].view(-1), rtol=1e-5, atol=1e-7)
    if "single" in path.stem:
        assert int(kept.sum()) == 1


def test_reductions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    least, mean, total = (distances(logits, r) for r in ("min", "avg", "sum"))
    assert (least <= mean + 1e-6).all()
    assert (mean <= logits.log_softmax(-1).neg().amax(0) + 1e-6).all()
    torch.testing.assert_close(total, 6 * mean)
    for r in ("min", "avg"):
        torch.testing.assert_close(distances(logits.repeat(2, 1), r), distances(logits, r))
        torch.testing.assert_close(distances(logits[torch.randperm(6)], r), distances(logits, r))


def test_candidates() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert nucleus(logits).tolist()[0] == [True, False, False, False]
    assert nucleus(logits, top_p=1.0).all()
    assert nucleus(logits, top_p=0.0).sum(-1).tolist() == [1, 1]
    out = rescore(plausible(logits, 0.1), torch.arange(4.0), scale="paper")
    assert out[1].tolist() == [0, -1, -2, -3]
    assert out[0].isfinite().tolist() == [True, False, False, False]


@pytest.mark.parametrize("given", [None, "A dog on a chair."])
def test_one_step_by_hand(given, tiny) -> None:
    """The description and its scores from the plain model; candidates from the described prompt."""
    host = tiny("llava")
    question, row = "Is there a dog?", [[picture()]]
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    ask = host.inputs([DESCRIBE.format(question=question)], row)
    tokenizer = host.processor.tokenizer
    with torch.no_grad():
        if given is None:
            written = host.model.generate(**ask, max_new_tokens=6, **options)
            text = tokenizer.decode(written.sequences[0, -6:], skip_special_tokens=True).strip()
            scores = torch.cat(written.logits)
        else:
            text, ids = given, torch.tensor([tokenizer(given, add_special_tokens=False)["input_ids"]])
            whole = torch.cat([ask["input_ids"], ids], 1)
            scores = host.model(input_ids=whole, pixel_values=ask["pixel_values"]).logits[0, -ids.shape[1] - 1 : -1]
        described = host.inputs([DESCRIBED.format(description=text, question=question)], row)
        second = host.model.generate(**described, max_new_tokens=1, **options).logits[0]
    system = VDGD(description_tokens=6, alpha=0.2, description=given)
    with sl.attach(host.model, system) as attached:
        out = host.model.generate(**host.inputs([question], row), max_new_tokens=1, **options).logits[0]
    kept = plausible(second, 0.2)
    assert torch.equal(out.isfinite(), kept)
    assert_close("scores", out[kept], -distances(scores)[kept[0]], 1e-5)
    assert attached.report()["vdgd"]["descriptions"] == [text]


def test_a_debiased_description_by_hand(tiny) -> None:
    """Every token of it is weighed against what the model says to the request alone; the kept scores are the raw ones."""
    host = tiny("llava")
    questions, rows = ["Is there a dog?", "How many red cups are on the table?"], [[picture()], [picture(80, 64, 1)]]
    requests = [DESCRIBE.format(question=q) for q in questions]
    system = VDGD(description_tokens=4, alpha=0.0, use_dd=True, dd_alpha=2.0, dd_beta=0.3)
    with sl.attach(host.model, system) as attached:
        found = host.model.generate(
            **host.inputs(questions, rows),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits[0]
    for row in range(2):
        with torch.no_grad():
            ask, raw = host.inputs([requests[row]], [rows[row]]), []
            ids = ask["input_ids"]
            words = ids[ids != host.model.config.image_token_id][None]
            blind = host.model(input_ids=words).logits[0, -1]
            for _ in range(4):
                raw.append(host.model(input_ids=ids, pixel_values=ask["pixel_values"]).logits[0, -1])
                weighed = 3 * raw[-1] - 2 * blind
                weighed[~plausible(raw[-1], 0.3)] = -torch.inf
                ids = torch.cat([ids, weighed.argmax().view(1, 1)], 1)
        text = host.processor.tokenizer.decode(ids[0, -4:], skip_special_tokens=True).strip()
        assert attached.report()["vdgd"]["descriptions"][row] == text
        assert_close("scores", found[row], -distances(torch.stack(raw)), 1e-5)


def test_an_amateur_of_its_own(tiny, tmp_path) -> None:
    """A language model by name takes the place of the blind one; another vocabulary is refused before anything is written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    host = tiny("llava")
    question, row = ["Is there a dog?"], [[picture()]]
    size = host.model.config.get_text_config().vocab_size
    names = []
    for vocabulary in (size, size + 8):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        names.append(str(tmp_path / str(vocabulary)))
        LlamaForCausalLM(config).save_pretrained(names[-1])
        host.processor.tokenizer.save_pretrained(names[-1])
    texts = []
    for amateur in (None, names[0]):
        system = VDGD(description_tokens=6, use_dd=True, dd_alpha=8.0, dd_beta=0.0, amateur=amateur)
        with sl.attach(host.model, system) as attached:
            host.model.generate(**host.inputs(question, row), max_new_tokens=1, do_sample=False)
        texts.append(attached.report()["vdgd"]["descriptions"])
    assert texts[0] != texts[1]
    with (
        sl.attach(host.model, VDGD(use_dd=True, amateur=names[1])),
        pytest.raises(ParameterError, match="same vocabulary"),
    ):
        host.model.generate(**host.inputs(question, row), max_new_tokens=1)
    with (
        sl.attach(host.model, VDGD(use_dd=True, amateur=str(tmp_path / "none"))),
        pytest.raises(ModelError, match="cannot be loaded"),
    ):
        host.model.generate(**host.inputs(question, row), max_new_tokens=1)

"""Prompts, batches and answers of a loaded model, on every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sightline as sl
from sightline.engine.system import System
from sightline.errors import InputError, ModelError, ParameterError
from sightline.hosts import find
from sightline.lvlm import LVLM, check_max_new_tokens, check_question
from tests.tiny_hosts import TINY, picture

FAMILIES = sorted(TINY)
QUESTION = "Is there a dog?"


@pytest.fixture
def lvlm(tiny):
    def make(name: str = "llava") -> LVLM:
        host = tiny(name)
        return LVLM(host.model, host.processor, find(host.model), name)

    return make


def prompt(lvlm: LVLM, ids: torch.Tensor) -> str:
    """What a row says, with runs of image tokens and padding left out."""
    tokenizer = lvlm.processor.tokenizer
    skip = {tokenizer.pad_token_id, lvlm.model.config.image_token_id}
    return tokenizer.decode([i for i in ids.tolist() if i not in skip])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_answer_is_what_generate_gives(tiny, lvlm, name):
    host = tiny(name)
    text = f"USER: {host.placeholder}{QUESTION} ASSISTANT:"
    images = [[picture()]] if host.nested else [picture()]
    batch = host.processor(images=images, text=[text], return_tensors="pt")
    ids = host.model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert lvlm(name).ask(picture(), QUESTION, max_new_tokens=6) == host.processor.decode(ids[0]).strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_answers_like_its_rows(lvlm, name):
    """Two pictures, one and none in one batch; the scores of every row are those of the row alone."""
    model = lvlm(name)
    images = [[picture(), picture(40, 60, 1)], picture(80, 30, 2), None]
    questions = ["What are these?", QUESTION, "Describe the picture."]
    batch = model.inputs(images, questions)
    assert (batch["attention_mask"][:, -1] == 1).all()  # padded on the left
    assert (batch["attention_mask"][-1, 0] == 0).all()
    with torch.no_grad():
        together = model.model(**batch).logits[:, -1]
        for row, (image, question) in enumerate(zip(images, questions, strict=True)):
            alone = model.model(**model.inputs([image], question)).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-3)
    assert len(model.ask(images, questions, max_new_tokens=2)) == 3


def test_forms_of_images_and_questions(lvlm):
    model = lvlm()
    one = model.ask(picture(), QUESTION, max_new_tokens=4)
    assert isinstance(one, str)
    assert one
    assert model.ask([picture()], QUESTION, max_new_tokens=4) == [one]
    assert model.ask(picture(), [QUESTION, QUESTION], max_new_tokens=4) == [one, one]
    assert model.ask([picture(), picture()], QUESTION, max_new_tokens=4) == [one, one]
    assert model.ask(np.asarray(picture()), f"  {QUESTION}\n", max_new_tokens=4) == one
    assert model.ask(picture(seed=5), QUESTION, max_new_tokens=4) != one
    assert isinstance(model.ask(None, QUESTION, max_new_tokens=4), str)


def test_generate_options_pass_through(lvlm):
    model = lvlm()
    beams = model.ask(picture(), QUESTION, max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2
    torch.manual_seed(0)
    drawn = {model.ask(picture(), QUESTION, max_new_tokens=4, do_sample=True, temperature=5.0) for _ in range(4)}
    assert len(drawn) > 1


def test_a_sampling_model_is_greedy_unless_asked(lvlm, monkeypatch):
    model = lvlm()
    monkeypatch.setattr(model.model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.model.generation_config, "temperature", 5.0)
    assert len({model.ask(picture(), QUESTION, max_new_tokens=6) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava", "\n\nIs there a dog?\n"),
        ("gemma3", "\n\n<start_of_image><end_of_image>\n\n\n\n\n<start_of_image><end_of_image>\n\n\nIs there a dog?\n"),
        ("internvl", "<img></img>\n<img></img>\nIs there a dog?\n"),
    ],
)
def test_without_a_chat_template(lvlm, monkeypatch, name, expected):
    model = lvlm(name)
    monkeypatch.setattr(model.processor, "chat_template", None)
    batch = model.inputs([[picture(), picture(30, 30)]], QUESTION)
    assert prompt(model, batch["input_ids"][0]).removeprefix("<s>") == expected
    assert isinstance(model.ask(picture(), QUESTION, max_new_tokens=2), str)


def test_inputs_are_on_the_models_device_and_dtype(tiny):
    host = TINY["llava"]()
    model = LVLM(host.model.to(torch.bfloat16), host.processor, find(host.model), "llava")
    batch = model.inputs(picture(), QUESTION)
    assert model.dtype == batch["pixel_values"].dtype == torch.bfloat16
    assert model.device == batch["input_ids"].device == torch.device("cpu")
    assert batch["input_ids"].dtype == torch.int64
    assert isinstance(model.ask(picture(), QUESTION, max_new_tokens=2), str)


def test_systems_are_attached_while_asking(lvlm):
    from sightline.engine.attach import MARK

    model, seen = lvlm(), []
    handle = model.model.register_forward_pre_hook(lambda module, args: seen.append(hasattr(module, MARK)))
    try:
        model.ask(picture(), QUESTION, systems=[System()], max_new_tokens=2)
        model.ask(picture(), QUESTION, max_new_tokens=2)
    finally:
        handle.remove()
    assert seen == [True, True, False, False]
    assert not hasattr(model.model, MARK)


def test_ask_works_while_the_caller_has_systems_attached(lvlm):
    from sightline.engine.attach import attach

    model = lvlm()
    with attach(model.model, System()):
        assert isinstance(model.ask(picture(), QUESTION, max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("why? " * 10_000, "50000 bytes long .* at most 8192"),
        ("\ud800" * 5000, "15000 bytes"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_questions_that_are_refused(question, named):
    with pytest.raises(InputError, match=named):
        check_question(question)


def test_questions_at_the_limit():
    assert check_question("x" * 8192) == "x" * 8192
    assert check_question(" é ") == "é"
    with pytest.raises(InputError, match="8193 bytes"):
        check_question("x" * 8193)
    with pytest.raises(InputError, match="8194 bytes"):
        check_question("é" * 4097)


@pytest.mark.parametrize("count", [0, -1, 4097, 2.5, True, "9"])
def test_max_new_tokens_out_of_range(count, lvlm):
    with pytest.raises(ParameterError, match=r"max_new_tokens=.*\[1, 4096\]"):
        check_max_new_tokens(count)
    with pytest.raises(ParameterError):
        lvlm().ask(picture(), QUESTION, max_new_tokens=count)


@pytest.mark.parametrize("token", ["<image>", "<start_of_image>", "<video>"])
def test_placeholders_in_a_question(lvlm, token):
    model = lvlm({"<image>": "llava", "<start_of_image>": "gemma3", "<video>": "smolvlm"}[token])
    with pytest.raises(InputError, match=f"contains '{token}'.*leave it out"):
        model.ask(picture(), f"{token} Is there a dog?")


@pytest.mark.parametrize(
    ("images", "questions", "named"),
    [
        ([picture()] * 2, ["a"] * 3, "2 entries of images for 3 questions"),
        ([], "a", "0 entries of images for 0 questions"),
        (picture(), [], "1 entries|0 entries of images for 0 questions"),
        ([picture(), 3], "a", "int: give a path"),
        ("Is there a dog?", picture(), "the picture comes first, then the question"),
        ("nowhere.png", "a", "'nowhere.png': no such file"),
        ([["nowhere.png"]], "a", "'nowhere.png': no such file"),
    ],
)
def test_batches_that_do_not_fit(lvlm, images, questions, named):
    with pytest.raises(InputError, match=named):
        lvlm().ask(images, questions)


def test_the_context_is_not_exceeded(lvlm, monkeypatch):
    model = lvlm()
    length = model.inputs(picture(), QUESTION)["input_ids"].shape[1]
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", length + 4)
    assert isinstance(model.ask(picture(), QUESTION, max_new_tokens=4), str)
    with pytest.raises(InputError, match=f"{length} tokens with its pictures and 5 new ones .* holds {length + 4}"):
        model.ask(picture(), QUESTION, max_new_tokens=5)
    with pytest.raises(InputError, match="holds"):
        model.inputs([[picture(), picture()]], QUESTION)


def test_what_a_reducer_leaves_has_to_fit_the_context(lvlm, monkeypatch):
    """More visual tokens than the model holds, of which few enough are left, or too many."""
    model = lvlm()
    count = sum(int((model.inputs(picture(), QUESTION)["input_ids"] == i).sum()) for i in model.visual_ids)
    length = model.inputs([[picture()] * 4], QUESTION)["input_ids"].shape[1]
    left = length - 4 * (count - 4)
    monkeypatch.setattr(model.model.config.text_config, "max_position_embeddings", left + 2)
    reducer = sl.prune.VTCCLS(keep=4, score="mean-received")
    assert isinstance(model.ask([[picture()] * 4], [QUESTION], systems=[reducer], max_new_tokens=2)[0], str)
    with pytest.raises(InputError, match=f"leaves {left} tokens of the prompt, but the model holds {left - 1} besides"):
        model.ask([[picture()] * 4], [QUESTION], systems=[reducer], max_new_tokens=3)
    with pytest.raises(InputError, match="shorten the question"):
        model.ask([[picture()] * 4], [QUESTION], systems=[sl.steer.VAR()], max_new_tokens=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beam": 2}, "generate has no argument 'num_beam': did you mean num_beams"),
        ({"num_beams": 0}, r"generate cannot run with num_beams=0 \("),
        ({"do_sample": True, "temperature": -1.0}, "generate cannot run with do_sample=True, temperature=-1.0"),
        ({"num_return_sequences": 3}, "generate cannot run with num_return_sequences=3"),
        ({"logits_processor": 3}, "generate cannot run with logits_processor=3"),
    ],
)
@pytest.mark.parametrize("systems", [[], [System()]])
def test_arguments_of_generate(lvlm, given, said, systems):
    with pytest.raises(ParameterError, match=said) as caught:
        lvlm().ask(picture(), QUESTION, systems=systems, max_new_tokens=2, **given)
    assert "\n" not in str(caught.value)
    assert lvlm().ask(picture(), QUESTION, systems=systems, max_new_tokens=2, num_beams=2) is not None


def test_own_errors_pass_through_generate_arguments(lvlm):
    class Wrong(System):
        def logits(self, site, logits):
            raise InputError("mine")

    with pytest.raises(InputError, match=r"^mine$"):
        lvlm().ask(picture(), QUESTION, systems=[Wrong()], max_new_tokens=2, num_beams=2)


def test_faults_are_not_put_down_to_arguments(lvlm):
    """What goes wrong while the model works is no fault of the arguments, whatever its type."""

    class Wrong(System):
        def logits(self, site, logits):
            raise TypeError("a defect")

    with pytest.raises(TypeError, match=r"^a defect$"):
        lvlm().ask(picture(), QUESTION, systems=[Wrong()], max_new_tokens=2, num_beams=2)


def test_answers_are_text_whatever_generate_returns(lvlm):
    wanted = lvlm().ask(picture(), QUESTION, max_new_tokens=2)
    assert lvlm().ask(picture(), QUESTION, max_new_tokens=2, return_dict_in_generate=True, output_scores=True) == wanted


def test_a_model_without_values_is_refused(lvlm):
    import copy

    import sightline as sl

    whole = lvlm()
    empty = LVLM(copy.deepcopy(whole.model).to("meta"), whole.processor, whole.host, "empty")
    said = "no values in its weights .device meta, for example .*sl.load"
    for use in (
        lambda: empty.ask(picture(), QUESTION),
        lambda: sl.look(picture(), QUESTION, model=empty),
        lambda: sl.attach(empty.model, System()),
    ):
        with pytest.raises(ModelError, match=said):
            use()
    part = LVLM(copy.deepcopy(whole.model), whole.processor, whole.host, "part")
    part.model.lm_head.to("meta")
    with pytest.raises(ModelError, match=r"for example lm_head\.weight"):
        part.ask(picture(), QUESTION)
    part.model.hf_device_map = {"": 0, "lm_head": "disk"}  # as accelerate notes what it brings in by need
    sl.attach(part.model, System()).close()

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.errors import InputError, ParameterError
from sightline.learn import conversation
from sightline.learn.conversation import IGNORED, Sample

TURNS = [("Is there a dog in the image?", "Yes."), ("What colour is it?", "It is red, naïve 犬.")]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=12)
PHRASES = st.lists(WORDS, min_size=1, max_size=3).map(" ".join).filter(lambda s: "<" not in s)


def supervised(ids, labels, tokenizer):
    return tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(PHRASES, PHRASES), min_size=1, max_size=3))
def test_supervised_tokens_decode_exactly_to_the_answers(toy_processor, turns):
    ids, labels = conversation.encode(turns, toy_processor, 16, stage=2)
    assert supervised(ids, labels, toy_processor.tokenizer) == "".join(f" {answer}</s>" for _, answer in turns)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    first = next(k for k, label in enumerate(labels) if label != IGNORED)
    assert toy_processor.tokenizer.decode(ids[:first]).endswith(f"\n{turns[0][0]} ASSISTANT:")


def test_tokens_equal_the_chat_template_of_the_processor(toy_processor):
    dialogue = []
    for k, (question, answer) in enumerate(TURNS):
        picture = [{"type": "image"}] if k == 0 else []
        dialogue += [{"role": "user", "content": [*picture, {"type": "text", "text": question}]},
                     {"role": "assistant", "content": [{"type": "text", "text": answer}]}]  # fmt: skip
    prompt = toy_processor.apply_chat_template(dialogue)
    expected = toy_processor(images=np.zeros((56, 56, 3), np.uint8), text=prompt)["input_ids"][0]
    assert conversation.encode(TURNS, toy_processor, 16, stage=2)[0] == list(expected)
    opening = toy_processor.apply_chat_template(dialogue[:1], add_generation_prompt=True)
    assert prompt.startswith(opening)
    assert prompt[len(opening) :].startswith(" Yes.</s>")


def test_stage_one_is_picture_and_caption_alone(toy_processor):
    ids, labels = conversation.encode([("ignored", "A red dog.")], toy_processor, 16, stage=1)
    assert supervised(ids, labels, toy_processor.tokenizer) == "A red dog.\n"
    assert ids[0] == toy_processor.tokenizer.bos_token_id
    assert ids[1:17] == [toy_processor.image_token_id] * 16
    assert "ignored" not in toy_processor.tokenizer.decode(ids)


def test_limit_cuts_ids_and_labels_alike(toy_processor):
    ids, labels = conversation.encode(TURNS, toy_processor, 16, stage=2, limit=30)
    assert len(ids) == len(labels) == 30


def record(*turns, **more):
    return {"id": "r", "conversations": [{"from": f, "value": v} for f, v in turns], **more}


def test_check_drops_a_leading_gpt_turn_and_the_picture_mark():
    row = record(("gpt", "Welcome."), ("human", "What is this?\n<image>"), ("gpt", "A cup."), image="a.png")
    assert conversation.check(row) == [("What is this?", "A cup.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (record(("human", "a")), "pairs"),
        (record(), "pairs"),
        (record(("human", "a"), ("human", "b")), "alternate"),
        (record(("human", "a"), ("gpt", " ")), "empty answer"),
        (record(("human", "a"), ("gpt", "<image>")), "human turns only"),
        (record(("human", "<image>a"), ("gpt", "b")), "1 <image> marks for 0"),
        (record(("human", "a"), ("gpt", "b"), image="x.png"), "0 <image> marks for 1"),
        (record(("human", "a"), ("gpt", "b"), ("human", "<image>"), ("gpt", "d"), image="x.png"), "first human turn"),
    ],
)
def test_check_names_what_is_wrong(row, message):
    with pytest.raises(InputError, match=message):
        conversation.check(row)


def test_check_wants_the_picture_file(tmp_path):
    row = record(("human", "<image>a"), ("gpt", "b"), image="gone.png")
    with pytest.raises(InputError, match=r"gone\.png"):
        conversation.check(row, tmp_path)


def test_collate_pads_right_and_never_supervises_padding():
    long, short = (
        Sample([0, 5, 6, 7], [IGNORED, IGNORED, 6, 7], None),
        Sample([0, 5], [IGNORED, 5], np.zeros((2, 2, 3))),
    )
    batch = conversation.collate([long, short], pad=2)
    assert batch["ids"].tolist() == [[0, 5, 6, 7], [0, 5, 2, 2]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 6, 7], [IGNORED, 5, IGNORED, IGNORED]]
    assert batch["pixels"].shape == (1, 2, 2, 3)
    assert "pixels" not in conversation.collate([long], pad=2)


def test_statistics_count_and_show_masks(toy_processor):
    sample = Sample(*conversation.encode(TURNS[:1], toy_processor, 16, stage=2), np.zeros((56, 56, 3)))
    facts = conversation.statistics([sample], toy_processor)
    assert facts["examples"] == ["<s>USER: <image>\nIs there a dog in the image? ASSISTANT:[[ Yes.</s>]]"]
    kept = sum(label != IGNORED for label in sample.labels)
    assert facts["supervised_percent"] == round(100 * kept / len(sample.ids), 2)
    assert facts["records"] == facts["image"] == 1
    with pytest.raises(ParameterError, match="no records"):
        conversation.statistics([], toy_processor)


def test_text_first_moves_the_picture_behind_the_first_question(toy_processor):
    """The same words, labels and picture; only the first question comes first, and later turns stay."""
    text = toy_processor.tokenizer
    ids, labels = conversation.encode(TURNS, toy_processor, 16, stage=2, text_first=True)
    plain, plain_labels = conversation.encode(TURNS, toy_processor, 16, stage=2)
    assert supervised(ids, labels, text) == supervised(plain, plain_labels, text)
    first = ids.index(toy_processor.image_token_id)
    assert ids[first : first + 16] == [toy_processor.image_token_id] * 16
    assert text.decode(ids[1:first]) == f"USER: {TURNS[0][0]}\n"
    assert text.decode(ids[first + 16 :]).startswith(" ASSISTANT: Yes.</s>USER: What colour is it? ASSISTANT:")
    same = conversation.encode(
        TURNS, toy_processor, 0, stage=2, text_first=True
    )  # without a picture there is one order
    assert same == conversation.encode(TURNS, toy_processor, 0, stage=2)

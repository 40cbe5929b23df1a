from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sightline.errors import InputError, ParameterError
from sightline.learn import conversation, instruct
from sightline.learn.data import scene_of
from sightline.learn.recipe import TOY, Plan


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def picture(k, processor):
    return instruct.picture_sample(*scene_of("instruct", k, TOY.seed, TOY.shape.image), TOY, processor)


@pytest.mark.parametrize(("stage", "parts"), [(1, {"multi_modal_projector"}),
                                              (2, {"multi_modal_projector", "language_model"})])  # fmt: skip
def test_a_stage_changes_only_what_it_trains(toy, toy_processor, tmp_path, stage, parts):
    before = state(toy.model)
    plan = Plan(3, 2, 1e-2, warmup=1)
    trainer = instruct.train(toy, toy_processor, lambda k: picture(k, toy_processor), stage,
                             plan, tmp_path, precision=None)  # fmt: skip
    assert trainer.step == 3
    assert {name.split(".")[0] for name in changed(toy.model, before)} == parts
    assert torch.equal(toy.lm_head.weight, toy.get_input_embeddings().weight)


def batch_of(samples, processor):
    return conversation.collate(samples, processor.tokenizer.pad_token_id)


def test_loss_is_that_of_the_models_own_forward(toy, toy_processor):
    sample = picture(3, toy_processor)
    batch = batch_of([sample], toy_processor)
    with torch.no_grad():
        mine, _ = instruct.loss_of(batch, toy)
        pixels = toy_processor.image_processor(sample.pixels, return_tensors="pt")["pixel_values"]
        theirs = toy(input_ids=batch["ids"], pixel_values=pixels, labels=batch["labels"],
                     attention_mask=torch.ones_like(batch["ids"])).loss  # fmt: skip
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_loss_does_not_depend_on_padding_or_batch_mates(toy, toy_processor):
    samples = [picture(k, toy_processor) for k in range(3)]
    weights = torch.tensor([sum(label != -100 for label in s.labels) for s in samples], dtype=torch.float)
    with torch.no_grad():
        alone = torch.stack([instruct.loss_of(batch_of([s], toy_processor), toy)[0] for s in samples])
        together = instruct.loss_of(batch_of(samples, toy_processor), toy)[0]
    assert len({len(s.ids) for s in samples}) > 1
    torch.testing.assert_close(together, (alone * weights).sum() / weights.sum(), atol=1e-5, rtol=1e-5)


def test_every_other_batch_of_settling_is_text_with_every_token_supervised(toy_processor):
    samples = [instruct.settle_sample(k, TOY, toy_processor) for k in range(8)]
    assert (TOY.text_every, TOY.settle.batch) == (2, 2)
    assert [s.pixels is None for s in samples] == [False, False, True, True] * 2
    for sample in samples:
        supervised = [label for label in sample.labels if label != conversation.IGNORED]
        assert (supervised == sample.ids) == (sample.pixels is None)
        assert (toy_processor.image_token_id in sample.ids) == (sample.pixels is not None)
    pictures = replace(TOY, text_every=0)
    assert all(instruct.settle_sample(k, pictures, toy_processor).pixels is not None for k in range(4))


def test_stage_1_refuses_records_without_a_picture(toy_processor, records):
    path, folder = records
    path = path.with_name("first.json")
    path.write_text(json.dumps([{**row, "conversations": row["conversations"][:2]}
                                for row in json.loads(records[0].read_text())]))  # fmt: skip
    with pytest.raises(InputError, match="record 'text' has no picture"):
        instruct.Records(path, folder, toy_processor, 1)


def test_records_of_a_file_are_shuffled_anew_each_epoch_and_keep_text_only(toy, toy_processor, records):
    path, folder = records
    data = instruct.Records(path, folder, toy_processor, 2, seed=1)
    first, second = [[data(4 * epoch + k).ids for k in range(4)] for epoch in (0, 1)]
    assert sorted(first) == sorted(second)
    assert [s.ids for s in map(data, range(4))] == first
    text = next(data(k) for k in range(4) if data(k).pixels is None)
    assert toy_processor.image_token_id not in text.ids
    with torch.no_grad():
        assert instruct.loss_of(batch_of([text], toy_processor), toy)[0].isfinite()
        assert instruct.loss_of(batch_of([data(k) for k in range(4)], toy_processor), toy)[0].isfinite()


def test_a_wide_picture_is_padded_to_a_square_of_the_mean_colour(toy_processor, records):
    path, folder = records
    pixels = instruct.Records(path, folder, toy_processor, 2).sample(2).pixels
    mean = [int(255 * v) for v in toy_processor.image_processor.image_mean]
    assert pixels.shape == (56, 56, 3)
    assert pixels[0, 28].tolist() == pixels[-1, 28].tolist() == mean
    assert np.abs(pixels[28, 28].astype(int) - mean).max() > 0


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "no records"), ("{", "cannot read"), ('{"a": 1}', "no records")]
)
def test_a_broken_file_is_refused(toy_processor, tmp_path, content, message):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(InputError, match=message):
        instruct.Records(tmp_path / "d.json", None, toy_processor, 2)


def test_pictures_need_a_folder_and_stage_one_single_answers(toy_processor, records, tmp_path):
    path, folder = records
    with pytest.raises(InputError, match="--images"):
        instruct.Records(path, None, toy_processor, 2)
    with pytest.raises(InputError, match="stage 1"):
        instruct.Records(path, folder, toy_processor, 1)
    (tmp_path / "one.json").write_text(json.dumps(json.loads(path.read_text())[:1]))
    assert len(instruct.Records(tmp_path / "one.json", folder, toy_processor, 1)) == 1


def test_there_is_no_stage_three(toy):
    with pytest.raises(ParameterError, match="stage=3"):
        instruct.freeze(toy, 3)

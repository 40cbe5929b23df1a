from __future__ import annotations

import numpy as np
import torch

from sightline import scenes
from sightline.learn import language, phrasing
from sightline.learn.recipe import TOY


def test_documents_are_a_function_of_their_index():
    texts = [language.document(k, TOY) for k in range(40)]
    assert texts == [language.document(k, TOY) for k in range(40)]
    assert len(set(texts)) == 40
    assert language.document(0, TOY) != language.document(0, TOY, "tokenizer")
    assert sum("ASSISTANT:" in text for text in texts) > 20
    assert all(text.endswith("</s>") for text in texts)


def test_samples_start_with_bos_and_fit(toy_processor):
    text = toy_processor.tokenizer
    for k in range(10):
        ids = language.sample(k, TOY, text)
        assert ids[0] == text.bos_token_id
        assert 2 <= len(ids) <= TOY.length
        assert text.bos_token_id not in ids[1:]


def test_any_text_survives_the_tokenizer(toy_processor):
    text = toy_processor.tokenizer
    for phrase in ("naïve 犬 🙂\tx", "  two  spaces ", "Is there a dog?"):
        assert text.decode(text(phrase, add_special_tokens=False)["input_ids"]) == phrase


def test_padding_carries_no_loss(toy):
    row = [0, 20, 30, 40, 50]
    with torch.no_grad():
        alone, _ = language.loss_of(language.collate([row], 2), toy, 2)
        padded, _ = language.loss_of(torch.nn.functional.pad(language.collate([row], 2), (0, 5), value=2), toy, 2)
    torch.testing.assert_close(alone, padded)


def test_lore_speaks_of_things_of_the_place():
    for seed in range(20):
        said = language.lore(np.random.default_rng(seed))
        place = next(name for name in scenes.CONTEXTS if name in said)
        assert set(scenes.mentions(said)) <= set(scenes.CONTEXTS[place].weights)


def test_paraphrases_keep_the_thing_asked_about():
    rng = np.random.default_rng(0)
    seen = set()
    for seed in range(30):
        for question in scenes.questions(scenes.draw(seed, size=56), rng, 8):
            text = phrasing.rephrase(question, rng)
            seen.add(text == question.text)
            assert scenes.mentions(text) == scenes.mentions(question.text)
            assert [c for c in scenes.COLOURS if c in text] == [c for c in scenes.COLOURS if c in question.text]
    assert seen == {True, False}

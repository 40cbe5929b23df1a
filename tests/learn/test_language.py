from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sightline import scenes
from sightline.learn import language, phrasing
from sightline.learn.recipe import TOY


def text(k, stage="language"):
    return language.text_of(language.document(k, TOY, stage))


def test_documents_are_a_function_of_their_index():
    texts = [text(k) for k in range(40)]
    assert texts == [text(k) for k in range(40)]
    assert len(set(texts)) == 40
    assert text(0) != text(0, "tokenizer")
    assert all(t.endswith("</s>") for t in texts)


def test_answers_are_marked_and_everything_else_is_not():
    told = 0
    for k in range(60):
        for piece, answer in language.document(k, TOY):
            assert not answer or (piece.startswith(" ") and piece.endswith("</s>"))
            assert answer or "ASSISTANT" not in piece or piece.endswith("ASSISTANT:")
            told += answer
    assert told > 400


def test_samples_start_with_bos_fit_and_weigh_answers_most(toy_processor):
    tokens = toy_processor.tokenizer
    for k in range(10):
        ids, weights = language.sample(k, TOY, tokens)
        assert ids[0] == tokens.bos_token_id
        assert 2 <= len(ids) == len(weights) <= TOY.length
        assert tokens.bos_token_id not in ids[1:]
        assert set(weights[1:]) <= {1.0, language.CHATTER}
    pieces = language.document(3, TOY)
    ids, weights = language.sample(3, replace(TOY, length=2000), tokens)
    answers = tokens.decode([i for i, w in zip(ids, weights, strict=True) if w == 1.0])
    assert answers == "".join(piece for piece, answer in pieces if answer)


def test_any_text_survives_the_tokenizer(toy_processor):
    text = toy_processor.tokenizer
    for phrase in ("naïve 犬 🙂\tx", "  two  spaces ", "Is there a dog?"):
        assert text.decode(text(phrase, add_special_tokens=False)["input_ids"]) == phrase


def test_padding_carries_no_loss(toy):
    ids, weights = language.collate([([0, 20, 30, 40, 50], [0, 1.0, 0.1, 1.0, 1.0])], 2)
    with torch.no_grad():
        alone, _ = language.loss_of((ids, weights), toy)
        pad = torch.nn.functional.pad
        padded, _ = language.loss_of((pad(ids, (0, 5), value=2), pad(weights, (0, 5))), toy)
    torch.testing.assert_close(alone, padded)


def test_loss_is_the_weighted_mean(toy):
    ids, weights = language.collate([([0, 20, 30], [0, 1.0, 0.1])], 2)
    with torch.no_grad():
        logits = toy(input_ids=ids).logits.log_softmax(-1)[0]
        loss, _ = language.loss_of((ids, weights), toy)
    torch.testing.assert_close(loss, -(logits[0, 20] + 0.1 * logits[1, 30]) / 1.1, atol=1e-5, rtol=1e-5)


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

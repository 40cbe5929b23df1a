from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from sightline.learn import build, naming
from sightline.learn.recipe import TOY


def test_words_are_those_of_running_text(toy_processor):
    text = toy_processor.tokenizer
    ids = naming.words(["dog", "cup"], text)
    assert [text.decode(word) for word in ids] == [" dog", " cup"]
    table = torch.arange(len(text), dtype=torch.float)[:, None]
    assert naming.meaning(ids, table)[0, 0] == sum(ids[0]) / len(ids[0])


def test_loss_is_zero_where_every_patch_is_named(toy, toy_processor):
    known = naming.vocabulary(toy_processor.tokenizer)
    batch = naming.collate([naming.sample(k, TOY) for k in range(2)])
    table = toy.get_input_embeddings().weight
    word = {key: naming.meaning(ids, table) for key, ids in known.items()}
    about, where, marked = build.rotations(32)
    left, right, top, bottom = word["sides"]
    seen = torch.zeros(2, 16, 32)
    for b, n in np.ndindex(2, 16):
        y, x = divmod(n, 4)
        kind, colour, mark = (int(batch[key][b, y, x]) for key in ("kind", "colour", "mark"))
        said = word["kinds"][kind - 1] + word["colours"][colour] if kind else word["places"][batch["context"][b]]
        spot = ((x + 0.5) / 4 - 0.5) * (right - left) + ((y + 0.5) / 4 - 0.5) * (bottom - top)
        seen[b, n] = word["picture"][0] + said @ about + 2.5 * spot @ where
        if mark:
            seen[b, n] += 2 * word["colours"][mark - 1] @ marked
    assert (batch["mark"] > 0).any()
    perfect = SimpleNamespace(
        get_input_embeddings=toy.get_input_embeddings,
        get_image_features=lambda pixel_values: SimpleNamespace(pooler_output=list(seen)),
    )
    with torch.no_grad():
        assert naming.loss_of(batch, perfect, known)[0] < 1e-10
        assert naming.loss_of(batch, toy, known)[0] > 0.5
        assert (
            naming.loss_of(batch, perfect, known)[1]["kind"] > 0.17
        )  # five times chance: 32 dimensions keep 29 words apart only so well


def test_a_fresh_decoder_looks_at_the_patches_that_a_word_names(toy, toy_processor):
    """Before any training: the product of a word's query and a patch's key, against other words' patches and the word."""
    table = toy.get_input_embeddings().weight.detach()
    words = naming.meaning(naming.vocabulary(toy_processor.tokenizer)["kinds"], table) * 10  # about unit size
    layer = toy.model.language_model.layers[0].self_attn
    patches = words @ build.rotations(32)[0]
    query, key, own = (f(x)[:, :16] for f, x in
                       ((layer.q_proj, words), (layer.k_proj, patches), (layer.k_proj, words)))  # fmt: skip
    named = (query * key).sum(-1).mean()
    assert named > 4 * (query @ key.T).mean().abs()
    assert named > 4 * (query * own).sum(-1).mean().abs()


def test_only_the_projector_learns(toy, toy_processor, tmp_path):
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    naming.train(toy, toy_processor.tokenizer, TOY, tmp_path, precision=None)
    changed = {name for name, value in toy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)


def test_a_fresh_tower_looks_at_what_is_alike(toy):
    layer = toy.model.vision_tower.encoder.layers[0].self_attn
    for head in range(2):
        rows = slice(head * 8, head * 8 + 8)
        product = layer.q_proj.weight[rows].T @ layer.k_proj.weight[rows]
        diagonal = product.diagonal().mean()
        assert diagonal > 3 * product.fill_diagonal_(0).mean().abs()  # near the identity
    assert (layer.out_proj.weight @ layer.v_proj.weight).trace() < 0


def test_positions_are_most_alike_between_neighbours():
    waves = build.waves(5, 16)
    middle = (waves @ waves[12]).reshape(5, 5)
    assert middle.argmax() == 12
    assert middle[2, 3] > middle[2, 4]
    assert middle[1, 2] > middle[0, 2]

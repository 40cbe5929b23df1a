"""Ranks of tokens: at which layer and step a word is within reach, and which words language alone would have said.

Logit lens: ranks in the head's scores of every layer.

    rank_{t,l}(w) = number of tokens whose score in head(H_l) exceeds that of w, at the position that predicts token t

VISTA's analysis: words for objects in the picture fall in rank as the answer grows, words that the picture grounds peak a
few layers before the last, function words in the last. Source: "The Hidden Life of Tokens", arXiv 2502.03628 (ICML 2025).

Base ranks: rank of every token of an answer in a language model that reads the same words without the picture. A token that it
ranks first is unshifted: seeing changed nothing, and a hallucination there is one of language. Source of this taxonomy, whose
classes are told apart in `causes`: VDGD, arXiv 2405.15683 (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sightline.engine.attach import attach
from sightline.engine.system import Site, System
from sightline.errors import InputError
from sightline.explain.observing import prompts
from sightline.explain.scoring import answer_ids, answered

if TYPE_CHECKING:
    from PIL import Image

    from sightline.lvlm import LVLM


class Ranks(System):
    """Ranks of tokens at every layer and step of a generation of one row; changes nothing. `found`: (L, n) per step."""

    def __init__(self, tokens: Sequence[int], *, norm: bool = False) -> None:
        self.tokens, self.norm = list(tokens), norm
        self.states: list[Tensor] = []
        self.found: list[Tensor] = []

    def output(self, site: Site, hidden: Tensor) -> None:
        self.states = [] if site.layer == 0 else self.states
        self.states.append(hidden[:1, -1])

    def logits(self, site: Site, logits: Tensor) -> None:
        scores = site.head(torch.cat(self.states[:-1]), norm=self.norm)  # (L - 1, V)
        scores = torch.cat([scores, logits[:1].to(scores.dtype)])  # the last layer's are the model's own
        self.found.append(ranks_of(scores, self.tokens))


def ranks_of(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """(..., V) scores -> (..., n) how many tokens score higher than each of `tokens`; 0 is the best."""
    return (scores[..., None, :] > scores[..., list(tokens), None]).sum(-1)


def token_ranks(
    lvlm: LVLM, image: Image.Image, question: str, words: Sequence[str], *, length: int = 64, norm: bool = False
) -> tuple[str, np.ndarray]:
    """Ranks of words at every step of the greedy answer and every layer.

    Args:
        words: each stands for the first of its tokens, as it follows a space.
        length: tokens of the answer at most. norm: norm the states before the head (the paper's code does not).

    Returns:
        The answer, and (T, L, n) int64.

    Raises:
        InputError: no words.
    """
    if not words:
        raise InputError("no words to rank: give at least one, for example the objects in the picture")
    inputs = prompts(lvlm, [image], [question])
    prompt, tokenizer = inputs["input_ids"], lvlm.processor.tokenizer
    system = Ranks([answer_ids(tokenizer, prompt[0], word)[0] for word in words], norm=norm)
    with torch.no_grad(), attach(lvlm.model, system, host=lvlm.host):
        made = lvlm.model.generate(**inputs, max_new_tokens=length, do_sample=False, num_beams=1)
    answer = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    return answer, torch.stack(system.found).cpu().numpy()


def base_ranks(
    lvlm: LVLM,
    image: Image.Image,
    question: str,
    answer: str | None = None,
    *,
    length: int = 64,
    base: Any = None,
) -> tuple[list[str], np.ndarray]:
    """Rank of every token of an answer without the picture, from 1 on; 1: language alone would have said it ("unshifted").

    Args:
        answer: what to look at; None: the model's own greedy answer of at most `length` tokens.
        base: a causal language model of transformers with the same vocabulary; None: the model itself.

    Returns:
        The tokens as text, and (T,) int64.

    Raises:
        InputError: the answer is empty, or the vocabulary of `base` is another one.
    """
    inputs = prompts(lvlm, [image], [question])
    tokenizer = lvlm.processor.tokenizer
    ids = answered(lvlm, inputs, answer, length)
    return [tokenizer.decode([i]) for i in ids], ranks_unseen(lvlm, inputs, ids, base)


def ranks_unseen(lvlm: LVLM, inputs: Any, ids: Sequence[int], base: Any = None) -> np.ndarray:
    """(T,) rank from 1 on of each of `ids` behind the one prompt in `inputs`, read without its pictures by `base`.

    Raises:
        InputError: the vocabulary of `base` is another one.
    """
    prompt = inputs["input_ids"]
    words = prompt[:, prompt[0] != getattr(lvlm.model.config, lvlm.host.image_token)]
    whole = torch.cat([words, torch.tensor([ids], dtype=words.dtype, device=words.device)], 1)
    base = lvlm.model if base is None else base
    size = base.config.get_text_config().vocab_size
    if int(whole.max()) >= size:
        raise InputError(f"base has a vocabulary of {size} tokens, the text holds token {int(whole.max())}")
    with torch.no_grad():
        logits = base(input_ids=whole, use_cache=False).logits[0, words.shape[1] - 1 : -1]  # (T, V)
    return ((logits > logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])).sum(-1) + 1).cpu().numpy()

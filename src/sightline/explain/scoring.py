"""Ask a batch of questions under some systems: greedy answers, and the log-probability of the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sightline.engine.attach import attach
from sightline.errors import InputError
from sightline.explain.observing import prompts

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sightline.engine.system import System
    from sightline.lvlm import LVLM

LENGTH = 6  # tokens of an answer that are read
TAIL = 6  # tokens of the prompt's end that decide how an answer is spelled


@dataclass(frozen=True)
class Reply:
    """A greedy answer, and the log-probability (nats) that the model gives to the true one."""

    text: str
    logprob: float


def ask(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    answers: Sequence[str],
    systems: Sequence[System] = (),
    *,
    length: int = LENGTH,
) -> list[Reply]:
    """Greedy answers of one batch, and log p(true answer | picture, question), summed over its tokens.

    Args:
        lvlm: a loaded model.
        images, questions: of equal length.
        answers: the true answers, as the model would spell them, without end mark: "Yes".
        systems: what is on the model meanwhile.
        length: tokens generated at most.
    """
    inputs = prompts(lvlm, images, questions)
    tokenizer, start = lvlm.processor.tokenizer, inputs["input_ids"].shape[1]
    truth = [answer_ids(tokenizer, row, text) for row, text in zip(inputs["input_ids"], answers, strict=True)]
    with attach(lvlm.model, *systems, host=lvlm.host):
        made = _generate(lvlm, inputs, max_new_tokens=length)
        replies = tokenizer.batch_decode(made.sequences[:, start:], skip_special_tokens=True)
        found = [_along(made, b, start, ids) for b, ids in enumerate(truth)]
        if None in found:  # the greedy answer left the true one before its end
            forced = _generate(
                lvlm, inputs, max_new_tokens=max(map(len, truth)), prefix_allowed_tokens_fn=_only(truth, start)
            )
            found = [
                _along(forced, b, start, ids) if p is None else p
                for b, (p, ids) in enumerate(zip(found, truth, strict=True))
            ]
    return [Reply(text.strip(), p) for text, p in zip(replies, found, strict=True)]


def answer_ids(tokenizer: Any, prompt: Tensor, answer: str) -> list[int]:
    """Tokens of `answer` as they follow the prompt: after a space, unless the prompt ends with white space."""
    tail = tokenizer.decode(prompt[-TAIL:].tolist())
    text = answer if tail[-1:].isspace() else f" {answer}"
    before = tokenizer(tail, add_special_tokens=False)["input_ids"]
    whole = tokenizer(tail + text, add_special_tokens=False)["input_ids"]
    if len(whole) > len(before) and whole[: len(before)] == before:
        return whole[len(before) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the border is inside a token


def answered(lvlm: LVLM, inputs: Any, answer: str | None, length: int) -> list[int]:
    """Tokens of `answer` behind the one prompt in `inputs`; None: the model's greedy answer of at most `length` tokens.

    Raises:
        InputError: the answer is empty.
    """
    prompt, tokenizer = inputs["input_ids"], lvlm.processor.tokenizer
    if answer is not None and not answer.strip():
        raise InputError(f"the answer {answer!r} has no tokens: give some text")
    if answer is not None:
        return answer_ids(tokenizer, prompt[0], answer)
    with torch.no_grad():
        made = lvlm.model.generate(**inputs, max_new_tokens=length, do_sample=False, num_beams=1)
    special = set(tokenizer.all_special_ids)
    ids = [i for i in made[0, prompt.shape[1] :].tolist() if i not in special]
    if not ids:
        raise InputError("the model answers nothing: give an answer")
    return ids


def _generate(lvlm: LVLM, inputs: Any, **options: Any) -> Any:
    with torch.no_grad():
        return lvlm.model.generate(
            **inputs, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True, **options
        )


def _along(made: Any, b: int, start: int, ids: Sequence[int]) -> float | None:
    """Log-probability of `ids` in row b, as far as the generated tokens agree; None when they leave it before its end."""
    total = 0.0
    for t, token in enumerate(ids):
        if t >= len(made.logits) or (t and int(made.sequences[b, start + t - 1]) != ids[t - 1]):
            return None
        total += float(made.logits[t][b].float().log_softmax(-1)[token])
    return total


def _only(truth: Sequence[Sequence[int]], start: int) -> Any:
    """For `prefix_allowed_tokens_fn`: only the next token of the row's own answer is allowed."""

    def allowed(b: int, ids: Tensor) -> list[int]:
        return [truth[b][min(len(ids) - start, len(truth[b]) - 1)]]

    return allowed

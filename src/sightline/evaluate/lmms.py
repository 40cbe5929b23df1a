"""A model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval, 0.7): every system on every task that it has.

    lmms_eval --model sightline --model_args pretrained=llava-hf/llava-1.5-7b-hf,with=var:p=0.4 --tasks pope --batch_size 8

lmms-eval finds `manifest` through the entry point group `lmms_eval.models`. Its chat form is used by default; tasks of the
type multiple_choice need the simple form (`--force_simple`). Pictures and text; videos and rounds are refused.

`loglikelihood` returns (mean negative log-likelihood per token of the continuation, whether greedy decoding gives it):
lmms-eval takes the choice with the least, as all its own models return it, though its base class speaks of a logprob.
The continuation is read in the same forward as the prompt, so systems that edit text rows edit its rows too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from rich.progress import track

from sightline.catalog import parse
from sightline.engine.passes import plans
from sightline.errors import InputError, ParameterError, nearest
from sightline.evaluate import ranks
from sightline.images import open_image
from sightline.lvlm import LVLM

KNOWN = ("pretrained", "with", "batch_size", "max_batch_size", "device", "dtype", "revision")
MAX_NEW_TOKENS = 1024
Conversation = list[dict[str, Any]]


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    here = f"{__name__}.Sightline"
    return ModelManifest("sightline", simple_class_path=here, chat_class_path=f"{here}Chat")


class Sightline(lmms):
    """The simple form: a text with pictures per request.

    Model arguments: pretrained (as `sl.load`; "tiny" by default), with (systems, as on the command line, ";" between
    parameters: var:p=0.4;tau=20), batch_size, device, dtype, revision.

    Raises:
        ParameterError: another argument, one out of range, or a system that asks the model several times.
        UnknownNameError: no such system.
    """

    is_simple = True

    def __init__(self, pretrained: str = "tiny", lvlm: LVLM | None = None, **options: Any) -> None:
        super().__init__()
        self.batch_size = _batch_size(options.get("batch_size", 1))
        wrong = [name for name in options if name not in KNOWN]
        if wrong:
            raise ParameterError(f"--model_args {wrong[0]}=...: {nearest(wrong[0], list(KNOWN))}")
        self.systems = tuple(parse(str(options.get("with", "none")).replace(";", ",")))
        if plans(self.systems):
            raise ParameterError(
                f"with={options['with']}: it asks the model several times, which lmms-eval does not offer"
            )
        device = options.get("device")
        if ranks.launched():
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
        if lvlm is None:
            from sightline.loading import load

            lvlm = load(pretrained, device=device, dtype=options.get("dtype"), revision=options.get("revision"))
        self.lvlm = lvlm

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.lvlm.device

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self.lvlm.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests; those with the same decoding are asked in batches."""
        found: dict[int, str] = {}
        prepared = [(_key(self._decoding(request)), k) for k, request in enumerate(requests)]
        batches = list(_batches(sorted(prepared), self.batch_size))
        for batch in track(batches, "answers", disable=self.rank != 0, transient=True):
            decoding = self._decoding(requests[batch[0]])
            texts = self._generate([self._conversation(requests[k]) for k in batch], decoding)
            for k, text in zip(batch, texts, strict=True):
                found[k] = text
                self.cache_hook.add_partial("generate_until", (requests[k].args[0], decoding), text)
        return [found[k] for k in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean negative log-likelihood per token, whether greedy decoding gives the continuation) per request."""
        return [
            self._likelihood(request) for request in track(requests, "choices", disable=self.rank != 0, transient=True)
        ]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises InputError: not offered."""
        raise InputError("tasks of several rounds are not offered by sightline: choose a task of type generate_until")

    # -- one request --------------------------------------------------------------------------------------------------

    def _decoding(self, request: Any) -> dict[str, Any]:
        return request.args[1]

    def _conversation(self, request: Any) -> Conversation:
        """(context, decoding or continuation, document -> pictures, document's number, task, split)"""
        context, _, to_visual, number, task, split = request.args
        visuals = to_visual(self.task_dict[task][split][number]) if to_visual is not None else []
        return [{"role": "user", "content": _content(context, visuals or [], str(self.lvlm.processor.image_token))}]

    def _generate(self, conversations: Sequence[Conversation], decoding: Mapping[str, Any]) -> list[str]:
        from sightline.engine.attach import attach

        batch = self.lvlm.encode(conversations)
        with attach(self.lvlm.model, *self.systems, host=self.lvlm.host), torch.inference_mode():
            made = self.lvlm.model.generate(**batch, **_options(decoding))
        texts = self.lvlm.processor.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        until = decoding.get("until") or []
        return [_cut(text, [until] if isinstance(until, str) else until).strip() for text in texts]

    def _likelihood(self, request: Any) -> tuple[float, bool]:
        from sightline.engine.attach import attach

        _, wanted, _, number, task, split = request.args
        text = wanted if isinstance(wanted, str) else wanted(self.task_dict[task][split][number])
        ids = self.tokenizer(str(text), add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.device)
        if not ids.numel():
            raise InputError(f"a choice of {task} has no tokens: {text!r}")
        batch = _extend(self.lvlm.encode([self._conversation(request)]), ids)
        with attach(self.lvlm.model, *self.systems, host=self.lvlm.host), torch.inference_mode():
            scores = self.lvlm.model(**batch, logits_to_keep=ids.shape[1] + 1).logits[0, :-1].float()  # (T, V)
        losses = torch.nn.functional.cross_entropy(scores, ids[0])
        return float(losses), bool((scores.argmax(-1) == ids[0]).all())


class SightlineChat(Sightline):
    """The chat form: messages of pictures and texts per request."""

    is_simple = False

    def _decoding(self, request: Any) -> dict[str, Any]:
        return request.args[2]

    def _conversation(self, request: Any) -> Conversation:
        """(context, document -> messages, decoding, document's number, task, split)"""
        _, to_messages, _, number, task, split = request.args
        messages = to_messages(self.task_dict[task][split][number])
        return [{"role": m["role"], "content": [_part(part) for part in _parts(m["content"])]} for m in messages]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises InputError: lmms-eval has such requests in its simple form only."""
        raise InputError("multiple_choice tasks are asked in the simple form: add --force_simple")


def _batch_size(value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ParameterError(f"batch_size={value!r} is out of range: choose a whole number from 1")
    return int(value)


def _key(decoding: Mapping[str, Any]) -> str:
    return json.dumps(decoding, sort_keys=True, default=str)


def _batches(keyed: Sequence[tuple[str, int]], size: int) -> Iterator[list[int]]:
    """Numbers of requests with the same decoding, at most `size` together."""
    for _, group in groupby(keyed, key=lambda pair: pair[0]):
        numbers = [k for _, k in group]
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _options(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """For `model.generate`: greedy unless the temperature is above 0."""
    options = {
        "max_new_tokens": decoding.get("max_new_tokens") or MAX_NEW_TOKENS,
        "num_beams": decoding.get("num_beams") or 1,
    }
    if (temperature := decoding.get("temperature") or 0) > 0:
        top = {"top_p": decoding["top_p"]} if decoding.get("top_p") is not None else {}
        return {**options, "do_sample": True, "temperature": temperature, **top}
    return {**options, "do_sample": False}


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def _content(text: str, visuals: Sequence[Any], placeholder: str) -> list[dict[str, Any]]:
    """Pictures where the text has placeholders for all of them, else before it."""
    pictures = [_picture(one) for one in visuals]
    for mark in (placeholder, "<image>"):
        pieces = text.split(mark)
        if pictures and len(pieces) == len(pictures) + 1:
            parts = [{"type": "text", "text": pieces[0]}]
            for picture, piece in zip(pictures, pieces[1:], strict=True):
                parts += [picture, {"type": "text", "text": piece}]
            return [part for part in parts if part["type"] == "image" or part["text"].strip()]
    return [*pictures, {"type": "text", "text": text}]


def _picture(one: Any) -> dict[str, Any]:
    return {"type": "image", "image": open_image(one)}


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return _picture(part["url"])
    raise InputError(f"a message holds {part['type']!r}: sightline answers about pictures and text only")


def _extend(batch: Any, ids: torch.Tensor) -> Any:
    """The inputs (1, L) with the continuation's `ids` (1, T) behind the prompt."""
    length = batch["input_ids"].shape
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.shape == length:  # ids, masks, token types
            more = ids if name == "input_ids" else torch.full_like(ids, int(name == "attention_mask"))
            batch[name] = torch.cat([value, more.to(value.dtype)], 1)
    return batch

"""The words and pictures behind a prompt, and how to make another prompt from it.

Token ids alone do not tell what was asked about which picture. What made the inputs (`LVLM.inputs`, or your own code) says
so with `note`; a system that needs another question or another picture gets it through `Prompt`, which has the host's own
processor make the new inputs. Nothing is kept longer than the inputs themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sightline.engine.prefix import ALONG, Prefix
from sightline.engine.tokens import Role
from sightline.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from sightline.engine.tokens import Tokens


CACHES = {"cache", "past_key_values"}  # the name of the argument, since transformers 5.24 and before


@dataclass(frozen=True)
class Note:
    """What a batch of inputs was made from."""

    inputs: Mapping[str, Any] = field(repr=False)
    pictures: tuple[tuple[Image, ...], ...]  # per row
    questions: tuple[str, ...]
    processor: Any = field(repr=False)
    again: Callable[[list[list[Image]], list[str]], Mapping[str, Any]] = field(repr=False)  # the same for other ones


_notes = WeakIdKeyDictionary()  # input ids -> Note without its inputs' own strong hold


def note(
    inputs: Mapping[str, Any],
    pictures: Sequence[Sequence[Image]],
    questions: Sequence[str],
    *,
    processor: Any,
    again: Callable[[list[list[Image]], list[str]], Mapping[str, Any]],
) -> None:
    """Remember what made `inputs`, as long as their `input_ids` live. `sightline.load(...).inputs` does it by itself.

    Args:
        inputs: of the model, with "input_ids" (B, N).
        pictures, questions: B rows.
        processor: what made them.
        again: makes such inputs, padded on the left, from other pictures and questions.
    """
    kept = {k: v for k, v in inputs.items() if k != "input_ids"}
    rows = tuple(tuple(row) for row in pictures)
    _notes[inputs["input_ids"]] = Note(kept, rows, tuple(questions), processor, again)


def noted(ids: Tensor, pixels: Tensor | None = None) -> tuple[Note, int] | None:
    """The note of a prompt, by content, and how often each of its rows stands there (beams); None: unknown.

    Args:
        ids: (B, N) token ids.
        pixels: pixel values that were encoded for it; None: not known, so that the latest note of these ids is meant.
    """
    for known in reversed(list(_notes.keys())):
        repeats, rest = divmod(ids.shape[0], known.shape[0])
        if rest or known.shape[1] != ids.shape[1]:
            continue
        if not torch.equal(known.to(ids.device).repeat_interleave(repeats, 0), ids):
            continue
        own = _notes[known].inputs.get("pixel_values")
        if own is None or pixels is None or (own.shape == pixels.shape and torch.equal(_as(own, pixels), pixels)):
            return _notes[known], repeats
    return None


def _as(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.device, other.dtype)


@dataclass(frozen=True)
class Prompt:
    """The prompt that the model has just read, B rows (beams already expanded), as a system may use it."""

    model: nn.Module
    given: Mapping[str, Any]  # arguments of its forward
    tokens: Tokens  # its ledger before any cut
    pixels: Tensor | None  # that were encoded for it, where known
    reuse: bool  # encoded pictures may serve another prompt, for no system acts in the tower
    prefix: Prefix | None = None  # its cache, where other prompts about the same pictures may go on from it
    _same: list[Tensor] = field(default_factory=list, repr=False)  # ids of other prompts about the same pictures

    @property
    def note(self) -> Note:
        """What it was made from. InputError, with the mend, when nobody said."""
        return self._noted[0]

    @property
    def repeats(self) -> int:
        """Rows of this batch per row of the note."""
        return self._noted[1]

    @cached_property
    def _noted(self) -> tuple[Note, int]:
        found = noted(self.given["input_ids"], self.pixels)
        if found is None:
            raise InputError(
                "this system needs the words and pictures of the prompt, and token ids do not tell them: make the inputs "
                "with sightline.load(...).inputs(images, questions), or tell them with "
                "sightline.engine.prompts.note(inputs, pictures, questions, processor=..., again=...)"
            )
        return found

    def ask(self, questions: Sequence[str], pictures: Sequence[Sequence[Image]] | None = None) -> dict[str, Any]:
        """Arguments of `generate` for other questions, and other pictures when given, in the rows of the note."""
        note = self.note
        inputs = dict(note.again([list(row) for row in pictures or note.pictures], list(questions)))
        encoded = self.given.get("mm_encoder_outputs")
        if pictures is None and self.reuse and self.repeats == 1 and encoded and encoded.get("image") is not None:
            inputs.pop("pixel_values", None)
            inputs["mm_encoder_outputs"] = {"image": encoded["image"]}
        inputs = {k: _like(v, self.given["input_ids"].device, self.model.dtype) for k, v in inputs.items()}
        if pictures is None:
            self._same.append(inputs["input_ids"])
        return inputs

    def blind(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` for the words of inputs of `ask` alone; a host's own markers around pictures stay."""
        ids = inputs["input_ids"]
        places = self.given["input_ids"][self.tokens.visual].unique()
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool() & ~torch.isin(ids, places)
        columns = real.int().argsort(dim=1, stable=True)[
            :, -int(real.sum(1).max()) :
        ]  # padding, then the words in order
        kept = real.gather(1, columns)
        words = ids.gather(1, columns).masked_fill(~kept, self._pad_token())
        return {"input_ids": words, "attention_mask": kept.long()}

    def begun(self, inputs: Mapping[str, Any], copies: int = 1) -> dict[str, Any] | None:
        """Arguments of `generate` for inputs of `ask`, every row `copies` times, that need not be read from their start."""
        if self.prefix is None or not any(inputs["input_ids"] is ids for ids in self._same):
            return None
        return self.prefix.resume(self.model, inputs, copies)

    def pick(self, columns: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of `generate` for the same prompt with some tokens only.

        Args:
            columns: per row (n,) columns to keep, in their new order; visual tokens take their encoded picture along.
        """
        visual = self.tokens.visual
        number = visual.flatten().int().cumsum(0).view_as(visual) - 1  # place of every visual token in the whole batch
        longest = max(len(c) for c in columns)
        inputs = {}
        real = (self.tokens.role != int(Role.PAD)).long()
        for name in ALONG:
            value = real if name == "attention_mask" else self.given.get(name)
            if value is not None:
                rows = zip(value, columns, strict=True)
                inputs[name] = torch.stack([F.pad(v[c], (longest - len(c), 0)) for v, c in rows])
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self._pad_token())
        order = [number[b, c[visual[b, c]]] for b, c in enumerate(columns)]
        if any(len(row) for row in order):
            inputs["mm_encoder_outputs"] = {"image": self._encoded([row for row in order if len(row)])}
        return inputs

    def _encoded(self, order: list[Tensor]) -> Any:
        """The encoded pictures of visual tokens, row by row, in the form in which the host keeps them."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features = self.encode().pooler_output
        listed = isinstance(features, (list, tuple))
        flat = torch.cat(list(features)) if listed else features.flatten(0, -2)  # (visual tokens, D)
        return BaseModelOutputWithPooling(
            pooler_output=[flat[row] for row in order] if listed else flat[torch.cat(order)]
        )

    def encode(self) -> Any:
        """The host's encoded pictures: what `generate` gave the forward, or computed again."""
        encoded = self.given.get("mm_encoder_outputs")
        if encoded and encoded.get("image") is not None:
            return encoded["image"]
        encoder = self.model.base_model.get_image_features
        names = [n for n in signature(encoder).parameters if self.given.get(n) is not None]
        with torch.no_grad():
            return encoder(**{n: self.given[n] for n in names}, return_dict=True)

    def write(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[list[str], list[Tensor]]:
        """What the model answers, greedily, to inputs of `ask`: per row its text and its raw logits (n, V).

        Args:
            weigh: makes of the scores (B, V) of every token those that it is chosen by.
        """
        inputs = self.begun(inputs) or inputs
        out = generate(self.model, inputs, max_new_tokens=max_new_tokens, weigh=weigh)
        ids = out.sequences[:, -len(out.logits) :]  # (B, T)
        ends = self.model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=ids.device, dtype=ids.dtype).view(-1)
        length = (torch.isin(ids, ends).int().cumsum(1) == 0).sum(1).tolist()
        logits = torch.stack(out.logits, 1)
        texts = self.note.processor.tokenizer.batch_decode(
            [row[:n] for row, n in zip(ids, length, strict=True)], skip_special_tokens=True
        )
        return [t.strip() for t in texts], [row[:n] for row, n in zip(logits, length, strict=True)]

    def read(self, inputs: Mapping[str, Any], text: str) -> tuple[list[str], list[Tensor]]:
        """What the model scores while it is made to write a given text after inputs of `ask`: as `write`."""
        tokenizer, rows = self.note.processor.tokenizer, inputs["input_ids"].shape[0]
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].expand(rows, -1)
        forced = ids.to(inputs["input_ids"].device)
        out = generate(self.model, self.begun(inputs) or inputs, max_new_tokens=ids.shape[1], forced=forced)
        return [text] * rows, list(torch.stack(out.logits, 1))

    def scores(self, inputs: Mapping[str, Any]) -> Tensor:
        """(B, V) raw logits of the next token behind inputs of `ask`."""
        return generate(self.model, inputs, max_new_tokens=1).logits[0]

    def _pad_token(self) -> int:
        for config in (getattr(self.model, "generation_config", None), self.model.config.get_text_config()):
            found = getattr(config, "pad_token_id", None)
            if found is not None:
                return int(found)
        return 0


class _Forced:
    """A logits processor that lets only the next token of a given text (B, T) through, and anything behind it."""

    def __init__(self, text: Tensor, start: int) -> None:
        self.text, self.start = text, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - self.start
        if step >= self.text.shape[1]:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(1, self.text[:, step : step + 1], 0.0)


def generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    copies: int = 1,
    forced: Tensor | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Generation with a cache of its own and raw logits, whatever the model's own configuration says.

    Args:
        copies: how often every row is read; with more than one the new tokens are drawn, else they are the likeliest.
        forced: (B, T) token ids to write instead, ends and all.
        weigh: makes of every token's scores (B, V) those that it is chosen by; the raw ones are returned all the same.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=copies > 1,
        num_beams=1,
        num_return_sequences=copies,
        use_cache=True,
        cache_implementation=None if CACHES & inputs.keys() else "dynamic",
        return_dict_in_generate=True,
        output_logits=True,
    )
    chosen = [] if weigh is None else [lambda ids, scores: weigh(scores)]
    if forced is not None:
        chosen.append(_Forced(forced, inputs["input_ids"].shape[1]))
        config.eos_token_id = 2**31 - 1  # no token: nothing ends before the text does
    devices = [inputs["input_ids"].device] if inputs["input_ids"].is_cuda else []
    with torch.random.fork_rng(devices, enabled=copies > 1):  # the caller's draws stay as they were
        return model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList(chosen))


def _like(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)

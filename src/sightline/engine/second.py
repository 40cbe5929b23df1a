"""Second streams: the same answer, read under another prompt, so that a system can weigh the two next-token scores.

A system that overrides `second` gets a second stream: its own prompt, its own cache, and from then on every token that the
first stream takes. The stream lives on the first stream's cache like all memory of a sequence: beams reorder it, a copy
copies it, and it dies with it. The first forward of a prompt runs the second prompt through the model's own `generate`
(one token), so that the host itself prepares positions, masks and pictures. Where nothing stands against it, later tokens
go through the model once for both streams (`joined`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sightline.engine import joined
from sightline.engine.prefix import Prefix, counted, plain_cache
from sightline.engine.prompts import Prompt, generate
from sightline.engine.sequences import KEY, Sequence, given_cache, made_cache, padding_mask
from sightline.engine.tokens import Role
from sightline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.attach import Attachment

TOWER = {"pixels", "vision_hidden", "vision_attention"}


@dataclass
class Stream:
    """One second stream. B rows; N tokens in its prompt."""

    inputs: Mapping[str, Any] = field(repr=False)  # of its prompt, for generation without cache
    repeats: int  # rows of the first stream per row of `inputs`
    cache: Any = None  # None: without cache, or joined to the first stream's
    mask: Tensor | None = None  # (B, N) of what it has read; None: no padding. Joined: (2 B, N) of both
    position: Tensor | None = None  # (..., B, 1) of the first token after the prompt
    length: int = 0  # N
    shift: int = 0  # joined: columns before its prompt
    scores: Tensor | None = None  # (B, V) of a joined forward
    sequence: Sequence | None = field(default=None, repr=False)  # joined: what its cache carried

    def __deepcopy__(self, memo: dict) -> Stream:
        found = copy.copy(self)
        found.cache, found.sequence = copy.deepcopy((self.cache, self.sequence), memo)
        return found


class SecondStreams:
    """Runs the second streams of one attachment."""

    def __init__(self, owner: Attachment) -> None:
        self.owner = owner
        self.running = False  # a second stream's forward is on its way

    # -- one forward for both ---------------------------------------------------------------------------------------

    def join(self, sequence: Sequence, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that change for one forward of both streams, where they fit into one; else nothing."""
        cache = given_cache(kwargs)
        if self.running or len(sequence.seconds) != 1 or cache is None:
            return {}
        (stream,) = sequence.seconds.values()
        alone = all(w.stations <= TOWER | {"second"} for w in self.owner.workers)
        if not (alone and not args and joined.fits(stream, cache, kwargs)):
            joined.split(sequence, stream, cache)
            return {}
        if cache not in joined.caches:
            joined.join(sequence, stream, cache)
        return joined.arguments(sequence, stream, cache, kwargs)

    def part(self, sequence: Sequence, output: Any) -> None:
        """Leave the first stream's rows in the output of a joined forward."""
        for stream in sequence.seconds.values():
            rows = sequence.tokens.shape[0]
            if output.logits.shape[0] == 2 * rows:
                stream.scores, output.logits = output.logits[rows:, -1].float(), output.logits[:rows]

    def close(self) -> None:
        """Every cache holds its own stream only, and does what it always did."""
        for cache in list(joined.caches):
            self.part_caches(cache)

    def part_caches(self, cache: Any) -> None:
        """Take a joined cache apart, so that it counts its own stream's tokens; any other is left alone."""
        sequence = getattr(cache, KEY, None)
        if sequence is not None and sequence.owner is self.owner:
            for stream in sequence.seconds.values():
                joined.split(sequence, stream, cache)

    # -- the scores of the second ------------------------------------------------------------------------------------

    def weigh(self, sequence: Sequence, given: Mapping[str, Any], logits: Tensor, cache: Any) -> Tensor | None:
        """The scores (B, N, V) of a forward after every system that has a second stream; None when none has."""
        if not any("second" in worker.stations for worker in self.owner.workers):
            return None
        at = last_real(given.get("attention_mask"), given.get("input_ids"), logits.shape[1])
        rows = torch.arange(logits.shape[0], device=logits.device)
        first, new = (logits[:, -1] if at is None else logits[rows, at]), None
        for i, worker in enumerate(self.owner.workers):
            if "second" in worker.stations:
                second = self._second(i, sequence, given, cache, logits.shape[0])
                if second is not None:
                    new = (first if new is None else new).float()
                    new = worker.system.contrast(self.owner.site(i), new, second)
        if new is None:
            return None
        if at is None:
            return torch.cat([logits[:, :-1], new[:, None].to(logits.dtype)], 1)
        return logits.index_put((rows, at), new.to(logits.dtype))

    def _second(
        self, worker: int, sequence: Sequence, given: Mapping[str, Any], cache: Any, rows: int
    ) -> Tensor | None:
        """(B, V) fp32 scores of the next token in the second stream of a worker; None when it has none."""
        ids = given.get("input_ids")
        if sequence.step == 0 and ids is not None and sequence.tokens.shape[1] <= ids.shape[1]:  # from its start
            if ids.shape[1] == 1:  # no prompt: the branch without it that `guidance_scale` adds
                return None
            return self._begin(worker, sequence, given, cache, rows)
        stream = sequence.seconds.get(worker)
        if stream is None:
            return None
        if stream.scores is not None:
            scores, stream.scores = stream.scores, None
            return scores
        if ids is None:
            raise InputError("a second stream needs token ids: give input_ids, not inputs_embeds")
        if stream.cache is None:
            return self._again(stream, ids[:, sequence.prompt.shape[1] :])
        if sequence.prefill and bool(sequence.tokens.visual[:, -sequence.queries :].any()):
            raise InputError(
                "a second stream cannot take further pictures: give all pictures of a conversation in one prompt, and read "
                "it in one piece (no prefill_chunk_size)"
            )
        return self._go_on(stream, ids, sequence)

    def _begin(self, worker: int, sequence: Sequence, given: Mapping[str, Any], cache: Any, rows: int) -> Tensor | None:
        owner = self.owner
        changed = any(w.stations & (TOWER | {"visual_tokens"}) for w in owner.workers)
        tokens = owner.sequences.ledger(given, given["input_ids"], padding_mask(given, 0))
        pixels = None if sequence.pictures is None else sequence.pictures.pixels
        prompt = Prompt(owner.model, given, tokens, pixels, not changed, self._prefix(sequence, given, cache))
        site = owner.site(worker)
        with self._aside():
            inputs = owner.workers[worker].system.second(site, prompt)
        if inputs is None:
            return None
        logits, stream = self._read(prompt, inputs, rows // inputs["input_ids"].shape[0], cached=cache is not None)
        sequence.seconds[worker] = stream
        if cache is not None:
            cache.reorder_cache, cache.crop = _Both(cache, "reorder_cache"), _Both(cache, "crop")
        return logits

    def _prefix(self, sequence: Sequence, given: Mapping[str, Any], cache: Any) -> Prefix | None:
        """The prompt just read as a beginning of others, where nothing in the model tells the two streams apart."""
        ids, real = given["input_ids"], sequence.tokens.role != int(Role.PAD)
        if not all(w.stations <= {"second"} for w in self.owner.workers):
            return None
        if not plain_cache(cache) or cache.get_seq_length() != ids.shape[1] or not bool(real[:, -1].all()):
            return None
        if not counted(given.get("position_ids"), real):
            return None
        places = {self.owner.sequences.image_token, self.owner.sequences.video_token} - {None}
        return Prefix(ids, sequence, cache, frozenset(places))

    def _read(self, prompt: Prompt, inputs: Mapping[str, Any], repeats: int, cached: bool) -> tuple[Tensor, Stream]:
        """Read a whole prompt, every row `repeats` times."""
        stream = Stream(inputs, repeats)
        with self._aside(), torch.no_grad():
            begun = prompt.begun(inputs, repeats) if cached else None
            read, copies = (inputs, repeats) if begun is None else (begun, 1)
            out = generate(self.owner.model, read, max_new_tokens=1, copies=copies)
            position = self.owner.given.get("position_ids")
        if cached:
            mask = read.get("attention_mask")
            stream.cache, stream.length = made_cache(out), read["input_ids"].shape[1]
            stream.position = None if position is None else position[..., -1:] + 1  # (..., B, 1)
            if mask is not None and not bool(mask.all()):
                stream.mask = mask.repeat_interleave(copies, 0)
        return out.logits[0].float(), stream

    def _again(self, stream: Stream, new: Tensor) -> Tensor:
        """Without cache: the whole prompt once more, made to answer what was generated so far, (B, T)."""
        with self._aside(), torch.no_grad():
            count = new.shape[1] + 1
            out = generate(self.owner.model, stream.inputs, max_new_tokens=count, copies=stream.repeats, forced=new)
        return out.logits[-1].float()

    def _go_on(self, stream: Stream, ids: Tensor, sequence: Sequence) -> Tensor:
        """Read the block that the first stream has just read."""
        model = self.owner.model
        known = signature(model.forward).parameters
        past, block = stream.cache.get_seq_length(), ids.shape[1]
        kwargs: dict[str, Any] = {"input_ids": ids, "use_cache": True, "return_dict": True}
        kwargs["cache" if "cache" in known else "past_key_values"] = stream.cache
        if "logits_to_keep" in known:
            kwargs["logits_to_keep"] = 1
        if sequence.prefill:
            self._widen(stream, past, sequence)
        if stream.mask is not None:
            kwargs["attention_mask"] = F.pad(stream.mask, (0, past + block - stream.mask.shape[1]), value=1)
        if stream.position is not None:
            steps = torch.arange(block, device=ids.device)
            kwargs["position_ids"] = stream.position + (past - stream.length) + steps
        with self._aside(), torch.no_grad():
            return model(**kwargs).logits[:, -1].float()

    def _widen(self, stream: Stream, past: int, sequence: Sequence) -> None:
        """A later block of text may be padded (a conversation goes on): remember where."""
        real = sequence.tokens.role[:, -sequence.queries :] != int(Role.PAD)  # (B, Q)
        if stream.mask is None and not bool(real.all()):
            stream.mask = torch.ones(real.shape[0], past, device=real.device, dtype=torch.long)
        if stream.mask is not None:
            so_far = F.pad(stream.mask, (0, past - stream.mask.shape[1]), value=1)
            stream.mask = torch.cat([so_far, real.to(so_far.dtype)], 1)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """While a second stream runs, what the engine knows of the first is put aside."""
        owner, sequences = self.owner, self.owner.sequences
        kept = sequences.current, sequences._uncached, owner.vision_states, owner.given, self.running
        pictures, owner.front.waiting = owner.front.waiting, None
        modules = [m for m in (owner.model, owner.model.base_model) if "rope_deltas" in m.__dict__]
        deltas = [m.rope_deltas for m in modules]
        sequences.current, sequences._uncached, owner.vision_states = None, None, [{} for _ in owner.systems]
        self.running = True
        try:
            yield
        finally:
            sequences.current, sequences._uncached, owner.vision_states, owner.given, self.running = kept
            owner.front.waiting = pictures
            for module, value in zip(
                modules, deltas, strict=True
            ):  # Qwen-VL keeps the last prompt's offset on the model
                module.rope_deltas = value


def last_real(mask: Any, ids: Tensor | None, scored: int) -> Tensor | None:
    """(B,) the last column of every row that is not padding; None when that is the last column of all."""
    if ids is None or not isinstance(mask, torch.Tensor) or ids.shape[1] == 1 or mask.shape != ids.shape:
        return None
    if scored != ids.shape[1] or bool(mask[:, -1].all()):
        return None
    return torch.where(mask.bool(), torch.arange(scored, device=mask.device), 0).amax(1)


class _Both:
    """An operation on a cache that the caches of its second streams follow. It is copied with the cache.

    It hangs on the cache, so it must not keep it alive: keys and values would stay until the garbage collector comes.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self._cache, self.name = weakref.ref(cache), name

    @property
    def cache(self) -> Any:
        return self._cache()

    def __deepcopy__(self, memo: dict) -> _Both:
        found = _Both(copy.deepcopy(self.cache, memo), self.name)
        if self.cache in joined.caches:
            joined.caches.add(found.cache)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache, streams = self.cache, getattr(self.cache, KEY).seconds.values()
        before = int(cache.get_seq_length())
        if self.name == "reorder_cache" and cache in joined.caches:
            order = args[0] if args else kwargs["beam_idx"]
            args, kwargs = (torch.cat([order, order + order.shape[0]]),), {}
        found = getattr(type(cache), self.name)(cache, *args, **kwargs)
        if self.name == "crop":  # as many tokens less, wherever the prompt of the stream ends
            args, kwargs = (int(cache.get_seq_length()) - before,), {}
        for stream in streams:
            if stream.cache is not None:
                getattr(stream.cache, self.name)(*args, **kwargs)
        return found

"""Which sequence a forward belongs to, and its ledger.

State belongs to a cache: classifier-free guidance and contrastive decoding run two sequences in turn on one model, each
with its own cache. The sequence is kept as an attribute of the cache object, so it lives, is copied and dies with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sightline.engine.cuts import Cuts
from sightline.engine.entry import Cut, later
from sightline.engine.tokens import Role, Tokens
from sightline.errors import AttachError, warn

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.attach import Attachment
    from sightline.engine.pictures import Pictures
    from sightline.engine.second import Stream

KEY = "_sightline"
IGNORED = -100  # transformers' label of what is not learnt


@dataclass
class Sequence:
    """One batch of sequences on its way through the model."""

    tokens: Tokens
    states: list[dict[Any, Any]]  # per system
    owner: Attachment
    cuts: Cuts  # what every layer sees of it
    queries: int = 0  # of the block now running
    labels: Tensor | None = field(default=None, repr=False)  # (B, Q) of the block now running, in training
    prefill: bool = True
    step: int = -1
    prompt: Tensor | None = field(default=None, repr=False)  # (B, N) ids of the prompt, only kept without a cache
    pictures: Pictures | None = None  # of its last block with pictures
    cut: Cut | None = None  # set when its prompt was shortened before the decoder
    stream: str = ""  # an extra run of a prompt ("text", "plain"); "" for what the caller asked for
    masks: dict[Any, Any] = field(default_factory=dict, repr=False)  # masks made in the forward now running
    shift: int = 0  # columns that joining a second stream put before it in the cache
    second: bool = False  # it is the second stream of a system
    seconds: dict[int, Stream] = field(default_factory=dict)  # worker -> its second stream

    @property
    def labels_here(self) -> Tensor | None:
        """(B, Q) labels of the block now running, as it is after a cut before the decoder."""
        labels = self.labels
        if labels is None or labels.shape[1] == self.queries:
            return labels
        column = self.tokens.position[:, -self.queries :].long() - (self.tokens.shape[1] - self.queries)
        return labels.gather(1, column.clamp(0, labels.shape[1] - 1)).masked_fill(column < 0, -100)

    def __deepcopy__(self, memo: dict) -> Sequence:  # a copied cache continues on its own, on the same attachment
        new = replace(self, states=[dict(s) for s in self.states], cuts=self.cuts.copy())
        memo[id(self)] = new
        new.seconds = copy.deepcopy(self.seconds, memo)
        return new


class Sequences:
    """The sequences of one attachment."""

    def __init__(self, owner: Attachment, image_token: int | None, video_token: int | None = None) -> None:
        self.owner = owner
        self.image_token = -1 if image_token is None else image_token
        self.video_token = video_token
        self.current: Sequence | None = None
        self._uncached: Sequence | None = None

    def begin(self, given: dict[str, Any]) -> None:
        """A forward of the top model starts: find or make its sequence and bring the ledger up to date."""
        ids, cache = given.get("input_ids"), given_cache(given)
        known = getattr(cache, KEY, None)
        past = _past(cache, known, ids) - (known.shift if known is not None else 0)
        mask = padding_mask(given, past)
        if ids is None:
            if past == 0 or known is None:
                raise AttachError(
                    "a prompt came as inputs_embeds: give input_ids, so that image tokens can be told from text"
                )
            ids = given["inputs_embeds"].new_full(given["inputs_embeds"].shape[:2], -2, dtype=torch.long)
        start = past == 0
        sequence = self._start(given, ids, mask, cache) if start else self._continue(given, known, ids, mask, past)
        sequence.queries = ids.shape[1]
        sequence.labels = given.get("labels")
        if sequence.prefill:
            self.owner.front.take(sequence)
        sequence.step += 1
        sequence.masks = {}
        if cache is not None:
            setattr(cache, KEY, sequence)
        self.current = sequence

    def ledger(self, given: dict[str, Any], ids: Tensor, mask: Tensor | None) -> Tokens:
        """The ledger of a prompt by itself, before any cut."""
        counts = self._counts(given, ids)
        return Tokens.from_ids(ids, self.image_token, _fit(mask, ids), counts=counts, **self._video(given))

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of this forward that must be other than the caller's, whose prompt was longer."""
        sequence = self.current
        if sequence.cut is None or sequence.tokens.shape[1] == sequence.queries:
            return {}
        return later(given, sequence.tokens, sequence.queries, sequence.cut)

    def finish(self, output: Any) -> Sequence | None:
        """The forward is over: the cache it made carries the sequence from now on."""
        sequence = self.current
        cache = made_cache(output)
        if sequence is not None:
            sequence.masks = {}
            if cache is not None:
                setattr(cache, KEY, sequence)
        self.current = None
        return sequence

    def _start(self, given: dict[str, Any], ids: Tensor, mask: Tensor | None, cache: Any) -> Sequence:
        counts = self._counts(given, ids)
        video = self._video(given)
        uncached = cache is None and given.get("use_cache") is False
        old = self._uncached if uncached else None
        if old is not None and _repeats(old.prompt, ids):  # generation without cache: the prompt and what came after it
            tokens = Tokens.from_ids(
                ids, self.image_token, _fit(mask, ids), prompt=old.prompt.shape[1], counts=counts, **video
            )
            old.tokens, old.cuts = tokens, self.uncut()
            return old
        tokens = Tokens.from_ids(ids, self.image_token, _fit(mask, ids), counts=counts, **video)
        labels = given.get("labels")
        if labels is not None and labels.shape == ids.shape:
            tokens = tokens.answered(labels != IGNORED)
        states = self.owner.vision_states
        self.owner.vision_states = [{} for _ in states]
        second, prompt = self.owner.second_streams.running, ids if uncached else None
        sequence = Sequence(tokens, states, self.owner, self.uncut(), prompt=prompt, second=second)
        self._uncached = sequence if uncached else None
        return sequence

    def _counts(self, given: dict[str, Any], ids: Tensor) -> list[int] | None:
        """Visual tokens of every image of the batch; None where only the runs of placeholders can tell."""
        count = getattr(self.owner.host, "image_counts", None)
        found = None if count is None else count(self.owner.model, given, ids)
        found = _encoded_counts(given) if found is None else found
        return None if found is None or sum(found) != int((ids == self.image_token).sum()) else found

    def _video(self, given: dict[str, Any]) -> dict[str, Any]:
        """How the ledger tells the frames of videos apart, as arguments of `Tokens.from_ids`."""
        count = getattr(self.owner.host, "frame_counts", None)
        if self.video_token is None or count is None:
            return {"video_token": self.video_token}
        return {"video_token": self.video_token, "frame_counts": partial(count, self.owner.model.config, given)}

    def _continue(
        self, given: dict[str, Any], known: Sequence | None, ids: Tensor, mask: Tensor | None, past: int
    ) -> Sequence:
        if known is None:
            warn(
                "a cache filled before the systems were attached: its positions count as text before any image",
            )
            role = ids.new_full((ids.shape[0], past), int(Role.BEFORE), dtype=torch.int8)
            if mask is not None:
                role[~mask[:, :past].bool()] = int(Role.PAD)
            none = torch.full_like(role, -1)
            place = torch.arange(past, device=ids.device, dtype=torch.int32).expand_as(role)
            tokens = Tokens(role, none.to(torch.int16), none.to(torch.int32), place)
            known = Sequence(tokens, [{} for _ in self.owner.systems], self.owner, self.uncut())
        elif known.owner is not self.owner:  # the ledger is still true; what another attachment's systems knew is not
            if self.owner.cutter is None and any(depth is not None for depth in known.cuts.depths):
                raise AttachError(
                    "this cache was shortened layer by layer by systems that are not attached now: attach them again, or "
                    "begin with a new cache"
                )
            known = Sequence(known.tokens, [{} for _ in self.owner.systems], self.owner, known.cuts)
        tokens, unseen = known.tokens, past - known.tokens.shape[1]
        if unseen < 0:
            known.cuts.crop(tokens, past)
            tokens = tokens.crop(past)
        elif unseen > 0:  # the cache went on while nothing was attached
            tokens = tokens.generated(unseen)
        if tokens.shape[0] != ids.shape[0]:
            raise AttachError(
                f"the cache holds {tokens.shape[0]} rows, the new block {ids.shape[0]}: expand the prompt instead"
            )
        known.prefill = ids.shape[1] > 1
        if known.prefill:
            for state, seen in zip(known.states, self.owner.vision_states, strict=True):
                state.update(seen)  # of pictures that `generate` encoded for this block
            self.owner.vision_states = [{} for _ in known.states]
            chunk = None if mask is None else mask[:, -ids.shape[1] :]
            block = Tokens.from_ids(ids, self.image_token, chunk, counts=self._counts(given, ids), **self._video(given))
            known.tokens = tokens.extend(block)
        else:
            known.tokens = tokens.generated()
        return known

    def uncut(self) -> Cuts:
        return Cuts([None] * self.owner.shape.layers)


def given_cache(given: dict[str, Any]) -> Any:
    """The cache among a forward's arguments: `cache` since transformers 5.24, `past_key_values` before (and still)."""
    cache = given.get("cache")
    return given.get("past_key_values") if cache is None else cache


def made_cache(output: Any) -> Any:
    """The cache of a forward's output, under either name."""
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)  # the old name warns


def padding_mask(given: Mapping[str, Any], past: int) -> Tensor | None:
    """(B, past + Q) which columns a forward of Q tokens is told to be no padding; None: nothing is said of it.

    For a static cache `generate` makes whole masks (B, 1, Q, K) beforehand, one for every kind of layer: no query sees
    padding, and every other token of the block sees at least itself.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor) or mask.dim() == 2:
        return mask
    if mask.dim() != 4 or ids is None or ids.shape[1] == 1:  # what one generated token sees, is known
        return None
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)[:, 0].any(1)  # (B|1, K)
    seen = seen[:, : past + ids.shape[1]]
    return F.pad(seen, (past + ids.shape[1] - seen.shape[1], 0), value=True).expand(ids.shape[0], -1)


def _past(cache: Any, known: Sequence | None, ids: Tensor | None) -> int:
    """Tokens already in the cache. A static cache counts on the device: ask it only when the ledger cannot know."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        decoding = known is not None and ids is not None and ids.shape[1] == 1
        return known.tokens.shape[1] if decoding else int(length)
    return length


def _fit(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    return None if mask is None else mask[:, -ids.shape[1] :]


def _repeats(prompt: Tensor | None, ids: Tensor) -> bool:
    """Whether `ids` is the same prompt with generated tokens behind it."""
    if prompt is None or ids.shape[0] != prompt.shape[0] or ids.shape[1] <= prompt.shape[1]:
        return False
    return bool(torch.equal(ids[:, : prompt.shape[1]], prompt))


def _encoded_counts(given: dict[str, Any]) -> list[int] | None:
    """Visual tokens of every image when the model was given encoded images; None otherwise."""
    encoded = (given.get("mm_encoder_outputs") or {}).get("image")
    features = getattr(encoded, "pooler_output", None)
    return [len(f) for f in features] if isinstance(features, list | tuple) else None

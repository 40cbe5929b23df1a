"""The doors in front of the language model: the encoding of pictures, cuts inside the tower, the cut before the decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sightline.engine.entry import refuse_fixed, restore, shorten
from sightline.engine.packed import cut_arguments, merged_places, parts_of
from sightline.engine.pictures import Pictures, Places, key_of, token_count
from sightline.engine.select import Keep, columns, take
from sightline.errors import HostError, InputError
from sightline.hosts import get, prefix, tower_positions

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.attach import Attachment
    from sightline.engine.sequences import Sequence

# transformers' names for the encoding, the same in every family; whether it is that of videos
ENCODERS = {"get_image_features": False, "get_video_features": True}
PICTURES = {
    "vision_hidden",
    "vision_attention",
    "visual_tokens",
    "second",
}  # stations at which a site knows its pictures


class Front:
    """What one attachment does before the decoder's first layer."""

    def __init__(self, owner: Attachment) -> None:
        self.owner = owner
        self.running: Pictures | None = None  # the encoding under way
        self.waiting: Pictures | None = None  # encoded by `generate`, whose prompt has not begun yet
        self.room: int | None = None  # tokens that the next prompt may have behind the cut, when it is too long before
        self._known: dict[tuple, Places] = {}  # the geometry of encodings, by what it depends on

    def enter(self, used: set[str], undo: ExitStack) -> None:
        """Open the doors that these stations need."""
        model, host = self.owner.model, self.owner.host
        tower = get(model, host.tower)
        layers = get(tower, host.tower_layers)
        base = model.base_model
        for name, video in ENCODERS.items() if not used.isdisjoint(PICTURES) else ():
            if hasattr(base, name):
                base.__dict__[name] = self._around(getattr(base, name), video)
                undo.callback(base.__dict__.pop, name, None)
        if not used.isdisjoint(PICTURES):
            undo.callback(layers[0].register_forward_pre_hook(self._tower_begins, with_kwargs=True).remove)
        if "vision_hidden" in used:
            for i, layer in enumerate(layers):
                undo.callback(layer.register_forward_pre_hook(partial(self._layer, i), with_kwargs=True).remove)
            undo.callback(tower.register_forward_hook(self._tower_ends).remove)
            if getattr(host, "tower_order", None) is not None:  # one row of all pictures, cut once more behind its end
                projector = get(model, host.projector)
                undo.callback(
                    projector.register_forward_pre_hook(partial(self._layer, len(layers)), with_kwargs=True).remove
                )
                undo.callback(projector.register_forward_hook(self._merged).remove)
        if "visual_tokens" in used:
            decoder = get(model, host.decoder)
            undo.callback(decoder.register_forward_pre_hook(self._decoder_begins, with_kwargs=True).remove)
            undo.callback(decoder.register_forward_hook(self._decoder_ends).remove)

    def take(self, sequence: Sequence) -> None:
        """The prompt of the pictures that wait begins."""
        if self.waiting is not None:
            sequence.pictures, self.waiting = self.waiting, None

    # -- the encoding ---------------------------------------------------------------------------------------------

    def _around(self, encode: Callable[..., Any], video: bool) -> Callable[..., Any]:
        parameters = signature(encode)

        @wraps(encode)  # `generate` reads the signature
        def encoding(*args: Any, **kwargs: Any) -> Any:
            if self.running is not None:  # videos that the host encodes as pictures
                return encode(*args, **kwargs)
            bound = parameters.bind_partial(*args, **kwargs)
            bound.apply_defaults()
            pictures = Pictures(
                [{} for _ in self.owner.workers],
                prefix(self.owner.model, self.owner.host),
                bound.arguments.get("pixel_values"),
                parts_of(bound.arguments),
            )
            sequence = self.owner.sequences.current
            if sequence is None:
                self.waiting = pictures
            else:
                sequence.pictures = pictures
            self.running = pictures
            try:
                output = encode(*args, **kwargs)
            finally:
                self.running = None
            given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
            device = next(self.owner.model.parameters()).device
            pictures.finish(partial(self._places, given, pictures.tower, token_count(output), device, video))
            return output

        return encoding

    def _places(
        self, given: dict[str, Any], tower: tuple[int, int] | None, tokens: int, device: Any, video: bool
    ) -> Places:
        from sightline.hosts.views import views

        key = (*key_of(given, tower, tokens), video, _frames(given) if video else None)
        if key not in self._known:
            if len(self._known) >= 64:  # pictures of many sizes: forget the oldest
                self._known.pop(next(iter(self._known)))
            model, host = self.owner.model, self.owner.host
            layouts = views(model, host, given, tower or (0, 0), tokens, video)
            positions = tower_positions(model, layouts, host)
            self._known[key] = Places.of(layouts, positions, prefix(model, host), device)
        return self._known[key]

    # -- the tower ------------------------------------------------------------------------------------------------

    def _tower_begins(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.running is not None:
            self.running.tower = tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])

    def _layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        pictures = self.running
        if pictures is None:
            return None
        given = args[0] if args else kwargs["hidden_states"]
        packed = given.dim() == 2  # all pictures in one row, without a batch axis
        hidden = given[None] if packed else given
        if layer == 0:
            pictures.alive.clear()
            pictures.alive.append(torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1))
        else:
            pictures.alive.append(pictures.alive[-1])
        now = [hidden]
        for keep in self.owner.each("vision_hidden", "vision", layer, lambda: now[0]):
            if packed and getattr(self.owner.host, "deepstack", None):
                raise HostError(
                    "features of several layers of this vision tower are used: no tokens can be cut inside it"
                )
            now[0] = now[0] if keep.states is None else keep.states
            index = columns(keep.mask)
            if bool((index < 0).any()):
                raise HostError("rows of the vision tower must keep the same number of tokens")
            if index.shape[1] < now[0].shape[1]:
                now[0] = take(now[0], index)
                pictures.alive[-1] = take(pictures.alive[-1], index)
        if packed:
            kwargs = cut_arguments(kwargs, pictures.alive[0].shape[1], pictures.alive[-1][0])
        if now[0] is hidden and pictures.alive[-1].shape[1] == pictures.alive[0].shape[1]:
            return None
        states = now[0][0] if packed else now[0]
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def _merged(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Give the merged tokens of a cut row the length that the host expects; dropped places are zero."""
        pictures = self.running
        if pictures is None or not pictures.alive or pictures.alive[-1].shape[1] == pictures.alive[0].shape[1]:
            return None
        places = merged_places(pictures.alive[-1][0], len(output))
        width = pictures.alive[0].shape[1] * len(output) // pictures.alive[-1].shape[1]
        return output.new_zeros(width, output.shape[1]).index_copy(0, places, output)

    def _tower_ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Give the tower's states the length that the host expects; dropped places are zero."""
        pictures = self.running
        if pictures is None or not pictures.alive:
            return
        width = pictures.alive[0].shape[1]
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(
                s if s is None else _spread(s, pictures.alive[max(j - 1, 0)], width) for j, s in enumerate(states)
            )
        last = pictures.alive[: self.owner.shape.tower_layers][-1]  # not of the cut behind the last layer
        output.last_hidden_state = _spread(output.last_hidden_state, last, width)

    # -- the decoder ----------------------------------------------------------------------------------------------

    def _decoder_begins(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        found = self._before_decoder(kwargs)
        room, self.room = self.room, None
        if room is not None:
            self._check_room(room, (kwargs if found is None else found).get("position_ids"))
        return None if found is None else (args, found)

    def _before_decoder(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The decoder's arguments when a system changed its embeddings, or dropped some."""
        sequence, embeddings = self.owner.sequences.current, kwargs.get("inputs_embeds")
        if sequence is None or embeddings is None:
            return None
        if sequence.cut is not None:
            sequence.cut = sequence.cut.forget()
        if sequence.second and sequence.pictures is None:  # visual tokens that a second stream's system made itself
            return None
        tokens = sequence.tokens
        start = tokens.shape[1] - sequence.queries
        if not sequence.prefill or not tokens.has_image or not (start == 0 or bool(tokens.visual[:, start:].any())):
            return None
        now = [kwargs]
        for found in self.owner.each("visual_tokens", "text", -1, lambda: now[0]["inputs_embeds"]):
            cut = isinstance(found, Keep)
            now[0] = self._shortened(sequence, now[0], found) if cut else {**now[0], "inputs_embeds": found}
        return None if now[0] is kwargs else now[0]

    def _check_room(self, room: int, positions: Tensor | None) -> None:
        """InputError when a prompt is longer than the model's context behind the cut, too."""
        sequence = self.owner.sequences.current
        length = max(0 if sequence is None else sequence.queries, 0 if positions is None else int(positions.max()) + 1)
        if length > room:
            names = "+".join(system.slug or type(system).__name__ for system in self.owner.systems)
            raise InputError(
                f"{names} leaves {length} tokens of the prompt, but the model holds {room} besides the new ones: keep fewer "
                "visual tokens, give fewer frames or pictures, or ask for fewer new tokens"
            )

    def _shortened(self, sequence: Sequence, given: dict[str, Any], keep: Keep) -> dict[str, Any]:
        config = self.owner.model.config.get_text_config()
        if keep.states is not None:
            given = {**given, "inputs_embeds": keep.states}
        found = shorten(given, keep, sequence.tokens, getattr(config, "sliding_window", None))
        if found is None:
            return given
        refuse_fixed(given.get("cache", given.get("past_key_values")))
        if any(depth is not None for depth in sequence.cuts.depths):
            raise InputError(
                "a later picture cannot be shortened once tokens were dropped inside the language model: give all "
                "pictures in one prompt"
            )
        given, sequence.tokens, cut = found
        sequence.cuts.width = sequence.tokens.shape[1]
        sequence.cut = cut.behind(sequence.cut)
        sequence.queries = given["inputs_embeds"].shape[1]
        return given

    def _decoder_ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        sequence = self.owner.sequences.current
        if sequence is not None and sequence.cut is not None and sequence.cut.source is not None:
            output.last_hidden_state = restore(output.last_hidden_state, sequence.cut.source)


def _frames(given: dict[str, Any]) -> tuple[int, ...]:
    """(videos, frames) where videos come as one stack."""
    return tuple(given["pixel_values_videos"].shape[:2])


def _spread(states: Tensor, alive: Tensor, width: int) -> Tensor:
    """(R, M, C) states at the places `alive` (R, M) -> (R, width, C), zero elsewhere."""
    if states.dim() == 2:
        return _spread(states[None], alive, width)[0]
    if states.shape[1] == width:
        return states
    index = alive[..., None].expand(-1, -1, states.shape[-1])
    return states.new_zeros(states.shape[0], width, states.shape[-1]).scatter(1, index, states)

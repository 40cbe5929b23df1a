"""Extra runs of a prompt that systems ask for: without its pictures ("text"), or untouched ("plain").

Both are made at the decoder, from the embeddings that it is about to read, so pictures are encoded once. They fill no
cache, run no output head and keep no gradient. "text" holds the same words; a host's own markers around a picture stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightline.engine.sequences import Sequence
from sightline.engine.tokens import Role, Tokens

if TYPE_CHECKING:
    from torch import nn

    from sightline.engine.attach import Attachment

STREAMS = ("plain", "text")
DROPPED = ("cache", "past_key_values", "output_hidden_states", "output_attentions", "return_dict")


def rounding(dtype: torch.dtype) -> float:
    """Relative difference between two runs that means nothing: the same sums in another order, at other positions."""
    return max(1e-5, 2 * torch.finfo(dtype).eps)


def last_prompt(tokens: Tokens) -> Tensor:
    """(B,) column of the last position of the prompt: neither padding nor generated."""
    prompt = (tokens.role != int(Role.PAD)) & (tokens.role != int(Role.GENERATED))
    columns = torch.arange(tokens.shape[1], device=prompt.device)
    return (columns * prompt).amax(1)


def last_real(tokens: Tokens) -> Tensor:
    """(B,) column of the last position that is not padding."""
    real = tokens.role != int(Role.PAD)
    return (torch.arange(tokens.shape[1], device=real.device) * real).amax(1)


def answering(tokens: Tokens, start: int) -> Tensor:
    """(B, N - start) bool: the positions from `start` on that predict the answer: the prompt's last, and generated ones."""
    columns = torch.arange(start, tokens.shape[1], device=tokens.role.device)
    return (tokens.role[:, start:] == int(Role.GENERATED)) | (columns == last_prompt(tokens)[:, None])


def run_streams(attachment: Attachment, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Make the extra runs of a prompt that begins here; afterwards everything stands as before."""
    sequences, main = attachment.sequences, attachment.sequences.current
    wanted = {stream for w in attachment.workers if w.stations for stream in w.system.streams()}
    for stream in STREAMS:
        if stream not in wanted:
            continue
        tokens, given = _text(main.tokens, kwargs) if stream == "text" else (main.tokens, _plain(kwargs))
        side = Sequence(
            tokens, main.states, main.owner, sequences.uncut(), queries=tokens.shape[1], step=0, stream=stream
        )
        side.pictures = main.pictures
        sequences.current = side
        try:
            with torch.no_grad():
                decoder(**given, use_cache=False)
        finally:
            sequences.current = main


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's own arguments, without the cache."""
    given = {k: v for k, v in kwargs.items() if k not in (*DROPPED, "use_cache")}
    mask, queries = given.get("attention_mask"), kwargs["inputs_embeds"].shape[1]
    if isinstance(mask, dict):
        given["attention_mask"] = {kind: _cut(value, queries) for kind, value in mask.items()}
    else:
        given["attention_mask"] = _cut(mask, queries)
    return given


def _cut(mask: Any, queries: int) -> Any:
    """A mask made for a larger, static cache holds keys that are still empty."""
    return mask[..., :queries] if isinstance(mask, Tensor) else mask


def _text(tokens: Tokens, kwargs: dict[str, Any]) -> tuple[Tokens, dict[str, Any]]:
    """The ledger and the decoder's arguments of the text alone, left-padded, its last position the prompt's last."""
    words = (tokens.role != int(Role.PAD)) & (tokens.role != int(Role.GENERATED)) & ~tokens.visual
    count = int(words.sum(1).max())
    columns = words.int().argsort(dim=1, stable=True)[:, -count:]  # (B, M): what goes first, then the words in order
    real = words.gather(1, columns)
    embeddings = kwargs["inputs_embeds"]
    embeddings = embeddings.gather(1, columns[..., None].expand(-1, -1, embeddings.shape[-1]))
    places = (real.long().cumsum(1) - 1).clamp(min=0)
    ledger = tokens.select(columns.masked_fill(~real, -1))
    return ledger, {"inputs_embeds": embeddings, "attention_mask": real.long(), "position_ids": places}

"""An independent oracle for cuts inside the language model: everything stays, but dropped tokens are not attended.

A copy of the host in which decoder layers from `first` on see no key of a dropped token, and have positions as if it had
never been there. One forward without cache over prompt and answer gives what every step of a generation must give.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sightline.hosts import find, get

NAME = "masked_from_a_layer"


def function(module: nn.Module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """Attention by definition; `module.gone` (B, N) bool are keys that are not there."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    gone = F.pad(module.gone, (0, key.shape[2] - module.gone.shape[1]))
    scores = scores.masked_fill(gone[:, None, None], -torch.inf)
    weights = scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0).softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, function)
AttentionMaskInterface.register(NAME, sdpa_mask)


def without(model: nn.Module, gone: dict[int, Tensor], real: Tensor, renumber: bool) -> nn.Module:
    """The copy. gone: layer from which on -> (B, P) bool tokens that are dropped there; real: (B, P) no padding."""
    model, host = copy.deepcopy(model), find(model)
    model.set_attn_implementation({"text_config": NAME})
    decoder = get(model, host.decoder)
    rotary, calls = get(decoder, host.rotary), []

    def remember(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append((args, kwargs, output))

    decoder.register_forward_pre_hook(lambda *_: calls.clear())
    rotary.register_forward_hook(remember, with_kwargs=True)
    for i, layer in enumerate(get(decoder, host.layers)):
        dropped = [columns for first, columns in gone.items() if first <= i]
        columns = torch.stack(dropped).any(0) if dropped else torch.zeros_like(real)
        get(layer, host.attention).gone = columns
        if renumber and dropped:
            layer.register_forward_pre_hook(_mover(rotary, calls, columns, real), with_kwargs=True)
    return model


def _mover(rotary: nn.Module, calls: list, gone: Tensor, real: Tensor) -> Any:
    def move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = kwargs["position_embeddings"]
        call_args, call_kwargs, _ = next(call for call in calls if call[2] is given)
        ids = call_kwargs["position_ids"] if "position_ids" in call_kwargs else call_args[1]
        moved = without_gaps(ids, gone, real)
        if "position_ids" in call_kwargs:
            call_kwargs = {**call_kwargs, "position_ids": moved}
        else:
            call_args = (call_args[0], moved, *call_args[2:])
        return args, {**kwargs, "position_embeddings": rotary.forward(*call_args, **call_kwargs)}

    return move


def without_gaps(ids: Tensor, gone: Tensor, real: Tensor) -> Tensor:
    """Position ids, (B|1, N) or (3, B, N), with every value removed that only dropped tokens have; by counting."""
    wide = ids if ids.dim() == 3 else ids[None]
    wide = wide.expand(-1, gone.shape[0], -1).clone()
    more = wide.shape[2] - gone.shape[1]
    gone, real = F.pad(gone, (0, more)), F.pad(real, (0, more), value=True)
    for row in range(wide.shape[1]):
        was = set(wide[:, row, real[row]].flatten().tolist())
        stay = set(wide[:, row, real[row] & ~gone[row]].flatten().tolist())
        closed = sorted(was - stay)
        for axis in range(wide.shape[0]):
            for column in range(wide.shape[2]):
                value = int(wide[axis, row, column])
                wide[axis, row, column] = value - sum(c <= value for c in closed)
    return wide if ids.dim() == 3 else wide[0]

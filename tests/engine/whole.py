"""An independent oracle: the host with its text attention written out on whole maps, edited by column numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.tiny_hosts import TinyHost

NAME = "whole_maps"
LAYERS = (1, 2)

# (weights (B, H, Q, K) before the softmax, or after, columns (B, K) bool)
Change = Callable[[Tensor, Tensor], Tensor]


def times(factor: float) -> tuple[Change, Change]:
    return (lambda scores, columns: scores), (lambda weights, columns: torch.where(columns, weights * factor, weights))


def plus(amount: float) -> tuple[Change, Change]:
    return (lambda scores, columns: torch.where(columns, scores + amount, scores)), (lambda weights, columns: weights)


def function(module: nn.Module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """What `sdpa_attention_forward` computes, by definition, with the change of the model's layers."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    before, after = module.change if module.layer_idx in LAYERS else (None, None)
    columns = module.columns.repeat_interleave(query.shape[0] // module.columns.shape[0], 0)
    columns = F.pad(columns, (0, max(0, key.shape[2] - columns.shape[1])))[:, None, None, : key.shape[2]]
    scores = scores if before is None else before(scores, columns)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif causal and query.shape[2] > 1:
        scores = scores.masked_fill(torch.ones(query.shape[2], key.shape[2]).triu(1).bool(), -torch.inf)
    weights = scores.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0).softmax(-1)
    weights = weights if after is None else after(weights, columns)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, function)
AttentionMaskInterface.register(NAME, sdpa_mask)


def whole(host: TinyHost, inputs: Any, change: tuple[Change, Change]) -> nn.Module:
    """A copy of the host's model that gives the image columns of this prompt the change, in LAYERS.

    Without sliding windows it may also run `generate`, for columns are counted from the first key.
    """
    model = copy.deepcopy(host.model)
    model.set_attn_implementation({"text_config": NAME})
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.change = change
            module.columns = inputs["input_ids"] == model.config.image_token_id
    return model


def extended(inputs: Any, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of one forward over the prompt and what came after it: ids (B, P + T) begin with the prompt's."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    found = {**inputs, "input_ids": ids, "attention_mask": F.pad(inputs["attention_mask"], (0, more), value=1)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in found:
            found[name] = F.pad(found[name], (0, more))
    return found


def forward(model: nn.Module, inputs: Any, ids: Tensor | None = None) -> Tensor:
    """(B, N, V) logits of one forward without cache."""
    with torch.no_grad():
        return model(**(inputs if ids is None else extended(inputs, ids)), use_cache=False).logits


def generate(model: nn.Module, inputs: Any, tokens: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """(ids (B, P + T), raw logits (B, T, V)) of a generation; greedy unless said otherwise."""
    options = {"max_new_tokens": tokens, "return_dict_in_generate": True, "output_logits": True} | options
    out = model.generate(**inputs, **options)
    return out.sequences, torch.stack(out.logits, 1)

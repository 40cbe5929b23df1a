"""Fine-tuning a decoder on long texts with shifted sparse attention and sinks (SinkLoRA), without touching its code.

    with shifted.training(model, ratio=0.25, sinks=4):
        model(input_ids=ids, labels=ids).loss.backward()      # four times fewer attention operations
    model.generate(...)                                       # answers with full attention, as published

arXiv 2406.05678; the attention is `sightline.mix.sinklora.shifted_attention`, in every layer, after the rotary embedding. Adapters
are peft's: the paper trains rank 8 on q, k, v, o together with embeddings and norms. `longer` scales the rotary positions linearly,
as the paper does before it trains on longer texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import causal_mask_function

from sightline.errors import InputError, ModelError, ParameterError, check_range
from sightline.mix.sinklora import group_size, shifted_attention

NAME = "sightline_shifted"


@dataclass(frozen=True)
class Rule:
    """Which keys each query sees; see `sightline.mix.sinklora`."""

    ratio: float = 0.25
    sinks: int = 4
    restore: float = 0.0
    restore_by: str = "heads"

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 1e-4, 1)
        check_range("restore", self.restore, 0, 1)
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ParameterError(f"sinks={self.sinks!r}: choose a whole number, 0 or more")
        if self.restore_by not in ("heads", "groups"):
            raise ParameterError(f"restore_by={self.restore_by!r}: choose heads or groups")


_RULES: dict[int, Rule] = {}  # by identity of the decoder's configuration, which every attention module holds


@contextmanager
def training(model: nn.Module, **rule: Any) -> Iterator[None]:
    """Inside, the decoder of a transformers model attends by `Rule(**rule)`; leaving restores it, also after an error.

    For forwards over whole texts: a cache from before, padding, sliding windows and packed texts raise InputError.

    Raises:
        ParameterError: values out of range. ModelError: no transformers decoder, or one that is already so.
    """
    chosen = Rule(**rule)
    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        raise ModelError(f"{type(model).__name__} is no transformers model: give a decoder such as LlamaForCausalLM")
    config = model.config.get_text_config(decoder=True)
    if id(config) in _RULES:
        raise ModelError(f"{type(model).__name__} already trains with shifted attention: leave that block first")
    if not _uses_interface(model, config):
        raise ModelError(
            f"{type(model).__name__} does not choose its attention by name: shifted attention cannot be put in"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)  # without it no mask would be asked for, and padding would pass unseen
    before = config._attn_implementation_internal
    _RULES[id(config)] = chosen
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        del _RULES[id(config)]


def longer(config: PretrainedConfig, length: int) -> PretrainedConfig:
    """Set linear position interpolation for texts of `length` on a configuration, before the model is loaded with it."""
    text = config.get_text_config(decoder=True)
    known = text.max_position_embeddings
    if length <= known:
        raise ParameterError(f"length={length!r}: the model reads {known} tokens already, choose more")
    base = dict(getattr(text, "rope_parameters", None) or {})
    if base.get("rope_type", "default") != "default":
        raise ModelError(
            f"the model's positions are scaled already ({base['rope_type']}): shifted.longer takes plain ones"
        )
    text.rope_parameters = base | {"rope_type": "linear", "factor": length / known}
    text.max_position_embeddings = length
    return config


def _uses_interface(model: nn.Module, config: PretrainedConfig) -> bool:
    """Some module with this configuration is an attention that transformers looks up by name."""
    mine = (m for m in model.modules() if getattr(m, "config", None) is config)
    return any(hasattr(m, "is_causal") and hasattr(m, "scaling") for m in mine)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, H, N, D) -> (B, N, H, D)."""
    if dropout:
        raise ModelError(
            f"attention dropout {dropout} is not offered with shifted attention: set attention_dropout to 0"
        )
    if attention_mask is not None:
        raise InputError("a mask of one's own cannot go with shifted attention: give token ids only")
    rule, tokens = _RULES[id(module.config)], query.shape[2]
    options = {"sinks": rule.sinks, "restore": rule.restore, "restore_by": rule.restore_by, "scale": scaling}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return shifted_attention(q, k, v, group_size(tokens, rule.ratio), **options), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """No mask is made: the rule has its own. What it cannot express is refused."""
    if q_length != kv_length:
        raise InputError(
            f"shifted attention is for training on whole texts, here are {q_length} queries and {kv_length} keys: "
            "generate outside the block"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InputError("shifted attention knows no padding: give texts of one length")
    if mask_function is not causal_mask_function:
        raise InputError(
            "this model's mask is not plainly causal (sliding window, packed texts, seeing images both ways)"
        )

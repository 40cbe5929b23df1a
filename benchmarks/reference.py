"""VAR the expensive way, as a yardstick: whole attention maps in every layer, `redistribute` on each of them.

Shares nothing with the engine: its own hooks, its own idea of which token is what, its own attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sightline.engine.attention import naive_attention
from sightline.hosts import Host, find, get
from sightline.steer.var import VAR, redistribute, sink_mask


@contextmanager
def naive_var(model: nn.Module, var: VAR, host: Host | None = None) -> Iterator[None]:
    """VAR by materialising every map, on any host; a prompt is a forward of more than one token."""
    host = host or find(model)
    decoder = get(model, host.decoder)
    layers = list(get(decoder, host.layers))
    configs = {id(c): c for c in [decoder.config, *(get(layer, host.attention).config for layer in layers)]}
    edited = range(var.first_layer, len(layers) - 1 if var.skip_last_layer else len(layers))
    number = {id(get(layer, host.attention)): i for i, layer in enumerate(layers)}
    image_token = getattr(model.config, host.image_token)
    now: dict[Any, Tensor] = {}

    def prompt(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.shape[1] == 1:
            return
        real = kwargs.get("attention_mask")
        real = torch.ones_like(ids).bool() if real is None else real.bool()
        now["visual"] = (ids == image_token) & real
        now["rows"] = (now["visual"].cumsum(1) > 0) & ~now["visual"] & real
        now["real"] = real

    def states(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] > 1:
                now[layer] = sink_mask(hidden, var.sink_dims, var.tau) & now["real"]

        return hook

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                  scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, weights = naive_attention(query, key, value, scale=scale, mask=mask, causal=query.shape[2] > 1)
        layer = number[id(module)]
        if layer in edited and bool((now[layer] & now["visual"]).any()):
            total = now.setdefault("total", now["visual"].shape[1])
            visual, sinks = _fit(now["visual"], weights, total), _fit(now[layer], weights, total)
            rows = now["rows"] if query.shape[2] > 1 else None
            weights = redistribute(
                weights, sinks, visual, p=var.p, rho=1 - var.min_nonsink_ratio, summ=var.summ, rows=rows
            )
            output = (weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1).float()).transpose(1, 2)
        return output.to(query.dtype).contiguous(), weights

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        now["total"] = ids.shape[1] if ids.shape[1] > 1 else now["total"] + 1

    AttentionInterface.register("naive_var", attention)
    AttentionMaskInterface.register("naive_var", sdpa_mask)
    hooks = [model.register_forward_pre_hook(h, with_kwargs=True) for h in (prompt, count)]
    hooks += [layer.register_forward_pre_hook(states(i), with_kwargs=True) for i, layer in enumerate(layers)]
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = "naive_var"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for hook in hooks:
            hook.remove()


def _fit(columns: Tensor, weights: Tensor, total: int) -> Tensor:
    """Prompt columns (B, N) laid over the keys (B, ..., K) that a cache still holds of `total` tokens."""
    grown = torch.nn.functional.pad(columns, (0, total - columns.shape[1]))
    return grown[:, total - weights.shape[-1] :]

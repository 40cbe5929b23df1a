"""The plain facts about a model that systems may ask for, read off its configuration and, on request, by running it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from sightline.engine.system import Shape
from sightline.hosts import Host, ViTHost, feature_layer, get, prefix

if TYPE_CHECKING:
    from torch import Tensor, nn


def shape_of(model: nn.Module, host: Host | ViTHost) -> Shape:
    """The facts of a model; of a plain vision transformer those of its tower, the others zero."""
    layers = len(get(get(model, host.tower), host.tower_layers))
    tower = {
        "tower_layers": layers,
        "tower_prefix": prefix(model, host),
        "feature_layer": feature_layer(model, host),
        "merged": getattr(host, "merged", False),
        "packed": _packed(model, host),
        "tiled": getattr(host, "views", None) is not None and getattr(host, "tower_order", None) is None,
    }
    if not isinstance(host, Host):
        return Shape("", layers, 0, 0, 0, first_states=lambda: torch.zeros(layers, 0), **tower)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        config.model_type,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        config.hidden_size,
        first_states=partial(first_states, model, host),
        input_norm=lambda layer, states: get(_layer(model, host, layer), host.input_norm)(states),
        key_value=lambda layer: tuple(get(_layer(model, host, layer), f"{host.attention}.{n}") for n in host.key_value),
        **tower,
    )


def _packed(model: nn.Module, host: Host | ViTHost) -> int:
    """Patches of a visual token where the tower packs all pictures into one row and only its end is used; else 0."""
    if getattr(host, "tower_order", None) is None or host.deepstack:
        return 0
    return int(model.config.vision_config.spatial_merge_size) ** 2


def _layer(model: nn.Module, host: Host, layer: int) -> nn.Module:
    return get(get(model, host.decoder), host.layers)[layer]


def first_states(model: nn.Module, host: Host) -> Tensor:
    """(L, D) fp32: the state of the start token as it enters every decoder layer.

    The first token sees only itself, so a sequence of one token is enough.
    """
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)
    ids = [config.bos_token_id, getattr(generation, "bos_token_id", None), config.pad_token_id, 0]
    start = next(i for i in ids if i is not None)
    decoder = get(model, host.decoder)
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0, 0].float())

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in get(decoder, host.layers)]
    try:
        with torch.no_grad():
            decoder(
                input_ids=torch.tensor([[start]], device=decoder.get_input_embeddings().weight.device), use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([s.to(states[0].device) for s in states])

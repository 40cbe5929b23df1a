"""What the engine must know of a model family: a handful of paths and two facts. Data more than code.

A `Host` says where a vision-language model keeps its tower, projector, decoder layers and image tokens; a `ViTHost` does
the same for a plain vision transformer. Neither knows any system. Adding a family is one file with one `Host`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sightline.errors import HostError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from sightline.hosts.geometry import Layout

    # (processor, processor outputs, [(width, height) of every original picture], model) -> one Layout per picture
    Layouts = Callable[[Any, Mapping[str, Any], Sequence[tuple[int, int]], Any], list[Layout]]
    # the same for videos: [(width, height, frames) of every video] -> one Layout per frame
    FrameLayouts = Callable[[Any, Mapping[str, Any], Sequence[tuple[int, int, int]], Any], list[Layout]]
    # (model, layouts) -> per picture (n, k, 2): row and place, in the tower's sequence, of every token's patches
    Order = Callable[[nn.Module, Sequence[Layout]], list[np.ndarray]]
    # (model, arguments of its encoding, (rows, patches) of the tower, visual tokens) -> one Layout per picture
    Views = Callable[[nn.Module, Mapping[str, Any], tuple[int, int], int], list[Layout]]


@dataclass(frozen=True)
class Host:
    """One family of vision-language models. Paths are dotted attribute names, read from the top model."""

    name: str
    classes: tuple[str, ...]  # names of the top model classes, e.g. "LlavaForConditionalGeneration"
    decoder: str = "model.language_model"
    layers: str = "layers"  # inside the decoder
    attention: str = "self_attn"  # inside a decoder layer
    rotary: str = "rotary_emb"  # inside the decoder: makes the rotary angles from position ids
    input_norm: str = "input_layernorm"  # inside a decoder layer: before its attention
    query: str = "q_proj"  # inside the attention
    key_value: tuple[str, str] = ("k_proj", "v_proj")  # inside the attention
    mlp: str = "mlp"  # inside a decoder layer
    norm: str = "norm"  # the last norm, inside the decoder
    tower: str = "model.vision_tower"
    tower_layers: str = "encoder.layers"  # inside the tower
    tower_attention: str = "self_attn"  # inside a tower layer
    tower_prefix: Callable[[nn.Module], int] | int = 0  # tokens before the patches in the tower (1 = CLS)
    projector: str = "model.multi_modal_projector"
    image_token: str = "image_token_id"  # attribute of model.config
    layouts: Layouts | None = None
    # (model, arguments of the forward, input ids) -> visual tokens of every image, where runs of placeholders do not
    # tell: several runs an image, or several images a run. It may return None: the encoded features, or runs, tell then
    image_counts: Callable[[nn.Module, Mapping[str, Any], Any], list[int] | None] | None = None
    video: bool = False  # its processors take videos
    video_token: str | None = None  # attribute of model.config; None: videos use the image token
    # (config, arguments of the forward, (n,) lengths of the runs of video tokens) -> visual tokens of every frame
    frame_counts: Callable[[Any, Mapping[str, Any], list[int]], list[int]] | None = None
    frame_layouts: FrameLayouts | None = None  # one Layout per frame, or per group of merged frames
    tower_order: Order | None = (
        None  # None: a crop is a row of the tower's batch, its patches row-major after the prefix
    )
    video_views: Views | None = None  # the same of `get_video_features`, one Layout per frame
    views: Views | None = None  # layouts from the arguments of the encoding alone; None: every row of the tower is one
    merged: bool = False  # a visual token is made of several patches of the tower
    deepstack: str | None = None  # path in model.config: tower layers whose features the first decoder layers add again


@dataclass(frozen=True)
class ViTHost:
    """One family of plain vision transformers (transformers or timm)."""

    name: str
    classes: tuple[str, ...]
    tower: str = ""  # dotted path to the transformer inside the model; "" = the model itself
    tower_layers: str = "encoder.layers"
    tower_attention: str = "self_attn"
    fused: bool = False  # True: attention calls torch's SDPA directly (timm), not transformers' attention interface
    tower_prefix: Callable[[nn.Module], int] | int = 0  # CLS and register tokens before the patches
    layouts: Layouts | None = None


REGISTRY: dict[str, Host | ViTHost] = {}  # class name -> host


def register(host: Host | ViTHost) -> Host | ViTHost:
    """Make a host known for every model class it names. Returns it, so that `LLAVA = register(Host(...))` reads well."""
    for name in host.classes:
        if name in REGISTRY and REGISTRY[name].name != host.name:
            raise HostError(
                f"model class {name!r} is already served by host {REGISTRY[name].name!r}, not {host.name!r}"
            )
        REGISTRY[name] = host
    return host


def get(model: nn.Module, path: str) -> Any:
    """The submodule or attribute of `model` at a dotted `path` ("" is the model itself)."""
    for part in path.split(".") if path else ():
        model = getattr(model, part)
    return model


def find(model: nn.Module) -> Host | ViTHost:
    """The host of a model, by class name along its MRO.

    Raises:
        HostError: the class is unknown; the message lists the facts to give as `attach(model, ..., host=Host(...))`, with
            those that can be read off the module tree filled in. A text-only model, one that wraps a known one, and one without
            its output head are told apart.
    """
    from sightline import hosts
    from sightline.hosts.guess import guess, reads_text_only, sees_only

    hosts.load_all()
    for cls in type(model).__mro__:
        if cls.__name__ in REGISTRY:
            return REGISTRY[cls.__name__]
    name = type(model).__name__
    if whole := _meant(model, name):
        raise HostError(f"{name} {whole}")
    if reads_text_only(model):
        raise HostError(
            f"{name} is a text model: it has no vision tower and no image token; give a vision-language model"
        )
    kind = ViTHost if sees_only(model) else Host
    seen = guess(model, seeing_only=kind is ViTHost)
    families = sorted({host.name for host in REGISTRY.values() if isinstance(host, kind)})
    others = ", ".join(f.name for f in fields(kind) if f.name not in ("name", "classes", *seen))
    raise HostError(
        f"model class {name!r} is not a known host (known: {', '.join(families)}); to use it, say where its parts are: "
        f"attach(model, ..., host=sightline.hosts.{kind.__name__}(name={name!r}, classes=({name!r},), "
        f"{', '.join(f'{fact}={value}' for fact, value in seen.items())})); "
        f"<...> could not be found; further facts, if the defaults do not fit: {others}"
    )


def _meant(model: nn.Module, name: str) -> str:
    """Where the known vision-language model is that `model` wraps or is a part of; empty when there is none."""
    for path, part in model.named_modules():
        if isinstance(REGISTRY.get(type(part).__name__), Host):
            return f"holds a {type(part).__name__}: give that part of it, model.{path}"
    whole = f"{name.removesuffix('Model')}ForConditionalGeneration"
    return f"has no output head: give the {whole} that it is a part of" if whole in REGISTRY else ""


def check(model: nn.Module, host: Host | ViTHost) -> None:
    """Raise HostError, naming every fact of `host` that does not fit `model`."""
    from sightline.hosts.guess import guess

    wrong = _tower_faults(model, host)
    if isinstance(host, Host):
        wrong |= _stack_faults(model, "decoder", host.decoder, "layers", host.layers, "attention", host.attention)
        if not _has(model, host.projector):
            wrong["projector"] = repr(host.projector)
        if getattr(getattr(model, "config", None), host.image_token, None) is None:
            wrong["image_token"] = f"{host.image_token!r} (an attribute of model.config)"
    if wrong:
        seen = guess(model, seeing_only=isinstance(host, ViTHost))
        seen = {fact: value for fact, value in seen.items() if fact in wrong and not value.startswith("<")}
        hint = f"; seen: {', '.join(f'{k}={v}' for k, v in seen.items())}" if seen else ""
        raise HostError(
            f"host {host.name!r} does not fit {type(model).__name__}: not found: "
            f"{'; '.join(f'{fact}={value}' for fact, value in wrong.items())}. "
            f"Pass the right paths in sightline.hosts.{type(host).__name__}(...){hint}"
        )


def prefix(model: nn.Module, host: Host | ViTHost) -> int:
    """Tokens before the patches in the tower's sequence: class token and registers."""
    return host.tower_prefix(model) if callable(host.tower_prefix) else host.tower_prefix


def feature_layer(model: nn.Module, host: Host | ViTHost) -> int:
    """The tower layer (0-based) whose output goes to the projector; the last of several."""
    layers = len(get(get(model, host.tower), host.tower_layers))
    chosen = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if chosen is None:
        return layers - 1
    chosen = chosen if isinstance(chosen, (list, tuple)) else [chosen]  # of the states: the input, then every output
    return max(c + layers if c < 0 else c - 1 for c in chosen)


def _tower_faults(model: nn.Module, host: Host | ViTHost) -> dict[str, str]:
    names = ("tower", host.tower, "tower_layers", host.tower_layers, "tower_attention", host.tower_attention)
    return _stack_faults(model, *names)


def _stack_faults(
    model: nn.Module, top: str, path: str, stack: str, layers: str, part: str, attention: str
) -> dict[str, str]:
    """Facts among (top, stack, part) whose paths lead nowhere: a module, its list of layers, a layer's attention."""
    if not _has(model, path):
        return {top: repr(path)}
    inner = f"{path}.{layers}".strip(".")
    if not _has(model, inner) or not hasattr(get(model, inner), "__getitem__") or len(get(model, inner)) == 0:
        return {stack: f"{layers!r} (inside {path!r})"}
    if not _has(get(model, inner)[0], attention):
        return {part: f"{attention!r} (inside a layer of {inner!r})"}
    return {}


def _has(model: Any, path: str) -> bool:
    try:
        return get(model, path) is not None
    except AttributeError:
        return False

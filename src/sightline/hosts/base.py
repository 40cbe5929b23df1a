"""What the engine must know of a model family: a handful of paths and two facts. Data more than code.

A `Host` says where a vision-language model keeps its tower, projector, decoder layers and image tokens; a `ViTHost` does
the same for a plain vision transformer. Neither knows any system. Adding a family is one file with one `Host`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sightline.errors import HostError, nearest

if TYPE_CHECKING:
    from torch import nn

    from sightline.hosts.geometry import Layout


@dataclass(frozen=True)
class Host:
    """One family of vision-language models. Paths are dotted attribute names, read from the top model."""

    name: str
    classes: tuple[str, ...]  # names of the top model classes, e.g. "LlavaForConditionalGeneration"
    decoder: str = "model.language_model"
    layers: str = "layers"  # inside the decoder
    attention: str = "self_attn"  # inside a decoder layer
    tower: str = "model.vision_tower"
    tower_layers: str = "encoder.layers"  # inside the tower
    tower_attention: str = "self_attn"  # inside a tower layer
    tower_prefix: int = 0  # tokens before the patches in the tower (1 = CLS)
    projector: str = "model.multi_modal_projector"
    image_token: str = "image_token_id"  # attribute of model.config
    layouts: Callable[[Any, Mapping[str, Any], Sequence[tuple[int, int]]], list[Layout]] | None = None
    # (processor, processor outputs, [(width, height) of every original image]) -> one Layout per image


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
    layouts: Callable[[Any, Mapping[str, Any], Sequence[tuple[int, int]]], list[Layout]] | None = None


REGISTRY: dict[str, Host | ViTHost] = {}  # class name -> host


def register(host: Host | ViTHost) -> Host | ViTHost:
    """Make a host known for every model class it names. Returns it, so that `LLAVA = register(Host(...))` reads well."""
    for name in host.classes:
        if name in REGISTRY and REGISTRY[name].name != host.name:
            raise HostError(f"model class {name!r} is already served by host {REGISTRY[name].name!r}, not {host.name!r}")
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
        HostError: the class is unknown; the message lists the facts to give as `attach(model, ..., host=Host(...))`.
    """
    from sightline import hosts

    hosts.load_all()
    for cls in type(model).__mro__:
        if cls.__name__ in REGISTRY:
            return REGISTRY[cls.__name__]
    name = type(model).__name__
    facts = ", ".join(f.name for f in fields(Host) if f.name not in ("name", "classes"))
    raise HostError(
        f"model class {name!r} is not a known host ({nearest(name, list(REGISTRY))}); to use it, say where its parts are: "
        f"attach(model, ..., host=sightline.hosts.Host(name={name!r}, classes=({name!r},), {_guess(model)})); facts: {facts}"
    )


def check(model: nn.Module, host: Host | ViTHost) -> None:
    """Raise HostError, naming every path of `host` that does not exist in `model`."""
    missing = []
    paths = {"tower": host.tower}
    if isinstance(host, Host):
        paths |= {"decoder": host.decoder, "decoder + layers": f"{host.decoder}.{host.layers}", "projector": host.projector}
    for fact, path in paths.items():
        try:
            get(model, path)
        except AttributeError:
            missing.append(f"{fact}={path!r}")
    if isinstance(host, Host) and getattr(model.config, host.image_token, None) is None:
        missing.append(f"image_token={host.image_token!r} (an attribute of model.config)")
    if missing:
        raise HostError(
            f"host {host.name!r} does not fit {type(model).__name__}: not found: {'; '.join(missing)}. "
            f"Pass the right paths in sightline.hosts.Host(...); what was seen: {_guess(model)}"
        )


def _guess(model: nn.Module) -> str:
    """Facts about an unknown model that can be read off its module tree, as keyword arguments."""
    from torch import nn

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    text = [n for n, m in lists if any("vis" not in n and hasattr(c, "self_attn") for c in m)]
    vision = [n for n, m in lists if "vis" in n]
    guess = []
    if text:
        decoder, _, layers = text[0].rpartition(".")
        guess += [f"decoder={decoder!r}", f"layers={layers!r}"]
    if vision:
        guess.append(f"tower={vision[0].split('.encoder')[0]!r}")
    if not any(hasattr(getattr(model, "config", None), a) for a in ("image_token_id", "image_token_index")):
        guess.append("image_token=<attribute of config that holds the placeholder id>")
    return ", ".join(guess) if guess else "decoder=..., layers=..., tower=..., projector=..."

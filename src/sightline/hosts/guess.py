"""Reads off the module tree of an unknown model what can be known of its parts, for error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

VISION = ("vis", "image", "tower")
PROJECTORS = ("multi_modal_projector", "connector", "projector", "merger", "aligner", "mm_projector")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_token_id", "image_placeholder_id")


def guess(model: nn.Module, seeing_only: bool = False) -> dict[str, str]:
    """Facts of a Host, as source text: 'model.language_model' in quotes, or <what is missing> where nothing was seen.

    seeing_only: the model is a plain vision transformer; only the facts of a ViTHost are returned.
    """
    stacks = _stacks(model)
    seeing = {path: part for path, part in stacks.items() if any(word in path.lower() for word in VISION)}
    facts = {}
    if seeing_only:
        names = _facts(model, seeing or stacks, "vision transformer")
        return dict(zip(("tower", "tower_layers", "tower_attention"), names, strict=True))
    reading = {path: part for path, part in stacks.items() if path not in seeing}
    facts["decoder"], facts["layers"], facts["attention"] = _facts(model, reading, "decoder")
    facts["tower"], facts["tower_layers"], facts["tower_attention"] = _facts(model, seeing, "vision tower")
    facts["projector"] = _projector(model)
    facts["image_token"] = _image_token(getattr(model, "config", None))
    return facts


def reads_text_only(model: nn.Module) -> bool:
    """Whether a model has layers and a vocabulary but nothing that looks at pictures: no tower, no image token."""
    config = getattr(model, "config", None)
    if hasattr(config, "vision_config") or _image_token(config)[0] != "<" or not _has_vocabulary(model):
        return False
    return bool(_stacks(model)) and not any(word in name for name, _ in model.named_modules() for word in VISION)


def sees_only(model: nn.Module) -> bool:
    """Whether a model has one stack of layers and neither a vocabulary nor an image token: a vision transformer."""
    config = getattr(model, "config", None)
    if hasattr(config, "text_config") or _image_token(config)[0] != "<" or _has_vocabulary(model):
        return False
    stacks = _stacks(model)
    return len({any(word in path.lower() for word in VISION) for path in stacks}) == 1


def _has_vocabulary(model: nn.Module) -> bool:
    """Whether a model embeds the tokens of its configuration's vocabulary."""
    from torch import nn

    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return any(isinstance(m, nn.Embedding) and m.num_embeddings == size for m in model.modules())


def _stacks(model: nn.Module) -> dict[str, str]:
    """Path of every list of layers that hold an attention module, with the name of that module; longest lists first."""
    from torch import nn

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            names = [
                name for name, _ in module[0].named_children() if "attn" in name.lower() or "attention" in name.lower()
            ]
            plain = [name for name in names if "norm" not in name.lower() and "cross" not in name.lower()]
            if plain:
                found[path] = plain[0]
    return dict(sorted(found.items(), key=lambda item: -len(model.get_submodule(item[0]))))


def _facts(model: nn.Module, stacks: dict[str, str], what: str) -> tuple[str, str, str]:
    """(top module, list inside it, attention inside a layer) of the longest stack."""
    if not stacks:
        return f"<path of the {what}>", "<path of its layers>", "<name of a layer's attention>"
    path, attention = next(iter(stacks.items()))
    top, _, inner = path.rpartition(".")
    if top.endswith(("encoder", "decoder", "transformer")) and "." in top:
        top, _, middle = top.rpartition(".")
        inner = f"{middle}.{inner}"
    return repr(top), repr(inner), repr(attention)


def _projector(model: nn.Module) -> str:
    named = {path.rpartition(".")[2]: path for path, _ in reversed(list(model.named_modules()))}
    for name in PROJECTORS:
        if name in named:
            return repr(named[name])
    return "<path of the module between tower and decoder>"


def _image_token(config: Any) -> str:
    for name in IMAGE_TOKENS:
        if getattr(config, name, None) is not None:
            return repr(name)
    return "<attribute of model.config that holds the id of the image placeholder>"

"""Layouts are never silently wrong: they are counted against the inputs they were made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sightline.errors import HostError, InputError
from sightline.hosts.base import Host, ViTHost

if TYPE_CHECKING:
    from sightline.hosts.geometry import Layout

ADVICE = (
    "give the (width, height) of every picture as the processor got it, row by row; settings that were passed in the "
    "call must be set on the processor instead"
)


def require_layouts(host: Host | ViTHost) -> Callable[..., list[Layout]]:
    """The host's layouts function; HostError when it has none."""
    if host.layouts is None:
        raise HostError(f"host {host.name!r} has no geometry: give it a `layouts` function to map tokens to pixels")
    return host.layouts


def checked(
    layouts: list[Layout],
    host: Host | ViTHost,
    model: Any,
    inputs: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]],
) -> list[Layout]:
    """The layouts, if there is one per picture and they have as many tokens as the prompt has placeholders."""
    if len(layouts) != len(sizes):
        raise InputError(f"{len(sizes)} sizes for {len(layouts)} pictures: {ADVICE}")
    if isinstance(host, Host) and not hasattr(inputs, "shape") and inputs.get("input_ids") is not None:
        _require_tensor("input_ids", inputs)
        wanted = int((inputs["input_ids"] == getattr(model.config, host.image_token)).sum())
        found = sum(len(layout) for layout in layouts)
        if wanted != found:
            raise InputError(
                f"the prompt has {wanted} image tokens, pictures of sizes {[tuple(s) for s in sizes]} give {found}: {ADVICE}"
            )
    return layouts


def require_count(name: str, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], exact: bool = True) -> None:
    """InputError unless `inputs[name]` is a tensor and, when `exact`, has one entry per picture."""
    if name not in inputs:
        raise InputError(f"the inputs have no {name!r}: they hold {sorted(inputs)}")
    _require_tensor(name, inputs)
    if exact and inputs[name].shape[0] != len(sizes):
        raise InputError(f"{len(sizes)} sizes for {inputs[name].shape[0]} pictures in {name!r}: {ADVICE}")


def require_sizes(inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> None:
    """InputError unless the sizes are those that the processor noted in `image_sizes` (as height, width)."""
    require_count("image_sizes", inputs, sizes)
    noted = [(int(width), int(height)) for height, width in inputs["image_sizes"].tolist()]
    if noted != [tuple(size) for size in sizes]:
        raise InputError(f"sizes {[tuple(s) for s in sizes]} are not those of the inputs, {noted}: {ADVICE}")


def _require_tensor(name: str, inputs: Mapping[str, Any]) -> None:
    if not hasattr(inputs[name], "shape"):
        kind = type(inputs[name]).__name__
        raise InputError(
            f"inputs[{name!r}] is a {kind}: call the processor with return_tensors='pt', one batch at a time"
        )

"""What `attach` refuses before it touches anything: wrong arguments, conflicts, models that carry systems already."""

from __future__ import annotations

from inspect import signature
from itertools import dropwhile
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from torch import nn

from sightline.engine.system import System
from sightline.errors import AttachError, HostError, ModelError, ParameterError, SightlineError, nearest
from sightline.hosts import Host, ViTHost

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MARK = "_sightline_attachment"  # where a model keeps its attachment
STATIC = (
    "a static cache has one length for all layers: use cache_implementation='dynamic' with systems that drop tokens inside "
    "the language model"
)
DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")  # of assisted decoding
VISION = {"pixels", "vision_hidden", "vision_attention"}  # stations that plain vision transformers have, too


def check_model(model: Any) -> None:
    """Raise ParameterError unless `model` is a torch module (not a wrapper of one), ModelError when its weights are empty."""
    if isinstance(model, System):
        raise ParameterError(f"attach(model, *systems): the model comes first, then {_short(model)}")
    if isinstance(getattr(model, "model", None), nn.Module) and not isinstance(model, nn.Module):
        raise ParameterError(
            f"attach(model, *systems): {type(model).__name__} is not the model itself: give its .model"
        )
    if not isinstance(model, nn.Module):
        raise ParameterError(
            f"attach(model, *systems): {_short(model)} is no model: give a torch module, for example sl.load('tiny').model"
        )
    check_weights(model)


def check_weights(model: nn.Module) -> None:
    """Raise ModelError when weights have no values (the meta device); those that accelerate brings in by need are fine."""
    empty = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if empty is not None and not {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())):
        raise ModelError(
            f"{type(model).__name__} has no values in its weights (device meta, for example {empty}): load it with "
            "sl.load(...) or from_pretrained, on a real device"
        )


def check_generation(model: nn.Module, systems: Sequence[System], options: Mapping[str, Any]) -> None:
    """Raise ParameterError (HostError for a static cache) for what keeps these systems in `generate` from what they say."""
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))

    def asked(name: str) -> Any:
        found = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in found if value is not None), None)

    named = [system.slug or type(system).__name__ for system in systems]
    if asked("prefill_chunk_size") is not None:
        raise ParameterError(
            f"generate with prefill_chunk_size={asked('prefill_chunk_size')!r}: {'+'.join(named)} must see a prompt with all "
            "its pictures in one piece: leave it out"
        )
    cautious = [name for name, system in zip(named, systems, strict=True) if not system.drafts]
    drafting = next((name for name in DRAFTING if asked(name) not in (None, False)), None)
    if drafting and cautious:
        raise ParameterError(
            f"generate with {drafting}: {'+'.join(cautious)} acts on one new token at a time, assisted decoding reads several: "
            "leave it out"
        )
    keeping = [name for name, system in zip(named, systems, strict=True) if "cache" in system.stations()]
    if keeping and "static" in str(asked("cache_implementation")):
        raise HostError(STATIC)
    if asked("use_cache") is False and keeping:
        raise ParameterError(f"generate with use_cache=False: {'+'.join(keeping)} acts on the cache: leave it out")


def check_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ParameterError for what is no argument of `model.generate`."""
    takers = (model.generate, model.forward, model.prepare_inputs_for_generation)
    known = {name for taker in takers for name in signature(taker).parameters} | set(vars(model.generation_config))
    known = sorted(name for name in known - {"kwargs", "model_kwargs"} if not name.startswith("_"))
    for name in options:
        if name not in known:
            raise ParameterError(f"generate has no argument {name!r}: {nearest(name, known)}")


def generate(model: nn.Module, inputs: Mapping[str, Any], given: Mapping[str, Any], **defaults: Any) -> Any:
    """`model.generate` with arguments of a user: what it says against them is a ParameterError.

    Errors of the model at work, or of this package, pass as they are: they are no fault of the arguments.
    """
    try:
        return model.generate(**inputs, **{**defaults, **given})
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, SightlineError) or not given or _at_work(error):
            raise
        told = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ParameterError(f"generate cannot run with {told} ({reason}): leave out or mend what it names") from error


def _at_work(error: Exception) -> bool:
    """Whether an error of `generate` came from below it: a module's forward, or code of this package that it called."""
    callers = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    below = dropwhile(lambda name: name.startswith("sightline."), callers)  # who called it
    return any(name == nn.Module.__module__ or name.startswith("sightline.") for name in below)


def check_systems(systems: Any) -> None:
    """Raise ParameterError for what is no system, AttachError for two that cannot run together."""
    if isinstance(systems, System | str) or not isinstance(systems, list | tuple):
        raise ParameterError(f"systems={_short(systems)}: give a list of systems, for example [sl.steer.VAR()]")
    for system in systems:
        if not isinstance(system, System):
            raise ParameterError(f"{_short(system)} is not a system{_mend(system)}")
    for i, first in enumerate(systems):
        for second in systems[i + 1 :]:
            why = first.conflicts(second) or second.conflicts(first)
            if why:
                raise AttachError(f"{first.slug or first!r} and {second.slug or second!r} cannot run together: {why}")


def check_free(model: nn.Module) -> None:
    """Raise AttachError when the model or a part of it carries systems already."""
    if MARK in model.__dict__:
        names = "+".join(s.slug or type(s).__name__ for s in model.__dict__[MARK].systems) or "none"
        raise AttachError(
            f"this model already carries [{names}]: leave that first, or give all systems to one attach(...)"
        )
    if any("_sightline" in m.__dict__ or MARK in m.__dict__ for m in model.modules()):
        raise AttachError("a part of this model already carries systems: detach them from that part first")


def postponed(model: nn.Module, room: int) -> bool:
    """Whether systems on the model may shorten a prompt before the decoder: there what is left is held against `room`."""
    attached = model.__dict__.get(MARK)
    if attached is None or not any("visual_tokens" in worker.stations for worker in attached.workers):
        return False
    attached.front.room = room
    return True


def check_host(host: Any) -> None:
    """Raise ParameterError unless `host` is a description of a host, or None."""
    if host is not None and not isinstance(host, Host | ViTHost):
        raise ParameterError(f"host={_short(host)} is not a sightline.hosts.Host: leave it out for a known model class")


def require_vision(model: nn.Module, text: Iterable[str]) -> None:
    """Raise HostError when stations of the language model are wanted of a plain vision transformer."""
    if text:
        raise HostError(f"{type(model).__name__} has no language model: stations {sorted(text)} do not exist there")


def _mend(given: Any) -> str:
    """How to write what was probably meant instead of `given`."""
    if isinstance(given, type) and issubclass(given, System):
        return f" but its class: write {given.__name__}()"
    if isinstance(given, str):
        return f": sl.catalog.parse({given!r}) makes the list of systems that such a text names"
    if isinstance(given, list | tuple):
        return ": give several one by one, attach(model, first, second) or attach(model, *systems)"
    if isinstance(given, nn.Module) and getattr(given, "slug", ""):
        return f" to attach: {given.slug} is a module to build networks with"
    if isinstance(given, nn.Module):
        return ": the model comes first, attach(model, *systems)"
    return "; see `sightline list` for all of them"


def _short(given: Any) -> str:
    """What was given, on one short line: the printouts of models and processors fill pages."""
    text = repr(given)
    if isinstance(given, nn.Module) or "\n" in text:
        return type(given).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."

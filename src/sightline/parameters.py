"""Parameters of systems: fields of dataclasses with their help and range, their checks, their command-line form."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from functools import cache
from typing import Any

from sightline.errors import ParameterError, nearest


def param(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its help and allowed range; `check_parameters` enforces the range."""
    metadata = {"help": help, "low": low, "high": high}
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_parameters(instance: Any) -> None:
    """Raise ParameterError for the first field (or member of a tuple) outside the range of its `param`, or of another type."""
    hints = _hints(type(instance))
    for f in dataclasses.fields(instance):
        value, name = getattr(instance, f.name), f"{type(instance).__name__}: {f.name}"
        if value is not None and not _in_range(value, f):
            low, high = _range(f)
            raise ParameterError(f"{name}={value!r} is out of range; choose {f.name} in [{low:g}, {high:g}]")
        options = _options(hints[f.name])
        if not any(_suits(value, option) for option in options):
            raise ParameterError(f"{name}={value!r}: choose {' or '.join(map(_wanted, options))}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _range(f: dataclasses.Field) -> tuple[float, float]:
    low, high = f.metadata.get("low"), f.metadata.get("high")
    return -float("inf") if low is None else low, float("inf") if high is None else high


def _in_range(value: Any, f: dataclasses.Field) -> bool:
    if f.metadata.get("low") is None and f.metadata.get("high") is None:
        return True
    low, high = _range(f)
    members = value if isinstance(value, (tuple, list)) and "tuple" in str(f.type) else (value,)
    return all(_is_number(m) and low <= m <= high for m in members)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _suits(value: Any, option: Any) -> bool:
    """Whether a value is of a declared type."""
    origin, members = typing.get_origin(option) or option, typing.get_args(option)
    if origin is typing.Literal:
        return isinstance(value, str) and value in members
    if origin is tuple:
        return isinstance(value, tuple) and all(_suits(m, members[0]) for m in value)
    if origin is float:
        return _is_number(value)
    if origin is int:
        return _is_number(value) and isinstance(value, int)
    return not isinstance(origin, type) or isinstance(value, origin)


def _wanted(option: Any) -> str:
    """What a declared type asks for, in words."""
    origin, members = typing.get_origin(option) or option, typing.get_args(option)
    if origin is typing.Literal:
        return " or ".join(filter(None, [", ".join(members[:-1]), members[-1]]))
    if origin is tuple:
        return f"a tuple, each {_wanted(members[0])}"
    words = {float: "a number", int: "a whole number", bool: "True or False", str: "text", type(None): "None"}
    return words.get(origin) or f"a {getattr(origin, '__name__', origin)}"


def convert(slug: str, key: str, text: str, hint: Any) -> Any:
    """`text` as the type that the field declares: numbers, true/false, none, or a/b/c for a tuple."""
    options = _options(hint)
    if text.lower() == "none" and type(None) in options:
        return None
    for option in options:
        origin = typing.get_origin(option) or option
        try:
            if origin is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if origin is tuple:
                return tuple(json.loads(part) for part in text.split("/"))
            if origin in (int, float):
                return origin(text)
            if origin is str:
                return text
            if origin is typing.Literal and text in typing.get_args(option):
                return text
        except ValueError:
            continue
    choices = [
        choice
        for option in options
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
    if choices:
        raise ParameterError(f"{slug}: cannot read {key}={text!r}: {nearest(text, choices)}")
    named = {type(None): "none", bool: "true or false", tuple: "tuple (written 1/2/3)"}
    origins = [typing.get_origin(option) or option for option in options]
    wanted = " or ".join(named.get(origin, getattr(origin, "__name__", str(origin))) for origin in origins)
    raise ParameterError(f"{slug}: cannot read {key}={text!r}; a value of type {wanted} is needed")

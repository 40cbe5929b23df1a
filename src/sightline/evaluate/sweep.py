"""Several systems in one word of the command line: `var:p=0.2..1.0/5` stands for five, `var:p=0.2|0.4|1` for three.

Of several such values the whole grid is meant.
"""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

from sightline.errors import ParameterError

if TYPE_CHECKING:
    from sightline.catalog import Entry
    from sightline.engine.system import System

SEVERAL = re.compile(r"=([^,+=]*(?:\.\.|\|)[^,+=]*)(?=[,+]|$)")  # a value that stands for several
RANGE = re.compile(r"(-?[\d.eE+-]+?)\.\.(-?[\d.eE+-]+?)(?:/(.*))?")
MAX_STEPS, MAX_GRID = 101, 400


def expand(spec: str) -> list[str]:
    """The specs that a spec with ranges stands for, itself when it has none.

    "p=0.2..1.0/5" gives 0.2, 0.4, 0.6, 0.8, 1.0; whole numbers stay whole when the steps allow it. "p=0.2|0.9" gives 0.2
    and 0.9. Of several of these all combinations are made, the last one fastest.

    Raises:
        ParameterError: a range is malformed, a choice empty, or there are too many combinations.
    """
    parts = SEVERAL.split(spec)
    texts, several = parts[0::2], [_choices(spec, value) for value in parts[1::2]]
    size = 1
    for values in several:
        size *= len(values)
    if size > MAX_GRID:
        raise ParameterError(f"{spec!r} stands for {size} combinations: ask for at most {MAX_GRID}")
    return ["".join(_weave(texts, chosen)) for chosen in product(*several)]


def _choices(spec: str, value: str) -> list[str]:
    """What one value stands for."""
    if "|" in value:
        choices = [choice.strip() for choice in value.split("|")]
        if not all(choices):
            raise ParameterError(f"an empty choice in {spec!r}: write for example var:p=0.2|0.4|1")
        return choices
    if "../" in value:  # a path
        return [value]
    found = RANGE.fullmatch(value)
    if found is None:
        raise ParameterError(f"cannot read the range in {spec!r}: write for example var:p=0.2..1.0/5")
    return _values(spec, *found.groups())


def _weave(texts: list[str], chosen: tuple[str, ...]) -> list[str]:
    return [
        piece for text, value in zip(texts, (*(f"={v}" for v in chosen), ""), strict=True) for piece in (text, value)
    ]


def _values(spec: str, low: str, high: str, steps: str | None) -> list[str]:
    try:
        first, last, n = float(low), float(high), int(steps or "5")
    except ValueError as error:
        raise ParameterError(f"cannot read {low}..{high}/{steps} in {spec!r}: write LOW..HIGH/STEPS") from error
    if not 2 <= n <= MAX_STEPS or not first < last:
        raise ParameterError(
            f"range {low}..{high}/{n} in {spec!r}: LOW must be below HIGH, and STEPS in [2, {MAX_STEPS}]"
        )
    values = [first + (last - first) * k / (n - 1) for k in range(n)]
    whole = all("." not in text and "e" not in text.lower() for text in (low, high))
    if whole and all(abs(v - round(v)) < 1e-9 for v in values):
        return [str(round(v)) for v in values]
    return [f"{v:.6g}" for v in values]


def parse_all(specs: list[str] | tuple[str, ...]) -> list[list[System]]:
    """Systems of every spec, ranges expanded. ParameterError or UnknownNameError as `catalog.parse`."""
    from sightline.catalog import parse

    return [parse(one) for spec in specs for one in expand(spec)]


def default_grid(found: Entry, steps: int = 5) -> str:
    """A spec with a range for `sightline tune` when none is given: the first number whose range is bounded.

    Raises:
        ParameterError: the system has no such parameter.
    """
    for field in found.parameters:
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if low is not None and high is not None and isinstance(field.default, float):
            return f"{found.slug}:{field.name}={float(low)}..{float(high)}/{steps}"
    known = ", ".join(field.name for field in found.parameters) or "none"
    raise ParameterError(
        f"{found.slug} has no parameter with a range (it has {known}): give --grid 'name=LOW..HIGH/STEPS'"
    )

"""The examples of docs/dropping-before.md and docs/dropping-inside.md: each system of one's own drops what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sightline as sl
from sightline.engine.sequences import made_cache
from sightline.engine.system import System
from tests.tiny_hosts import picture

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "layers"), [("dropping-before", range(4)), ("dropping-inside", range(2, 4))])
def test_a_system_of_your_own(page, layers, tiny):
    """Behind its cut 3 of the 36 visual tokens are left, and all text."""
    (code,) = re.findall("```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("64", "3")
    names: dict[str, object] = {"__name__": __name__}  # a dataclass asks for its module
    exec(code, names)
    (made,) = [v for v in names.values() if isinstance(v, type) and issubclass(v, System) and v.__module__ == __name__]
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?"], [[picture()]])
    with sl.attach(host.model, made()), torch.no_grad():
        cache = made_cache(host.model(**inputs))
    whole = inputs["input_ids"].shape[1]
    wanted = [whole - 33 if k in layers else whole for k in range(4)]
    assert [layer.keys.shape[2] for layer in cache.layers] == wanted

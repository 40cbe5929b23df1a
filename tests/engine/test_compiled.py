"""Systems on a model that was, is, or will be compiled: torch does not guard on hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sightline as sl
from sightline.hosts import ViTHost
from tests.engine.test_traps import one
from tests.engine.toys import nothing, toy
from tests.engine.whole import generate


class Backend:
    """Counts compilations and runs."""

    def __init__(self) -> None:
        self.compiled, self.runs = 0, 0

    def __call__(self, graph: nn.Module, inputs: list):
        self.compiled += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


TOWER = ViTHost("tower", ("Tower",), tower_layers="blocks", tower_attention="attn", fused=True)


def grey():
    return toy(pixels=lambda site, x: torch.full_like(x, 0.5))


@pytest.fixture
def vit():
    """The smallest of towers (compiling takes long), its input, and what it gives without and with `grey`."""
    model = Tower()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    yield model, x, model(x), model(torch.full_like(x, 0.5))
    torch.compiler.reset()


def test_compiled_before(vit):
    """The compiled code of the plain model is not run while systems are attached, and not lost."""
    model, x, plain, edited = vit
    backend = Backend()
    fast = torch.compile(model, backend=backend)
    assert torch.equal(fast(x), plain)
    runs, compiled = backend.runs, backend.compiled
    assert runs > 0
    with sl.attach(model, grey(), host=TOWER):
        assert torch.equal(fast(x), edited)
    assert backend.runs == runs
    assert torch.equal(fast(x), plain)
    assert backend.runs > runs
    assert backend.compiled == compiled, "it had to be compiled again"


def test_compiled_in_place(vit):
    model, x, plain, edited = vit
    model.compile(backend=Backend())
    assert torch.equal(model(x), plain)
    with sl.attach(model, grey(), host=TOWER):
        assert torch.equal(model(x), edited)
    assert torch.equal(model(x), plain)


def test_compiled_inside_the_block(vit):
    """Systems that have left do not live on in compiled code."""
    model, x, plain, edited = vit
    with sl.attach(model, grey(), host=TOWER):
        fast = torch.compile(model, backend=Backend())
        assert torch.equal(fast(x), edited)
    assert torch.equal(fast(x), plain)


def test_several_attachments_open_and_close_in_any_order(vit, tiny_vit):
    model, x, plain, edited = vit
    other = copy.deepcopy(tiny_vit("clip").model)
    backend = Backend()
    fast = torch.compile(model, backend=backend)
    fast(x)
    first = sl.attach(other, nothing_visual())
    second = sl.attach(model, grey(), host=TOWER)
    first.close()
    runs = backend.runs
    assert torch.equal(fast(x), edited)
    assert backend.runs == runs, "torch.compile came back too early"
    second.close()
    assert torch.equal(fast(x), plain)
    assert backend.runs > runs, "torch.compile stayed off"


def nothing_visual():
    return toy(vision_attention=lambda site: None)


def test_what_does_not_act_does_not_slow_down(vit):
    model, x, plain, _ = vit
    backend = Backend()
    fast = torch.compile(model, backend=backend)
    idle = grey()
    type(idle).idle = lambda self: True
    with sl.attach(model, idle, host=TOWER):
        assert torch.equal(fast(x), plain)
    assert backend.runs > 0


def test_a_stance_of_ones_own_comes_back(vit):
    model, x, _, _ = vit
    backend = Backend()
    fast = torch.compile(model, backend=backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        with sl.attach(model, grey(), host=TOWER):
            fast(x)
        with pytest.raises(RuntimeError, match="recompile"):
            fast(x)


@pytest.mark.slow
@pytest.mark.parametrize("station", ["hidden", "logits"])
def test_generate_with_a_static_cache_that_compiles_itself(station, tiny):
    """As on a GPU: the first answer compiles the decoding step, the second has systems, the third has none again."""
    from transformers import CompileConfig

    host = tiny("llava")
    model = copy.deepcopy(host.model)
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}

    def system():
        if station == "logits":
            return toy(logits=lambda site, x: x.roll(1, -1))
        return toy(hidden=lambda site, x: x + 0.3 if site.layer == 1 else None)

    plain = generate(model, one(host), 4, cache_implementation="static")
    with sl.attach(model, system(), nothing(without="cache")):
        wanted = generate(model, one(host), 4, cache_implementation="static")
    assert torch.equal(generate(model, one(host), 4, **options)[1], plain[1])
    assert hasattr(model, "_compiled_call"), "nothing was compiled"
    with sl.attach(model, system(), nothing(without="cache")):
        found = generate(model, one(host), 4, **options)
    assert torch.equal(found[1], wanted[1])
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(generate(model, one(host), 4, **options)[1], plain[1])
    torch.compiler.reset()

"""`bench mixers`: exponents, what a run writes, going on, what is left out, bad requests."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sightline import catalog, mix
from sightline.bench import allocator, mixers
from sightline.bench.measure import exponent, measure, timed
from sightline.errors import InputError, ParameterError, UnknownNameError
from sightline.evaluate.cost import UNCOUNTED
from sightline.evaluate.peak import live_bytes

SMALL = {"names": ["flowformer", "gna"], "lengths": [64, 256], "dim": 8, "heads": 2, "repeats": 1}


def test_exponent_of_powers() -> None:
    lengths = [256, 1024, 4096, 16384]
    for power in (0.5, 1.0, 2.0):
        assert exponent(lengths, [3e-6 * n**power for n in lengths], least=256) == pytest.approx(power)
    bent = [1.0, 1.0, 2.0, 8.0]  # from 4096 on it is linear
    assert exponent(lengths, bent) == pytest.approx(1.0)
    assert exponent([256, 4096], [1.0, 2.0]) is None


def test_measure_counts_memory_exactly() -> None:
    layer = torch.nn.Linear(16, 32)
    found = measure(layer, torch.randn(10, 16), repeats=2)
    weights = 4 * (16 * 32 + 32)
    assert found.forward_bytes == weights + 4 * 10 * 32
    assert found.train_bytes > found.forward_bytes + weights  # gradients
    assert found.train_s > 0 < found.forward_s
    assert found.train_cpu_s > 0 < found.forward_cpu_s


def test_the_memory_of_a_whole_map_is_seen() -> None:
    class Whole(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x[..., :3])  # widths differ: no fused kernel

    assert measure(Whole(1, 1), torch.randn(1, 1, 300, 8), repeats=1).forward_bytes > 4 * 300 * 300
    single = mix.SHSA(24, 1).eval()
    found = measure(single, torch.randn(1, 30, 30, 24), repeats=1)
    assert found.forward_bytes < 4 * 900 * 900 / 2  # padded to one width: no map


def test_processor_time_is_not_the_time_waited() -> None:
    import time

    wall, cpu = timed(lambda: time.sleep(0.05), torch.device("cpu"), 1, 1.0)
    assert cpu < 0.03 < 0.05 <= wall


def test_every_mixer_of_the_catalogue_is_measured() -> None:
    classes = {type(make(256, 32, 4)) for make in mixers.MIXERS.values()}
    assert {e.cls for e in catalog.load_all().values() if e.kind == "mix"} <= classes


def test_the_baseline_is_dense_attention() -> None:
    module = mixers.MIXERS[mixers.BASELINE](64, 8, 2)
    assert isinstance(module, mix.MoH)
    x = torch.randn(1, 8, 8, 8)
    assert torch.equal(module.gates(x), torch.ones(1, 8, 8, 2))
    assert module.cost((8, 8)).saving == pytest.approx(1.0)


def test_a_run_and_its_continuation(tmp_path) -> None:
    lines: list[str] = []
    results = mixers.run(tmp_path / "run", **SMALL, progress=lines.append)
    assert len(lines) == 6  # the baseline comes first, unasked
    assert list(results["mixers"]) == ["sdpa", "flowformer", "gna"]
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    text = (tmp_path / "run/table.md").read_text()
    assert text.count("| flowformer |") == 6
    assert (tmp_path / "run/scaling.png").stat().st_size > 10_000
    row = results["mixers"]["gna"]["rows"][1]
    assert row["flops"] == mix.GNA(8, 2, window=7, stride=7).cost((16, 16)).flops
    answers = tmp_path / "run/answers.jsonl"
    before = answers.read_text().splitlines()
    answers.write_text("\n".join(before[:3]) + "\n")  # killed after three
    again: list[str] = []
    mixers.run(tmp_path / "run", **SMALL, progress=again.append)
    assert len(again) == 3
    assert answers.read_text().splitlines()[:3] == before[:3]
    with pytest.raises(InputError, match="dim"):
        mixers.run(tmp_path / "run", **SMALL | {"dim": 16})


def test_lengths_that_would_take_too_long_are_left_out(tmp_path) -> None:
    settings = SMALL | {"names": ["sdpa"], "lengths": [64, 1024, 4096], "limit": 1e-6}
    results = mixers.run(tmp_path / "run", **settings)
    answers = [row["answer"] for row in results["mixers"]["sdpa"]["rows"]]
    assert answers[0] == "measured"
    assert "expected" in answers[1]
    assert "left out" in answers[2]
    assert "–" in (tmp_path / "run/table.md").read_text()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"names": ["flow"]}, UnknownNameError, "flowformer"),
        ({"lengths": [100, 200]}, ParameterError, "200"),
        ({"lengths": [16]}, ParameterError, "16"),
        ({"dim": 9}, ParameterError, "dim=9"),
        ({"limit": 0.0}, ParameterError, "limit"),
        ({"repeats": 0}, ParameterError, "repeats"),
        ({"dtype": "int8"}, ParameterError, "int8"),
    ],
)
def test_bad_requests_write_nothing(tmp_path, change, error, match) -> None:
    with pytest.raises(error, match=match):
        mixers.run(tmp_path / "run", **SMALL | change)
    assert not (tmp_path / "run").exists()


LINEAR = ("fna", "gna", "flowformer", "inline", "agent", "halonet", "davit", "davit-window", "volo")


@pytest.mark.parametrize("name", LINEAR)
def test_linear_mixers_are_linear(name) -> None:
    """Operations that torch counts and bytes held, from 4 096 to 16 384 tokens. Seconds are the bench's own affair."""
    counted = {"operations": [], "bytes": [], "stated": []}
    for n in (4096, 16384):
        side = math.isqrt(n)
        module, x = mixers.MIXERS[name](n, 16, 2), torch.zeros(1, side, side, 16)
        with torch.no_grad():
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                module(x)
            counted["operations"].append(counter.get_total_flops())
            counted["bytes"].append(live_bytes(lambda module=module, x=x: module(x)))
        counted["stated"].append(module.cost((side, side)).flops)
    for what, values in counted.items():
        assert exponent([4096, 16384], values) <= 1.1, (name, what, values)
    assert exponent([4096, 16384], counted["operations"]) > 0.9


def test_dense_attention_is_not_linear() -> None:
    """The limit above could be missed."""
    stated = [mixers.MIXERS["sdpa"](n, 16, 2).cost((n,)).flops for n in (4096, 16384)]
    assert exponent([4096, 16384], stated) > 1.8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept() -> None:
    """In a process of its own, because it lasts: blocks of 64 MiB, freed and taken again, fault in their pages once."""
    code = """
import ctypes, resource, runpy, sys
if sys.argv[1] == "keep" and not runpy.run_path(sys.argv[2])["keep_freed_memory"]():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for round in range(4):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", code, mode, allocator.__file__], capture_output=True, text=True, check=False
        )
        if done.returncode == 3:
            pytest.skip("the C library is not glibc")
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    if faults["leave"] < 30_000:
        pytest.skip("this system keeps freed memory, or has larger pages, by itself")
    assert faults["keep"] < 0.5 * faults["leave"]

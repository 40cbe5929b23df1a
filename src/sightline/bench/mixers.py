"""`sightline bench mixers`: every mixer beside dense attention, from 256 to 65 536 tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sightline import __version__, mix
from sightline.bench.allocator import keep_freed_memory
from sightline.bench.measure import exponent, measure
from sightline.errors import ParameterError, UnknownNameError, nearest
from sightline.evaluate.folder import RunFolder
from sightline.mix.parts.base import Mixer

LENGTHS = (256, 1024, 4096, 16384, 65536)  # squares of 16 ... 256
QUICK = (256, 1024, 4096)
BASELINE = "sdpa"

# name -> mixer for n tokens with that width and number of heads; each as its paper has it.
MIXERS: dict[str, Callable[[int, int, int], Mixer]] = {
    BASELINE: lambda n, dim, heads: mix.MoH(dim, heads),  # with neither shared nor routed heads: plain attention
    "fna": lambda n, dim, heads: mix.FNA(dim, heads, window=7),
    "gna": lambda n, dim, heads: mix.GNA(dim, heads, window=7, stride=7),
    "flowformer": lambda n, dim, heads: mix.Flow(dim, heads),
    "inline": lambda n, dim, heads: mix.InLine(dim, heads),
    "agent": lambda n, dim, heads: mix.Agent(dim, heads, agents=49, window=math.isqrt(n)),
    "biformer": lambda n, dim, heads: mix.BRA(dim, heads, regions=7, topk=4),
    "halonet": lambda n, dim, heads: mix.Halo(dim, heads, block=8, halo=3),
    "davit": lambda n, dim, heads: mix.ChannelAttention(dim, heads),
    "davit-window": lambda n, dim, heads: mix.WindowAttention(dim, heads, window=7),
    "hilo": lambda n, dim, heads: mix.HiLo(dim, heads, window=2, alpha=0.5),
    "moh": lambda n, dim, heads: mix.MoH(dim, heads, shared=heads // 2, routed=max(1, heads // 4)),
    "routing-transformer": lambda n, dim, heads: mix.Routing(dim, heads, clusters=math.isqrt(n)),
    "sinklora": lambda n, dim, heads: mix.SinkAttention(dim, heads),
    "shvit": lambda n, dim, heads: mix.SHSA(dim, 1),
    "volo": lambda n, dim, heads: mix.Outlook(dim, heads),
}
SEQUENCES = ("sinklora",)  # take (B, N, C) only


def run(
    out: Path,
    *,
    names: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    dim: int = 128,
    heads: int = 4,
    limit: float = 60.0,
    repeats: int = 5,
    train: bool = True,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    keep_memory: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure what is not measured yet in `out`, and write results.json, table.md and scaling.png there.

    Args:
        limit: seconds of one forward and backward beyond which a length is left out, guessed from the length before.
        keep_memory: let this process keep what it frees, for good (see `bench.allocator`), so that operators are
            measured and not the C library; what was done is said in the results.

    Raises:
        ParameterError, UnknownNameError: for values out of range, before any work.
        InputError: a folder that holds a run with other settings.
    """
    names = list(MIXERS) if names is None else [BASELINE, *(n for n in names if n != BASELINE)]
    check(names, lengths, dim, heads, limit, repeats, dtype)
    where = torch.device(device)
    kept = keep_memory and where.type == "cpu" and keep_freed_memory()
    config = {
        "kind": "bench mixers", "version": __version__, "torch": torch.__version__, "names": names,
        "lengths": list(lengths), "dim": dim, "heads": heads, "limit": limit, "repeats": repeats, "train": train,
        "device": hardware(where), "threads": torch.get_num_threads(), "dtype": dtype, "seed": seed,
        "freed_memory": "kept" if kept else "as the allocator has it",
    }  # fmt: skip
    with RunFolder(out, config) as folder:
        for name in names:
            for n in lengths:
                if ("mixers", name, str(n)) in folder.answers:
                    continue
                row = _cell(name, n, folder.answers.values(), config, where)
                folder.add([row])
                progress(f"{name} {n}: {describe(row)}")
        results = summary(config, folder.answers.values())
        import json

        from sightline.bench.figures import scaling, table
        from sightline.evaluate.folder import write_file

        write_file(folder.path / "results.json", json.dumps(results, indent=1) + "\n")
        write_file(folder.path / "table.md", table(results))
        scaling(results).savefig(folder.path / "scaling.png", dpi=150)
    return results


def check(
    names: Iterable[str], lengths: Sequence[int], dim: int, heads: int, limit: float, repeats: int, dtype: str
) -> None:
    for name in names:
        if name not in MIXERS:
            raise UnknownNameError(f"no mixer {name!r} in the bench: {nearest(name, list(MIXERS))}")
    for n in lengths:
        if n < 64 or math.isqrt(n) ** 2 != n:
            raise ParameterError(f"lengths={n!r}: choose square numbers from 64 on, for example 256, 1024, 4096")
    if heads < 2 or dim % heads or (dim // heads) % 2:
        raise ParameterError(f"dim={dim}, heads={heads}: choose 2 heads or more, of an even number of channels each")
    if limit <= 0 or repeats < 1:
        raise ParameterError(f"limit={limit!r}, repeats={repeats!r}: choose positive numbers")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ParameterError(f"dtype={dtype!r}: choose float32, bfloat16 or float16")


def _cell(name: str, n: int, rows: Iterable[dict[str, Any]], config: dict[str, Any], device: torch.device) -> dict:
    """One measurement, or why it was left out."""
    row = {"task": "mixers", "with": name, "id": str(n), "answer": "measured"}
    torch.manual_seed(config["seed"])
    module = MIXERS[name](n, config["dim"], config["heads"]).to(device, getattr(torch, config["dtype"]))
    side = math.isqrt(n)
    grid = (n,) if name in SEQUENCES else (side, side)
    cost = module.cost(grid)
    row |= {"flops": cost.flops}
    before = [r for r in rows if r["with"] == name and int(r["id"]) < n]
    if before:
        last = before[-1]
        taken = last.get("train_s") or last.get("forward_s")
        guess = taken * max(1.0, cost.flops / last["flops"]) if taken else math.inf
        if guess > config["limit"]:
            why = f"about {guess:.0f} s expected" if taken else "the length before was left out"
            return row | {"answer": f"left out: {why}"}
    x = torch.randn(1, *grid, config["dim"], device=device, dtype=getattr(torch, config["dtype"]))
    try:
        found = measure(module, x, repeats=config["repeats"], train=config["train"])
    except (torch.OutOfMemoryError, MemoryError) as error:
        return row | {"answer": f"left out: out of memory ({type(error).__name__})"}
    return row | vars(found)


def describe(row: dict[str, Any]) -> str:
    if row["answer"] != "measured":
        return row["answer"]
    train = f", with backward {1e3 * row['train_s']:.1f} ms" if row["train_s"] else ""
    return f"forward {1e3 * row['forward_s']:.1f} ms{train}, peak {row['forward_bytes'] / 2**20:.0f} MiB"


def summary(config: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rows by mixer, and exponents of time, memory and operations from 4 096 tokens on (from all lengths in a short run)."""
    rows = list(rows)
    least = 4096 if max(config["lengths"]) > 4096 else 256
    mixers = {}
    for name in config["names"]:
        mine = sorted((r for r in rows if r["with"] == name), key=lambda r: int(r["id"]))
        done = [r for r in mine if r["answer"] == "measured"]
        lengths = [int(r["id"]) for r in done]
        powers = {
            key: exponent(lengths, [r[key] for r in done], least=least)
            for key in ("forward_s", "forward_cpu_s", "train_s", "train_cpu_s", "forward_bytes", "flops")
            if all(r.get(key) for r in done)
        }
        mixers[name] = {"rows": mine, "exponents": powers}
    return {"config": config, "exponents_from": least, "mixers": mixers}


def hardware(device: torch.device) -> str:
    """The name of the card or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or "cpu"

"""`sightline bench gna-sim`: the most that a tiled kernel can gain from generalized neighborhood attention, without a GPU.

For every stride up to the window: tiles visited with static key tiles (bound, worst tile) and dynamic ones, against the bound by
operations prod(grid) / prod(window). See `sightline.mix.parts.tiles` for the count; GNA is arXiv 2504.16922.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sightline.errors import ParameterError
from sightline.mix.parts.tiles import Tiles, best_stride, flat_bound, tile_bound
from sightline.mix.parts.windows import windows_of
from sightline.outfolder import fresh_folder

FLAT_LIMIT = 4096  # largest grid whose whole mask is built for the flattened tiling


@dataclass(frozen=True)
class Problem:
    """One layer of attention and the tiles of a kernel."""

    name: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # the paper's choice
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False


PUBLISHED = (
    Problem("1-D, 32 768 tokens", (32768,), (2048,), (256,), (128,), (256,)),
    Problem("FLUX 4K", (256, 256), (80, 80), (16, 16), (8, 16), (16, 16)),
    Problem("FLUX 4K, Hopper tiles", (256, 256), (80, 80), (16, 8), (16, 8), (16, 16)),
    Problem("HunyuanVideo 720p", (30, 48, 80), (18, 24, 24), (2, 8, 8), (2, 8, 8), (16, 8, 8)),
)


def run(
    problems: Sequence[Problem] = PUBLISHED, *, share: float = 0.6, out: Path | None = None, force: bool = False
) -> list[dict[str, Any]]:
    """Simulate `problems`; with `out` also results.json, table.md and bounds.png.

    share: attention's part of a whole step, for the end-to-end speed-up.

    Raises:
        ParameterError: windows that do not fit the grid, tiles below 1, shares outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ParameterError(f"share={share!r} is out of range: choose share in [0, 1]")
    results = [simulate(problem, share) for problem in problems]
    if out is not None:
        with fresh_folder(out, force) as folder:
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (folder / "table.md").write_text(table(results))
            draw(results).savefig(folder / "bounds.png", dpi=150)
    return results


def simulate(problem: Problem, share: float) -> dict[str, Any]:
    """Bounds of one problem at stride 1, at every common stride, at its own stride, and at the smallest best stride."""
    facts = {"q_tile": problem.q_tile, "kv_tile": problem.kv_tile}
    given = {"dilation": problem.dilation, "causal": problem.causal}

    def at(stride: tuple[int, ...]) -> dict[str, Any]:
        tiles = tile_bound(problem.grid, problem.window, stride, **given, **facts)
        return {"stride": stride, **_numbers(tiles, share)}

    axes = len(problem.grid)
    steps = sorted({s for s in (2**i for i in range(12)) if s <= max(problem.window)} | set(problem.stride or ()))
    sweep = [at(tuple(min(s, w) for w in problem.window)) for s in [1, *(s for s in steps if s > 1)]]
    plain = not any([problem.causal] if isinstance(problem.causal, bool) else problem.causal) and problem.dilation == 1
    best = best_stride(problem.grid, problem.window, **facts) if plain else None
    flat = None
    if prod(problem.grid) <= FLAT_LIMIT:
        rules = windows_of(axes, problem.window, 1, problem.dilation, problem.causal)
        flat = flat_bound(problem.grid, rules, prod(problem.q_tile), prod(problem.kv_tile))
    return {
        "name": problem.name, "grid": problem.grid, "window": problem.window, **facts, "share": share,
        "flop_bound": prod(problem.grid) / prod(problem.window), "sweep": sweep,
        "own": at(problem.stride) if problem.stride else None, "best": at(best) if best else None, "flat_stride_1": flat,
    }  # fmt: skip


def _numbers(tiles: Tiles, share: float) -> dict[str, float]:
    return {
        "bound": tiles.bound,
        "worst": tiles.worst,
        "dynamic": tiles.dense / tiles.dynamic,
        "flops": tiles.flops,
        "end_to_end": tiles.end_to_end(share),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per problem and stride."""
    head = "| problem | grid | window | tiles q / kv | stride | bound | worst tile | dynamic tiles | by operations | whole step |"
    lines = [head, "|---" * 10 + "|"]
    for result in results:
        rows = {tuple(r["stride"]): r for r in (*result["sweep"][:1], result["own"], result["best"]) if r}
        for stride, row in rows.items():
            shapes = [_times(result[k]) for k in ("grid", "window")] + [
                f"{_times(result['q_tile'])} / {_times(result['kv_tile'])}"
            ]
            values = [f"{row[k]:.2f}" for k in ("bound", "worst", "dynamic", "flops", "end_to_end")]
            lines.append(f"| {' | '.join([result['name'], *shapes, _times(stride), *values])} |")
    return "\n".join(lines) + "\n"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Bound against stride, one panel per problem; dashed: by operations."""
    figure = Figure(figsize=(3.6 * len(results), 3.2), layout="constrained")
    for i, result in enumerate(results):
        axes = figure.add_subplot(1, len(results), i + 1)
        strides = [max(r["stride"]) for r in result["sweep"]]
        for key, label in (
            ("bound", "static key tiles"),
            ("dynamic", "dynamic key tiles"),
            ("worst", "worst query tile"),
        ):
            axes.plot(strides, [r[key] for r in result["sweep"]], marker="o", markersize=3, label=label)
        axes.axhline(result["flop_bound"], linestyle="--", color="0.4", label="by operations")
        for key, mark in (("own", "*"), ("best", "D")):
            if result[key]:
                axes.plot(max(result[key]["stride"]), result[key]["bound"], mark, color="black", label=f"{key} stride")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("stride (same on every axis, at most the window)")
        axes.set_ylabel("bound of the speed-up")
        axes.set_title(f"{result['name']}\n{_times(result['grid'])}, window {_times(result['window'])}", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    return figure

"""`sightline bench`: measured speed and scaling of mixers, bounds of neighborhood attention, sizes of backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sightline.console import make_console, print_json, say
from sightline.errors import ParameterError

app = typer.Typer(help="Measure: mixers, neighborhood attention's bounds, backbones.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Only = Annotated[str | None, typer.Option(help="Only these, with commas.")]


def _shape(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise ParameterError(f"{name}={text!r}: give whole numbers with x between them, for example 30x48x80") from None


@app.command()
def mixers(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; an unfinished run in it goes on.")] = Path(
        "bench-mixers"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Up to 4 096 tokens, one repeat.")] = False,
    only: Only = None,
    lengths: Annotated[str | None, typer.Option(help="Numbers of tokens, squares, with commas.")] = None,
    dim: Annotated[int, typer.Option(help="Channels.")] = 128,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    limit: Annotated[float, typer.Option(help="Leave out lengths expected to take more seconds than this.")] = 60.0,
    repeats: Annotated[int, typer.Option(help="Runs of which the median counts.")] = 5,
    train: Annotated[bool, typer.Option(help="Measure forward with backward as well.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    keep_memory: Annotated[
        bool, typer.Option(help="Keep freed memory in the process: without, glibc's page faults are measured too.")
    ] = True,
    json: Json = False,
) -> None:
    """Time, memory and operations against the number of tokens, for every mixer beside dense attention."""
    from sightline.bench import mixers as bench

    try:
        counts = [int(n) for n in lengths.split(",")] if lengths else list(bench.QUICK if quick else bench.LENGTHS)
    except ValueError:
        raise ParameterError(f"lengths={lengths!r}: give whole numbers with commas, for example 256,1024") from None
    console = make_console()
    results = bench.run(
        out.expanduser(), names=only.split(",") if only else None, lengths=counts, dim=dim, heads=heads, limit=limit,
        repeats=1 if quick else repeats, train=train, device=device, dtype=dtype,
        keep_memory=keep_memory, progress=(lambda line: None) if json else (lambda line: say(console, line)),
    )  # fmt: skip
    if json:
        print_json(results)
        return
    say(console, f"\ntable: {out / 'table.md'}   picture: {out / 'scaling.png'}   numbers: {out / 'results.json'}")


@app.command("gna-sim")
def gna_sim(
    grid: Annotated[str | None, typer.Option(help="Tokens per axis, 30x48x80; left out: the paper's hosts.")] = None,
    window: Annotated[str, typer.Option(help="Window per axis.")] = "",
    q_tile: Annotated[str, typer.Option(help="Box of queries that a kernel takes at once.")] = "",
    kv_tile: Annotated[str, typer.Option(help="Box of keys.")] = "",
    stride: Annotated[str | None, typer.Option(help="A stride to show besides the best.")] = None,
    dilation: Annotated[int, typer.Option(help="Same on every axis.")] = 1,
    causal: Annotated[bool, typer.Option("--causal", help="Causal on every axis.")] = False,
    share: Annotated[float, typer.Option(help="Attention's part of a whole step.")] = 0.6,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the table and the picture.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into --out even when it holds other files.")] = False,
    json: Json = False,
) -> None:
    """The most that neighborhood attention can gain on a tiled kernel, by stride."""
    from sightline.bench import gna_sim as sim

    problems = sim.PUBLISHED
    if grid is not None:
        given = {"grid": grid, "window": window, "q_tile": q_tile, "kv_tile": kv_tile}
        shapes = {name: _shape(name, text) for name, text in given.items()}
        own = _shape("stride", stride) if stride else None
        problems = (sim.Problem("yours", **shapes, stride=own, dilation=dilation, causal=causal),)
    results = sim.run(problems, share=share, out=out, force=force)
    if json:
        print_json(results)
        return
    console = make_console()
    say(console, sim.table(results))
    if out is not None:
        say(console, f"picture: {out / 'bounds.png'}")


@app.command()
def backbones(
    only: Only = None,
    time: Annotated[bool, typer.Option("--time", help="Images per second as well (builds the weights).")] = False,
    batch: Annotated[int, typer.Option(help="Pictures at once, for --time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Runs of which the median counts.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda, for --time.")] = "cpu",
    json: Json = False,
) -> None:
    """Parameters and operations of every published variant, beside the published figures."""
    from sightline.bench import backbones as bench

    rows = bench.run(only.split(",") if only else None, time=time, batch=batch, repeats=repeats, device=device)
    if json:
        print_json(rows)
    else:
        say(make_console(), bench.table(rows))

"""`sightline study`: run a paper's analysis on a model and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Reproduce a paper's analysis on a model, with figures and a page.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Reproduce a paper's analysis on a model, with figures and a page."""


@app.command()
def var(
    model: Annotated[str, typer.Option(help="tiny (bundled), a Hub id or a folder.")] = "tiny",
    n: Annotated[int, typer.Option("--n", help="Held-out scenes; about six questions each.")] = 60,
    seed: Annotated[int, typer.Option(help="Which scenes, and the random masks.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to continue.")] = Path("study-var"),
    tau: Annotated[
        float | None, typer.Option(help="A token is a sink when phi exceeds this; default: by the model.")
    ] = None,
    sink_dims: Annotated[
        str | None, typer.Option(help="Sink dimensions, for example 1415/2533; default: found.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random masks per question.")] = 3,
    batch: Annotated[int, typer.Option(help="Questions per forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Visual attention sinks: where they are, whether they matter, and what VAR does about them.

    Five experiments on scenes whose truth is known. Stop it with Ctrl-C; the same command goes on where it stopped.
    """
    dims = _dims(sink_dims)
    from sightline.console import make_console, print_json, say
    from sightline.explain.page import sentences
    from sightline.explain.study import study_var
    from sightline.loading import load

    lvlm = load(model, device=device, dtype=dtype)
    try:
        found = study_var(
            lvlm, out, n=n, seed=seed, tau=tau, sink_dims=dims, draws=draws, batch=batch, progress=not json
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is done is in {out}: the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if json:
        print_json(found)
        return
    console = make_console()
    for line in sentences(found).values():
        say(console, line + "\n")
    say(console, f"report: {out / 'index.html'}")


@app.command()
def vhr(
    model: Annotated[str, typer.Option(help="tiny (bundled), a Hub id or a folder.")] = "tiny",
    n: Annotated[int, typer.Option("--n", min=2, help="Held-out scenes; about six questions each.")] = 10,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="How many heads to show.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Vision-aware heads: how much each head's output changes when the picture is taken away, and their ranking.

    The JSON holds the mean divergence of every head and the numbers for dual-stream-emphasis:head_weights=...
    """
    from rich.table import Table

    from sightline.console import make_console, print_json
    from sightline.explain.divergence import vision_heads
    from sightline.explain.questions import held_out
    from sightline.loading import load

    lvlm = load(model, device=device, dtype=dtype)
    items = held_out(n, seed=seed)
    found = vision_heads(lvlm, [i.scene.image for i in items], [i.text for i in items], batch=batch)
    ranking = [(int(layer), int(head), round(float(found.mean[layer, head]), 4)) for layer, head in found.ranking()]
    if json:
        mean = [[round(float(x), 6) for x in row] for row in found.mean]
        print_json({"prompts": len(items), "mean": mean, "ranking": ranking, "head_weights": found.weights()})
        return
    table = Table("rank", "layer", "head", "divergence", title=f"Vision-aware heads of {model}, {len(items)} questions")
    for place, (layer, head, value) in enumerate(ranking[:top], 1):
        table.add_row(str(place), str(layer), str(head), f"{value:.4f}")
    make_console().print(table)


def _dims(text: str | None) -> tuple[int, ...] | None:
    from sightline.errors import ParameterError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(",", "/").split("/"))
    except ValueError as error:
        raise ParameterError(
            f"--sink-dims {text!r} is not understood: write whole numbers such as 1415/2533"
        ) from error

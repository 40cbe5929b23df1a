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


@app.command()
def cca(
    model: Annotated[str, typer.Option(help="tiny (bundled), a Hub id or a folder.")] = "tiny",
    with_: Annotated[str, typer.Option("--with", help="Systems on the model meanwhile, for example cca.")] = "none",
    n: Annotated[int, typer.Option("--n", min=2, help="Held-out scenes, and things to paste.")] = 8,
    cells: Annotated[int, typer.Option(help="Rows and columns of places.")] = 5,
    layer: Annotated[int, typer.Option(help="Decoder layer of the flow.")] = 0,
    reverse: Annotated[bool, typer.Option("--reverse", help="Control: visual tokens last first.")] = False,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions per forward.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Where instructions look in the picture, and whether a thing is found wherever it stands.

    Information flow of a layer (decay: rank correlation with raster order; symmetry: with the map's mirror images), and the
    share of things found per cell of a grid, beside how often the model says yes to the empty place.
    """
    from sightline.catalog import parse
    from sightline.console import make_console, print_json
    from sightline.explain.concentric import Reversed, information_flow, spatial_probe
    from sightline.explain.questions import held_out, picture_size
    from sightline.loading import load

    lvlm = load(model, device=device, dtype=dtype)
    systems = [*parse(with_), *([Reversed()] if reverse else [])]
    items = [item for item in held_out(n, seed=seed, size=picture_size(lvlm.processor)) if item.yes_no]
    flow = information_flow(lvlm, [i.scene.image for i in items], [i.text for i in items], layer=layer, systems=systems,
                            batch=batch)  # fmt: skip
    probe = spatial_probe(lvlm, n, cells=cells, systems=systems, seed=seed, batch=batch)
    facts = {"pictures": len(items), "layer": layer, "decay": round(flow.decay(), 4),
             "symmetry": round(flow.symmetry(), 4), "things": n, "found": round(float(probe.found.mean()), 4),
             "yes to the empty place": round(float(probe.empty.mean()), 4)}  # fmt: skip
    maps = {f"found, size {size:g}": probe.accuracy[k] for k, size in enumerate(probe.sizes)}
    if json:
        maps["flow"] = flow.grid()
        print_json(facts | {name: [[round(float(v), 6) for v in row] for row in map_] for name, map_ in maps.items()})
        return
    console = make_console()
    for name, value in facts.items():
        console.print(f"{name}: {value}")
    for name, map_ in maps.items():
        console.print(f"\n{name}, top row first")
        for row in map_:
            console.print("  ".join(f"{100 * value:3.0f} %" for value in row))


@app.command()
def vdgd(
    model: Annotated[str, typer.Option(help="tiny (bundled), a Hub id or a folder.")] = "tiny",
    n: Annotated[int, typer.Option("--n", min=1, help="Held-out scenes to describe.")] = 60,
    data: Annotated[Path | None, typer.Option(help="The conversations the model was tuned on, LLaVA-format JSON; "
                                              "without it: scenes of the training split.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures of --data.")] = None,
    pool: Annotated[int, typer.Option(min=1, help="Training pictures among which the nearest are looked for.")] = 500,
    nearest: Annotated[int, typer.Option(min=0, help="Of these, whose conversations are searched.")] = 25,
    base: Annotated[str | None, typer.Option(help="A language model with the same vocabulary (folder or Hub id); "
                                             "without it: the model itself, without the picture.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which scenes, and which records of --data.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:  # fmt: skip
    """Where hallucinations of captions come from: language alone, training data, style, or vision.

    Held-out scenes are described; what is wrong in a caption is known. A phrase may count as language and as another one.
    """
    from sightline import scenes
    from sightline.amateur import language_model
    from sightline.console import make_console, print_json
    from sightline.errors import InputError
    from sightline.explain.causes import CLASSES, caption_causes, file_corpus, world_corpus
    from sightline.explain.questions import picture_size
    from sightline.loading import load

    if (data is None) != (images is None):
        raise InputError("--data and --images belong together: give both, or none for generated scenes")
    lvlm = load(model, device=device, dtype=dtype)
    size, read = picture_size(lvlm.processor), base and language_model(base, lvlm.device)[1]
    drawn = [scenes.draw(s, size=size) for s in scenes.seeds("test", (seed + 1) * n)[seed * n :]]
    corpus = (
        file_corpus(lvlm, data, images, pool, seed=seed, batch=batch) if data
        else world_corpus(lvlm, pool, size=size, batch=batch)
    )  # fmt: skip
    told = caption_causes(lvlm, drawn, corpus, nearest=nearest, base=read, batch=batch, progress=not json)
    causes = [cause for _, found in told for cause in found]
    counts = {name: sum(name in cause.classes for cause in causes) for name in CLASSES}
    counts["none"] = sum(not cause.classes for cause in causes)
    if json:
        rows = [{"picture": scene.file_name, "caption": caption, "hallucinated": [
            {"phrase": c.phrase.text, "relation": c.phrase.relation, "classes": c.classes, "ranks": dict(c.words)}
            for c in found]} for scene, (caption, found) in zip(drawn, told, strict=True)]  # fmt: skip
        print_json({"captions": n, "phrases": len(causes), "classes": counts, "answers": rows})
        return
    console = make_console()
    console.print(f"{len(causes)} hallucinated phrases in {n} captions")
    for name, count in counts.items():
        examples = dict.fromkeys(
            c.phrase.text for c in causes if (name in c.classes) or (name == "none" and not c.classes)
        )
        console.print(f"{name:9}{count:4}  {', '.join(list(examples)[:5])}", soft_wrap=True)


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

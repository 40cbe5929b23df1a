"""`sightline scenes`: draw scenes, make a contact sheet, export data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from sightline.errors import InputError, ParameterError, UnknownNameError, nearest

app = typer.Typer(help="The generated world: pictures with exact truth.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder (or picture) to write.")]
Size = Annotated[int, typer.Option(help="Side of the pictures in pixels.")]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Video = Annotated[bool, typer.Option("--video", help="Films instead of pictures: things move, come, go, pass.")]
Frames = Annotated[int, typer.Option(help="Pictures in a film, with --video.")]
FORMATS = ("coco", "llava", "pope")


@app.command()
def draw(
    seeds: Annotated[list[int], typer.Argument(help="One or more seeds.")],
    out: Out,
    context: Annotated[str | None, typer.Option(help="kitchen, street, desk, ...; default: by seed.")] = None,
    size: Size = 112,
    video: Video = False,
    frames: Frames = 32,
) -> None:
    """Draw scenes by seed: a PNG and a JSON file of the truth for each; a film: its frames, a GIF and the truth."""
    from sightline import scenes
    from sightline.scenes.files import Folder

    folder = Folder(out)
    for seed in seeds if video else ():
        film = scenes.film(seed, context=context, size=size, frames=frames)
        path = scenes.export.write_film(folder, film)
        happens = "; ".join(film.telling())
        typer.echo(f"{path}: {happens or 'nothing comes or goes'}")
    if video:
        return
    for seed in seeds:
        scene = scenes.draw(seed, context=context, size=size)
        path = folder.picture(scene.file_name, scene.image)
        folder.text(str(Path(scene.file_name).with_suffix(".json")), [json.dumps(scene.truth(), indent=1), "\n"])
        rng = np.random.Generator(np.random.PCG64(seed))
        typer.echo(f"{path}: {scenes.caption(scene, rng, 'detailed')}")


@app.command()
def sheet(
    out: Out,
    n: Annotated[int, typer.Option("--n", help="How many scenes.")] = 40,
    split: Split = "val",
    columns: Annotated[int, typer.Option(help="Pictures in a row.")] = 8,
    size: Size = 112,
    video: Video = False,
    frames: Frames = 32,
) -> None:
    """One picture with many scenes on it, or with a row of frames for every film."""
    from sightline import scenes
    from sightline.scenes.files import Folder

    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} is not a PNG file name: choose one that ends in .png")
    if not 1 <= n <= 1000:
        raise ParameterError(f"n={n} is out of range: choose n in [1, 1000]")
    chosen = scenes.seeds(split, n)
    if video:
        page = scenes.film_sheet([scenes.film(seed, size=size, frames=frames) for seed in chosen], columns)
    else:
        page = scenes.contact_sheet([scenes.draw(seed, size=size) for seed in chosen], columns)
    typer.echo(str(Folder(out.parent).picture(out.name, page)))


@app.command()
def export(
    out: Out,
    n: Annotated[int, typer.Option("--n", help="How many scenes.")] = 500,
    split: Split = "val",
    form: Annotated[str, typer.Option("--format", help="coco, llava or pope.")] = "coco",
    size: Size = 112,
    video: Video = False,
    frames: Frames = 32,
) -> None:
    """Write a data set (with --video: of films, whatever the format). Run it again after an interruption: it goes on where it stopped."""
    from rich.progress import track

    from sightline import scenes

    if form not in FORMATS:
        raise UnknownNameError(f"no format {form!r}: {nearest(form, list(FORMATS))}")
    chosen = scenes.seeds(split, n)
    if video:
        for path in scenes.export.films(track(chosen, description=f"films, {split}"), out, size=size, frames=frames):
            typer.echo(str(path))
        return
    for path in getattr(scenes.export, form)(track(chosen, description=f"{form}, {split}"), out, size=size):
        typer.echo(str(path))

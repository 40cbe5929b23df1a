"""`sightline train`: the bundled tiny LLaVA from nothing, a LLaVA on one's own data, trainings on films, a classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train: the bundled tiny LLaVA, any LLaVA on a LLaVA-format JSON or by diffusion feedback, a classifier.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option(help="Folder of the run; an unfinished run in it is resumed.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Precision = Annotated[str, typer.Option(help="auto, bf16 or fp32.")]
With = Annotated[str, typer.Option("--with", help="Systems that the weights are trained with: cca, aki-mma, or none.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare data; 0 prepares it in this one.")]


def _device(name: str):
    import torch

    from sightline.errors import ParameterError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ParameterError(f"device={name!r}: choose cpu, cuda, cuda:N or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(f"device={name!r}: no CUDA device here, choose cpu")
    return device


def _systems(spec: str) -> list:
    from sightline.catalog import parse

    return parse(spec)


@app.command("tiny-llava")
def tiny_llava(
    out: Out = Path("tiny-llava-run"),
    preset: Annotated[str, typer.Option(help="tiny (the bundled model) or toy (seconds, for trying).")] = "tiny",
    scale: Annotated[float, typer.Option(help="Multiply every stage's steps by this.")] = 1.0,
    minutes: Annotated[float | None, typer.Option(help="Train for this long at most, learning rates included.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the last stage, instead of the recipe's.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Stop after this stage: tower, name, read, instruct or settle.")
    ] = None,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
    with_: With = "none",
    pictures: Annotated[int, typer.Option(help="Held-out scenes for the final evaluation; 0 skips it.")] = 360,
) -> None:
    """Train a tiny LLaVA on generated scenes: tower, naming, reading, instruction tuning, settling, evaluation."""
    from dataclasses import replace

    from sightline.errors import ParameterError, UnknownNameError, nearest
    from sightline.learn import evaluate, recipe, tiny_llava

    if preset not in recipe.PRESETS:
        raise UnknownNameError(f"no preset {preset!r}: {nearest(preset, list(recipe.PRESETS))}")
    if minutes is not None and minutes <= 0:
        raise ParameterError(f"minutes={minutes!r} is out of range: choose a positive number")
    chosen = replace(recipe.PRESETS[preset], seed=seed).scaled(scale)
    chosen = chosen.with_steps(recipe.STAGES[-1], steps) if steps is not None else chosen
    where = _device(device)
    tiny_llava.run(chosen, out, device=where, precision=precision, minutes=minutes, workers=workers, only=only,
                   systems=_systems(with_))  # fmt: skip
    if only in (None, recipe.STAGES[-1]) and pictures:
        results = tiny_llava.report(out / "model", chosen, device=where, pictures=pictures, per_kind=pictures,
                                    systems=_systems(with_))  # fmt: skip
        evaluate.show(results)
        typer.echo(f"model: {out / 'model'}   numbers: {out / 'results.json'}   pictures: curves.png, sinks.png")


@app.command("instruct")
def instruct(
    data: Annotated[Path, typer.Option(help="LLaVA-format JSON list.")],
    model: Annotated[str, typer.Option(help="tiny (bundled), a folder or a Hub id of a LLaVA checkpoint.")],
    stage: Annotated[int, typer.Option(help="1: projector on captions. 2: projector and decoder on dialogues.")] = 2,
    images: Annotated[Path | None, typer.Option(help="Folder the records' pictures are in.")] = None,
    out: Out = Path("instruct-run"),
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; 1e-3 in stage 1, 2e-5 in stage 2.")] = None,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
    with_: With = "none",
    dual_order: Annotated[
        bool, typer.Option("--dual-order", help="Half of the records have the first question before the picture.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, print statistics, train nothing.")
    ] = False,
) -> None:
    """Visual instruction tuning of a LLaVA on your own pictures and dialogues."""
    from sightline.learn import tuning

    facts = tuning.tune(
        data, model, stage, images, out, epochs=epochs, steps=steps, batch=batch, lr=lr, seed=seed,
        device=_device(device), precision=precision, workers=workers, dry_run=dry_run,
        systems=_systems(with_), dual_order=dual_order,
    )  # fmt: skip
    typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))


@app.command("classifier")
def classifier(
    backbone: Annotated[
        str, typer.Option(help="A timm name, for example biformer_tiny (`sightline bench backbones`).")
    ],
    data: Annotated[str, typer.Option(help="scenes, or a folder with one sub-folder per class.")] = "scenes",
    label: Annotated[
        str, typer.Option(help="Of scenes: context (the place) or kind (of the largest object).")
    ] = "context",
    out: Out = Path("classifier-run"),
    size: Annotated[int, typer.Option(help="Side of the pictures, pixels.")] = 64,
    steps: Annotated[int | None, typer.Option(help="Steps; 600 unless given, or --epochs for a folder.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over a folder.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate; 5 % warm-up, then cosine.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of matrices and kernels.")] = 0.05,
    ema: Annotated[float, typer.Option(help="Decay of the average of the weights, which is what is saved.")] = 0.999,
    mixup: Annotated[float, typer.Option(help="Mixup's alpha; 0: none.")] = 0.0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    drop_path: Annotated[float, typer.Option(help="Stochastic depth at the last block.")] = 0.0,
    weights: Annotated[str | None, typer.Option(help="A published checkpoint to start from.")] = None,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
) -> None:
    """Train a vision backbone to classify pictures; prints top-1 on held-out ones."""
    from sightline.learn import classifier as training

    settings = training.Settings(
        backbone, data, label, size, steps, epochs, batch, lr, weight_decay, ema, mixup, smoothing, drop_path, weights,
        seed,
    )  # fmt: skip
    results = training.run(settings, out.expanduser(), device=_device(device), precision=precision, workers=workers)
    typer.echo(
        f"top-1 {results['top1']:.1f} % of {results['held_out']} held-out pictures (commonest class "
        f"{results['baseline']:.1f} %)   model: {out / 'model.safetensors'}   curves: {out / 'curves.png'}"
    )


Model = Annotated[str, typer.Option(help="tiny (bundled), a Hub id or a folder.")]
Steps = Annotated[int, typer.Option(help="Steps.")]
Films = Annotated[int, typer.Option(help="Films per step.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate, instead of the paper's.")]
Frames = Annotated[int, typer.Option(help="Frames of a film.")]
Side = Annotated[int, typer.Option(help="Side of a frame, pixels.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Show the data, train nothing.")]


def _on_films(out: Path, device: str, precision: str, dry_run: bool, **settings) -> None:
    from sightline.learn import film_tuning

    facts = film_tuning.run(film_tuning.Settings(**settings), out.expanduser(), device=_device(device),
                            precision=precision, dry_run=dry_run)  # fmt: skip
    typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))


@app.command("slow-fast")
def slow_fast(
    model: Model = "tiny",
    stage: Annotated[int, typer.Option(help="1: projector and branch. 2: the decoder as well.")] = 1,
    with_: Annotated[
        str, typer.Option("--with", help="slow-fast and its parameters; stage 2: weights=FOLDER/branch.safetensors.")
    ] = "slow-fast",
    out: Out = Path("slow-fast-run"),
    steps: Steps = 200,
    batch: Films = 4,
    lr: Rate = None,
    frames: Frames = 32,
    size: Side = 112,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    dry_run: Dry = False,
) -> None:
    """Train the slow branch of slow-fast video tokens on generated films, stage 1 or 2."""
    _on_films(out, device, precision, dry_run, training="slow-fast", model=model, stage=stage, system=with_,
              steps=steps, batch=batch, lr=lr, frames=frames, size=size, seed=seed)  # fmt: skip


@app.command("srft")
def srft(
    model: Model = "tiny",
    out: Out = Path("srft-run"),
    steps: Steps = 200,
    batch: Films = 4,
    lr: Rate = None,
    frames: Frames = 8,
    size: Side = 112,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    dry_run: Dry = False,
) -> None:
    """HAVEN's reasoning fine-tuning on generated films: think, then answer."""
    _on_films(out, device, precision, dry_run, training="srft", model=model, steps=steps, batch=batch, lr=lr,
              frames=frames, size=size, seed=seed)  # fmt: skip


@app.command("tdpo")
def tdpo(
    model: Annotated[str, typer.Option(help="Where to start, and the reference: the model folder of `srft`.")],
    out: Out = Path("tdpo-run"),
    steps: Steps = 200,
    batch: Films = 4,
    lr: Rate = None,
    beta: Annotated[float, typer.Option(help="How far the model may go from the reference; large: less far.")] = 0.1,
    gamma: Annotated[float, typer.Option(help="Weight of the tokens that differ; 1: plain DPO.")] = 5.0,
    normalise: Annotated[bool, typer.Option(help="Divide by the weighted length.")] = True,
    frames: Frames = 8,
    size: Side = 112,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    dry_run: Dry = False,
) -> None:
    """HAVEN's thinking preference on generated films: true thinking before thinking with one false fact."""
    _on_films(out, device, precision, dry_run, training="tdpo", model=model, steps=steps, batch=batch, lr=lr,
              beta=beta, gamma=gamma, normalise=normalise, frames=frames, size=size, seed=seed)  # fmt: skip


@app.command("deem")
def deem(
    model: Annotated[
        str, typer.Option(help="tiny (bundled), or folder or Hub id of a LLaVA with a CLIP tower.")
    ] = "tiny",
    diffusion: Annotated[
        str, typer.Option(help="tiny (trained first, in OUT/diffusion), or folder or Hub id of a Stable Diffusion.")
    ] = "tiny",
    data: Annotated[Path | None, typer.Option(help="LLaVA-format JSON list; without it: generated scenes.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder the records' pictures are in.")] = None,
    out: Out = Path("deem-run"),
    steps: Annotated[int, typer.Option(help="Steps of the feedback training.")] = 100,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate; the tower's is a fifth of it.")] = 1e-4,
    weight: Annotated[float, typer.Option(help="Weight of the feedback loss.")] = 5.0,
    text_weight: Annotated[float, typer.Option(help="Weight of the language model's loss; 0: feedback alone.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
) -> None:
    """DEEM: tune a LLaVA's vision tower by the denoising loss of a frozen diffusion model (extra: diffusers)."""
    from sightline.learn import feedback
    from sightline.train.deem import DEEM

    settings = DEEM(weight=weight, text_weight=text_weight, **(feedback.SMALL if diffusion == "tiny" else {}))
    facts = feedback.run(
        settings, model, diffusion, out.expanduser(), data=data, images=images, steps=steps, batch=batch, lr=lr, seed=seed,
        device=_device(device), precision=precision, workers=workers,
    )  # fmt: skip
    typer.echo(json.dumps(facts, indent=1))

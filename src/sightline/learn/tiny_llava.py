"""From nothing to a LLaVA checkpoint, stage by stage, on the generated world alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from sightline import __version__
from sightline.engine.system import System
from sightline.errors import InputError
from sightline.learn import build, evaluate, instruct, loop, naming, phrasing, reading, sinks, tower
from sightline.learn import card as cards
from sightline.learn.data import scene_of
from sightline.learn.recipe import STAGES, Recipe

CORPUS = 3000  # documents the tokenizer is trained on
SHARE = {"tower": 0.16, "name": 0.02, "read": 0.22, "instruct": 0.3, "settle": 0.3}  # of the minutes given


def prepare(recipe: Recipe, out: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model and its processor; writes `out/recipe.json` and the processor once, reads them after.

    Raises InputError if `out` holds a run of another model or seed.
    """
    out = Path(out)
    path, folder = out / "recipe.json", out / "processor"
    if path.exists():
        stored = json.loads(path.read_text())["recipe"]
        for key in ("shape", "seed"):
            if stored[key] != recipe.as_dict()[key]:
                raise InputError(f"{out} holds a run with {key} {stored[key]}: choose an empty --out folder")
        processor = LlavaProcessor.from_pretrained(folder)
        return build.model(recipe.shape, processor.tokenizer, recipe.seed), processor
    out.mkdir(parents=True, exist_ok=True)
    text = _tokenizer(recipe)
    processor = build.processor(text, recipe.shape)
    processor.save_pretrained(folder)
    path.write_text(json.dumps({"sightline": __version__, "recipe": recipe.as_dict()}, indent=1))
    return build.model(recipe.shape, text, recipe.seed), processor


def run(recipe: Recipe, out: Path, *, device: torch.device, precision: str = "auto", minutes: float | None = None,
        workers: int = 0, only: str | None = None,
        systems: Sequence[System] = ()) -> LlavaForConditionalGeneration:  # fmt: skip
    """Train all stages (or `only` one), each resumed where it stopped; the finished model goes to `out/model`.

    `minutes` limits the whole training: it is shared among the stages by SHARE, and the schedule follows the clock.
    `systems` are on the model from instruction tuning on, for those whose weights must be trained with them.
    """
    if only is not None:
        recipe.plan(only)  # names the known stages if there is no such
    model, processor = prepare(recipe, out)
    model.to(device)
    dtype = loop.precision_of(precision, device)
    common = {"precision": dtype, "workers": workers}
    curves = {}
    for stage in STAGES:
        if only is not None and STAGES.index(stage) > STAGES.index(only):
            break
        limit = minutes * SHARE[stage] if minutes else None
        if stage == "tower":
            trainer = tower.train(model.model.vision_tower, recipe, out, minutes=limit, **common)
        elif stage == "name":
            trainer = naming.train(model, processor.tokenizer, recipe, out, minutes=limit, **common)
        elif stage == "read":
            trainer = reading.train(model, processor, recipe, out, minutes=limit, **common)
        else:
            draw = instruct.world_sample if stage == "instruct" else instruct.settle_sample
            make = partial(draw, recipe=recipe, processor=processor)
            trainer = instruct.train(model, processor, make, 2, recipe.plan(stage), out, minutes=limit,
                                     systems=systems, name=stage, **common)  # fmt: skip
        curves[stage] = trainer.curve
    loop.draw_curves(curves).savefig(Path(out) / "curves.png", dpi=110)
    if only in (None, STAGES[-1]):
        save(model, processor, Path(out) / "model")
    return model


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the checkpoint in bf16, as `from_pretrained` reads it. The model in memory keeps its dtype."""
    dtype = next(model.parameters()).dtype
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    model.to(dtype)
    processor.save_pretrained(folder)


def report(folder: Path, recipe: Recipe, *, device: torch.device, pictures: int, per_kind: int, note: str = "",
           systems: Sequence[System] = ()) -> dict:  # fmt: skip
    """Evaluate a finished checkpoint and measure its sinks.

    Writes results.json and sinks.png into `folder`'s parent (the run), and the card into `folder`.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    with instruct.carrying(model, systems):
        results = evaluate.evaluate(model, processor, pictures=pictures, per_kind=per_kind)
    results["sinks"] = sinks.measure(model, processor, min(32, pictures))
    out = Path(folder).parent
    (out / "results.json").write_text(json.dumps(results, indent=1))
    sinks.draw(results["sinks"]).savefig(out / "sinks.png", dpi=130)
    (Path(folder) / "README.md").write_text(cards.card(recipe, cards.history(out), results, note), encoding="utf-8")
    return results


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    count = CORPUS if recipe.shape.vocabulary > 500 else 60
    documents = (phrasing.document(*scene_of("tokenizer", k, recipe.seed, 56)) for k in range(count))
    return build.tokenizer(documents, recipe.shape.vocabulary)

"""The model card of a trained tiny LLaVA: what it is, how it was made, and what was measured, in the words of a README."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from sightline.learn.recipe import STAGES, Recipe

GOALS = "POPE random 92, adversarial clearly lower, colour and relation 85, CHAIR_i between 3 and 25"


def history(run: Path) -> list[dict]:
    """Of every stage whose checkpoint is in the run's folder: steps, minutes, and the mean of its last 50 numbers."""
    rows = []
    for stage in STAGES:
        path = Path(run) / f"{stage}.safetensors"
        if not path.exists():
            continue
        with safe_open(path, "pt") as stored:
            facts = json.loads(stored.metadata()["state"])
        recent = facts["curve"][-50:]
        numbers = {k: sum(row[k] for row in recent) / len(recent) for k in recent[-1] if k not in ("step", "lr")}
        rows.append({"stage": stage, "steps": facts["step"], "minutes": facts["seconds"] / 60, "last": numbers})
    return rows


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _made(recipe: Recipe, stages: list[dict]) -> str:
    rows = []
    for row in stages:
        plan = recipe.plan(row["stage"])
        last = ", ".join(f"{key} {value:.2f}" for key, value in row["last"].items())
        rows.append([row["stage"], f"{row['steps']} x {plan.batch}", f"{row['minutes']:.0f}", last])
    return _table(["stage", "steps x pictures", "minutes", "at the end"], rows)


def _measured(results: dict) -> str:
    rows = [
        [f"POPE {split}", row["n"], row["accuracy"],
         f"F1 {row['f1']}, precision {row['precision']}, recall {row['recall']}, yes {row['yes']} %"]
        for split, row in results["pope"].items()
    ]  # fmt: skip
    rows += [[kind, row["n"], row["accuracy"], ""] for kind, row in results["questions"].items()]
    told = results["captions"]
    text = (
        f"Captions: {told['n']} pictures, CHAIR_i {told['chair_i']} %, CHAIR_s {told['chair_s']} %, recall {told['recall']} %, "
        f"{told['words']} words on average, {told['sentences']} % end with a full stop. For example: *{told['examples'][0]}*"
    )
    return _table(["task", "questions", "accuracy %", "more"], rows) + "\n\n" + text


def _each(layers: dict[int, dict], key: str, scale: float, form: str) -> str:
    return ", ".join(format(scale * (row[key] or 0.0), form) for row in layers.values())


def _sinks(measured: dict) -> str:
    layers = measured["layers"]

    def over(key: str) -> str:
        return ", ".join(f"{row[key]:.2f}" for row in layers)

    found = {k: row for k, row in enumerate(layers) if row["sinks"] >= 0.5}  # in every other picture at least
    verdict = (
        f"Visual tokens over the threshold, entering layers {', '.join(map(str, found))}: "
        f"{_each(found, 'sinks', 1, '.0f')} of them, {_each(found, 'sinks_on_background', 100, '.0f')} % on the background, with "
        f"{_each(found, 'mass_sinks', 100, '.0f')} % of the attention."
        if found
        else "At no layer is a visual token over the threshold in as many as half of the pictures: "
        "**no sinks have emerged**, and `var` with its own threshold changes nothing on this model."
    )
    return (
        f"phi(x) = max |x_d| / rms(x) of the states entering layers 0 to {len(layers) - 1} (at most {measured['limit']:.0f}; VAR's threshold "
        f"scaled to this width: {measured['threshold']:.0f}; {measured['pictures']} pictures): BOS {over('phi_bos')}; largest visual token "
        f"{over('phi_image_max')}. Attention of text rows, mean over heads, on BOS {over('mass_bos')}; on the picture "
        f"{over('mass_image')}; on its four best seen tokens {over('mass_top4')}.\n\n{verdict} Nothing was planted."
    )


def card(recipe: Recipe, stages: list[dict], results: dict, note: str = "") -> str:
    """The README of the checkpoint, from the run's history (`history`) and its evaluation (`tiny_llava.report`)."""
    shape = recipe.shape
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-llava

A real `LlavaForConditionalGeneration` of 8.6 million parameters, trained on nothing but the generated world of
sightline (`sightline.scenes`), for trying and testing attention, steering and pruning without a download. It knows the 29 kinds of
objects and the 8 places of that world and nothing else.

- Tower: CLIP vision with CLS, {shape.image} x {shape.image}, patches of {shape.patch} ({shape.grid} x {shape.grid} tokens), width {shape.vision_width}, {shape.vision_layers} layers. Features of layer -2.
- Projector: two layers, GELU. Decoder: Llama, width {shape.width}, {shape.layers} layers, {shape.heads} heads. Byte-level BPE.
- Prompt: `USER: <image>\\nIs there a cup in the image? ASSISTANT:`; the chat template writes it.

## Training

`sightline train tiny-llava` (stages, losses and data: docs/tiny-llava.md), on training seeds. {note}

{_made(recipe, stages)}

## Measured

Held-out scenes (split "{results["split"]}", {results["pictures"]} pictures), greedy `generate`, one question a prompt, official POPE parsing, other answers exact.
Goals: {GOALS}.

{_measured(results)}

## Attention sinks and massive activations

{_sinks(results["sinks"])}
"""

"""Visual instruction tuning of an existing LLaVA on a LLaVA-format JSON: load, check, train a stage, save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

from sightline.engine.system import System
from sightline.errors import ModelError, ParameterError
from sightline.learn import conversation, instruct, loop
from sightline.learn.dual_order import DualOrder, same_order
from sightline.learn.recipe import Plan
from sightline.sources import BUNDLED

RATES = {1: 1e-3, 2: 2e-5}  # LLaVA-1.5's peak learning rates
SHOWN = 500  # records of a dry run that are tokenised


def tune(data: Path, model: str, stage: int, images: Path | None, out: Path, *, epochs: float, steps: int | None,
         batch: int, lr: float | None, seed: int, device: torch.device, precision: str, workers: int,
         dry_run: bool = False, systems: Sequence[System] = (), dual_order: bool = False) -> dict:  # fmt: skip
    """Train stage 1 or 2 with LLaVA-1.5's settings (cosine, 3 % warm-up, no weight decay); save to `out/model`.

    `systems` are on the model while it is trained, for those whose weights must be trained with them. `dual_order`: half of the
    records have their first question before the picture (stage 2; see `dual_order`).

    Returns the data's statistics (`dry_run`) or what was trained. Raises InputError for bad records, ModelError for a
    checkpoint that is no LLaVA, ParameterError for numbers out of range; all before any training.
    """
    if stage not in RATES:
        raise ParameterError(f"stage={stage!r} is out of range: choose 1 (projector) or 2 (projector and decoder)")
    if dual_order and stage != 2:
        raise ParameterError(f"dual_order with stage={stage}: only stage 2 has questions; choose --stage 2")
    if epochs <= 0 or (steps is not None and steps < 1):
        raise ParameterError(f"epochs={epochs!r}, steps={steps!r}: choose positive numbers")
    model = str(BUNDLED.get(model, model))
    processor = processor_of(model)
    records = (DualOrder if dual_order else instruct.Records)(data, images, processor, stage, seed)
    if dry_run:
        samples = [records.sample(k) for k in range(min(SHOWN, len(records)))]
        return {"records in file": len(records), **conversation.statistics(samples, processor)}
    count = steps or math.ceil(epochs * len(records) / batch)
    plan = Plan(count, batch, lr or RATES[stage], weight_decay=0.0, warmup=math.ceil(0.03 * count))
    dtype = loop.precision_of(precision, device)
    same_order(out, dual_order)
    net = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).to(device).eval()
    trainer = instruct.train(net, processor, records, stage, plan, out, precision=dtype, workers=workers,
                             systems=systems)  # fmt: skip
    net.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    return {"stage": stage, "steps": trainer.step, "records": len(records), "loss": trainer.curve[-1]["loss"],
            "model": str(out / "model")}  # fmt: skip


def processor_of(model: str) -> LlavaProcessor:
    """The processor of a LLaVA. ModelError when it is none, or cannot be loaded."""
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        processor = LlavaProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {model!r} ({str(error).splitlines()[0]}): give a LLaVA folder or id") from error
    if kind != "llava":
        raise ModelError(f"{model!r} is a {kind} model: this training takes LlavaForConditionalGeneration")
    return processor

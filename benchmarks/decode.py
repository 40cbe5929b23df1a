"""What second streams cost on `generate`: interleaved rounds on one random LLaVA-shaped model, ratios of medians to plain.

    python -m benchmarks.decode [--rounds 5] [--only lqcd,vdgd] [--apart] [--new 32] [--layers 8] [--device cpu] [--json out.json]

Model and prompt are those of `benchmarks.lvlm`. Each system is timed as it runs by default (one forward for both streams
where it acts nowhere else), with `--apart` also with two forwards per token. `--json` keeps the rows of earlier calls. VDGD
writes a description of 16 tokens first, which is part of its time. AGLA's matcher is left out of it: it is another model,
run once per picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import sightline as sl
from benchmarks.lvlm import NEW, chosen, make_inputs, make_model, ratios, rounds, show
from sightline.decode import AGLA, DAMRO, LQCD, VDGD, VASparse
from sightline.engine import joined
from sightline.engine.prompts import note
from sightline.engine.system import System

SYSTEMS: dict[str, System] = {
    "damro": DAMRO(beta=0.0),
    "agla": AGLA(beta=0.0),
    "lqcd": LQCD(beta=0.0),
    "vdgd": VDGD(alpha=0.0, description_tokens=16),
    "vasparse": VASparse(beta=0.0),
}


@contextmanager
def apart():
    """Two forwards per token."""
    own, joined.fits = joined.fits, lambda *_: False
    try:
        yield
    finally:
        joined.fits = own


def noted(inputs: dict, extra: int = 8) -> dict:
    """The inputs with a note: other questions are the same ids with `extra` more, other pictures the same pixels."""

    def again(pictures, questions):
        ids = inputs["input_ids"]
        longer = torch.cat([ids, ids[:, -extra:]], 1)
        return {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}

    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: ["" for _ in rows])
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    rows = inputs["input_ids"].shape[0]
    note(inputs, [[picture]] * rows, ["What?"] * rows, processor=SimpleNamespace(tokenizer=tokenizer), again=again)
    return inputs


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--only", help="names separated by commas")
    parser.add_argument("--apart", action="store_true", help="also with two forwards per token")
    parser.add_argument("--json")
    given = parser.parse_args()
    model, inputs = make_model(given.layers, given.device), noted(make_inputs(given.device))

    def task(system: System | None = None, around: Callable = nullcontext) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad(), around(), sl.attach(model, *([system] if system else [])):
                model.generate(**inputs, max_new_tokens=given.new, do_sample=False)

        return run

    tasks = {"plain": task()}
    for name in chosen(given.only, list(SYSTEMS)):
        tasks[name] = task(SYSTEMS[name])
        if given.apart:
            tasks[f"{name}, two forwards"] = task(SYSTEMS[name], apart)
    show(ratios(rounds(tasks, given.rounds, given.device)), given.json)


if __name__ == "__main__":
    main()

"""What second streams cost on `generate`: interleaved rounds on one random LLaVA-shaped model, ratios of medians to plain.

    python -m benchmarks.decode [--rounds 7] [--device cpu|cuda] [--layers 8] [--new 32] [--json out.json]

Model and prompt are those of `benchmarks.lvlm`. Each system is timed as it runs by default (one forward for both streams)
and with two forwards per token. VDGD writes a description of 16 tokens first, which is part of its time. AGLA's matcher is
left out of it: it is another model, run once per picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import sightline as sl
from benchmarks.lvlm import make_inputs, make_model, rounds
from sightline.decode import AGLA, DAMRO, LQCD, VDGD
from sightline.engine import joined
from sightline.engine.prompts import note

SYSTEMS = {
    "damro": DAMRO(beta=0.0),
    "agla": AGLA(beta=0.0),
    "lqcd": LQCD(beta=0.0),
    "vdgd": VDGD(alpha=0.0, description_tokens=16),
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, inputs = make_model(given.layers, given.device), noted(make_inputs(given.device))

    def task(system: object = None, around: Callable = nullcontext) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad(), around(), sl.attach(model, *([system] if system else [])):
                model.generate(**inputs, max_new_tokens=given.new, do_sample=False)

        return run

    tasks = {"plain": task()}
    for name, system in SYSTEMS.items():
        tasks |= {name: task(system), f"{name}, two forwards": task(system, apart)}
    times = rounds(tasks, given.rounds, given.device)
    plain = statistics.median(times["plain"])
    found = {name: statistics.median(t) / plain for name, t in times.items()}
    print(f"plain {plain:.3f} s")
    for name, ratio in found.items():
        print(f"{name:22} {ratio:.2f}x")
    if given.json:
        given.json.write_text(
            json.dumps({"plain_s": plain, "ratio": found, "settings": vars(given) | {"json": None}}, indent=1)
        )


if __name__ == "__main__":
    main()

"""What dropping visual tokens before the language model gains: prefill time against FLOPs, peak memory, own overhead.

    python -m benchmarks.thin [--rounds 7] [--device cpu|cuda] [--layers 8] [--json out.json]

The random LLaVA of `benchmarks.lvlm` (576 image + 64 text tokens, a tiny tower) is prefilled as it is, with reducers that
leave 64 of its visual tokens, and, as the oracle, by the host alone on a prompt that is that short. Rounds are interleaved;
medians are compared. FLOPs are those of the decoder by formula, so that the speed-up includes what is not in them: tower,
projector, embedding, choosing.

    speed-up      plain seconds / seconds
    of FLOPs      speed-up / (plain FLOPs / FLOPs)
    overhead      (seconds - seconds of the short prompt) / plain seconds: choosing, and projecting what is dropped
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import sightline as sl
from benchmarks.lvlm import GRID, IMAGE, TEXT, make_inputs, make_model, rounds
from sightline.evaluate.flops import Decoder
from sightline.evaluate.peak import peak_bytes

KEEP = 64
REDUCERS = {
    "vtc-cls": sl.prune.VTCCLS(KEEP),
    "hired": sl.prune.HiRED(KEEP / GRID**2),
    "fopru": sl.prune.FoPru(KEEP / GRID**2),
    "random": sl.prune.Random(KEEP / GRID**2),
}


def short_prompt(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt with KEEP placeholders."""
    ids = inputs["input_ids"]
    placeholder = ids[0] == IMAGE
    stay = ~placeholder | (placeholder.cumsum(0) <= KEEP)
    return {"input_ids": ids[:, stay], "attention_mask": inputs["attention_mask"][:, stay]}


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Per way: seconds, speed-up, its share of the FLOPs ratio, overhead, peak MB."""
    model, inputs = make_model(args.layers, args.device), make_inputs(args.device)
    short = short_prompt(inputs)

    def prefill(*systems: object) -> None:
        with torch.no_grad(), sl.attach(model, *systems):
            model(**inputs, use_cache=True, logits_to_keep=1)

    def alone() -> None:
        with torch.no_grad():
            encoded: Any = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
            encoded.pooler_output = [x[:KEEP] for x in encoded.pooler_output]
            model(**short, mm_encoder_outputs={"image": encoded}, use_cache=True, logits_to_keep=1)

    tasks = {"plain": prefill, "short prompt": alone}
    tasks |= {name: lambda system=system: prefill(system) for name, system in REDUCERS.items()}
    seconds = {name: statistics.median(s) for name, s in rounds(tasks, args.rounds, args.device).items()}
    decoder = Decoder.of(model.config)
    whole, fewer = (decoder.prefill_macs([n] * args.layers) for n in (GRID**2 + TEXT, KEEP + TEXT))
    found = {}
    for name, task in tasks.items():
        speed = seconds["plain"] / seconds[name]
        found[name] = {
            "seconds": seconds[name],
            "speed_up": speed,
            "of_flops": speed / (1.0 if name == "plain" else whole / fewer),
            "overhead": 0.0 if name == "plain" else (seconds[name] - seconds["short prompt"]) / seconds["plain"],
            "peak_mb": peak_bytes(model, task) / 2**20,
        }
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    found = measure(args)
    print(f"\nprefill of {GRID**2} + {TEXT} tokens, {KEEP} of the visual ones left ({args.layers} layers x 1024)")
    print(f"{'':14s} {'seconds':>8s} {'speed-up':>9s} {'of FLOPs':>9s} {'overhead':>9s} {'peak MB':>8s}")
    for name, row in found.items():
        shares = f"{100 * row['of_flops']:7.0f} % {100 * row['overhead']:7.1f} %"
        print(f"{name:14s} {row['seconds']:8.3f} {row['speed_up']:9.2f} {shares} {row['peak_mb']:8.0f}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What every steering system costs on `generate`: interleaved rounds on one random LLaVA-shaped model, ratios of medians.

    python -m benchmarks.steer [--rounds 5] [--device cpu|cuda] [--layers 8] [--only vhr,vista] [--json out.json]

Model and prompt are those of `benchmarks.lvlm`: 8 layers x 1024, 576 image + 64 text tokens, 32 new ones, and a tiny tower,
so that nothing hides what the decoder pays. Systems that the paper defines by one or two extra runs of the prompt (VHR:
without its pictures; VISTA: both) pay them here, too; VISTA also without steering the prompt, which spares one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch

import sightline as sl
from benchmarks.lvlm import NEW, make_inputs, make_model, rounds
from sightline.engine.system import System
from sightline.errors import UnknownNameError, nearest
from sightline.steer import AKIMMA, CCA, VAR, VHR, VISTA, DualStreamEmphasis

SYSTEMS: dict[str, System] = {
    "var": VAR(tau=3.2, sink_dims=(3, 7)),
    "vhr": VHR(),
    "dual-stream-emphasis": DualStreamEmphasis(),
    "vista": VISTA(),
    "vista-answer-only": VISTA(steer_prompt=False),
    "vista-vector-only": VISTA(logits_alpha=0.0),
    "vista-logits-only": VISTA(lam=0.0),
    "cca": CCA(trained=True),
    "aki-mma": AKIMMA(trained=True),
}


def costs(names: list[str], count: int, layers: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of `generate` with each system, their ratios to plain, and how far the rounds spread."""
    model, inputs = make_model(layers, device), make_inputs(device)

    def run(systems: tuple[System, ...]) -> None:
        with torch.no_grad(), sl.attach(model, *systems):
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)

    tasks = {"plain": partial(run, ())} | {name: partial(run, (SYSTEMS[name],)) for name in names}
    seconds = rounds(tasks, count, device)
    base = seconds["plain"]
    return {
        name: {
            "seconds": statistics.median(mine),
            "ratio": statistics.median(mine) / statistics.median(base),
            "spread": statistics.median(abs(a / b - statistics.median(mine) / statistics.median(base))
                                        for a, b in zip(mine, base, strict=True)),
        }
        for name, mine in seconds.items()
    }  # fmt: skip


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="names separated by commas")
    parser.add_argument("--json")
    args = parser.parse_args()
    names = list(SYSTEMS) if args.only is None else [name.strip() for name in args.only.split(",")]
    for name in names:
        if name not in SYSTEMS:
            raise UnknownNameError(f"no steering system {name!r}: {nearest(name, list(SYSTEMS))}")
    found = costs(names, args.rounds, args.layers, args.device)
    print(f"\n{'generate':24s} {'seconds':>8s} {'ratio':>6s} {'+-':>6s}   "
          f"({args.layers} layers x 1024, 576 + 64 tokens, {NEW} new)")  # fmt: skip
    for name, row in found.items():
        print(f"{name:24s} {row['seconds']:8.2f} {row['ratio']:6.2f} {row['spread']:6.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

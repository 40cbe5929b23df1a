"""What every steering system costs on `generate`: interleaved rounds on one random LLaVA-shaped model, ratios of medians.

    python -m benchmarks.steer [--rounds 5] [--device cpu|cuda] [--layers 8] [--only vhr,vista] [--json out.json]

Model and prompt are those of `benchmarks.lvlm`: 8 layers x 1024, 576 image + 64 text tokens, 32 new ones, and a tiny tower,
so that nothing hides what the decoder pays. Systems that the paper defines by one or two extra runs of the prompt (VHR:
without its pictures; VISTA: both) pay them here, too ("prompt only" says what a run of the prompt is); VISTA also without steering the prompt, which spares one. A call with
`--only` measures these beside its own plain runs, and `--json` keeps the rows of earlier calls: many short calls fill a table.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

import sightline as sl
from benchmarks.lvlm import NEW, chosen, make_inputs, make_model, ratios, rounds, show
from sightline.engine.system import System
from sightline.steer import AKIMMA, CCA, VAR, VHR, VISTA, DualStreamEmphasis

SYSTEMS: dict[str, System] = {
    "var": VAR(tau=1.8, sink_dims=(3, 7)),  # as in benchmarks.lvlm: it must edit something
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

    def run(systems: tuple[System, ...], new: int = NEW) -> None:
        with torch.no_grad(), sl.attach(model, *systems):
            model.generate(**inputs, max_new_tokens=new, do_sample=False)

    tasks = {"plain": partial(run, ()), "plain, prompt only": partial(run, (), 1)}
    tasks |= {name: partial(run, (SYSTEMS[name],)) for name in names}
    return ratios(rounds(tasks, count, device))


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="names separated by commas")
    parser.add_argument("--json")
    args = parser.parse_args()
    show(costs(chosen(args.only, list(SYSTEMS)), args.rounds, args.layers, args.device), args.json)


if __name__ == "__main__":
    main()

"""What dropping visual tokens gains and costs: prefill time against FLOPs, peak memory, own overhead.

    python -m benchmarks.thin [--rounds 7] [--device cpu|cuda] [--layers 8] [--only vtc-cls,hired] [--json out.json]
    python -m benchmarks.thin --part lengths [--pictures 1,2,4,8]

The random LLaVA of `benchmarks.lvlm` (576 image + 64 text tokens, a tiny tower) is prefilled as it is, with every reducer,
and, as the ceiling for those before the language model, by the host alone on a prompt of 64 visual tokens. Attaching and
detaching are inside the measured time. Rounds are interleaved, and figures are medians over the ratios of each round. With one
thread on a CPU the processor's time is what counts, so that other work on the machine does not; else the time on the wall.

    speed-up      plain seconds / seconds, and the middle half of the rounds
    of decoder    speed-up / (plain FLOPs / FLOPs), of the decoder's layers by formula, from the tokens that entered each
    of all        the same with the FLOPs of the whole forward as counted: tower, projector, decoder, and choosing
    of ceiling    seconds of the short prompt / seconds, for those that leave 64 tokens: no such reducer can be faster
    overhead      for the same: (seconds - seconds of the short prompt) / plain seconds

The formula says nothing of `zipvl`, whose layers see all tokens and whose attention is sparse, nor of what `slow-fast` adds.

Second part, `lengths`: from how many tokens on `zipvl` pays. Two layers, prompts of 1 to 8 such pictures, the cache quantised
(as by default) and left alone. Attention of random weights is nearly even, so its tau is set to leave the share of tokens
that the paper reports for LLaVA-1.5 at tau = 0.975, 53 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import sightline as sl
from benchmarks.lvlm import GRID, IMAGE, TEXT, chosen, make_inputs, make_model, rounds
from sightline.evaluate.cost import UNCOUNTED
from sightline.evaluate.flops import Decoder
from sightline.evaluate.peak import peak_bytes

KEEP = 64
BEFORE = {
    "vtc-cls": sl.prune.VTCCLS(KEEP),
    "hired": sl.prune.HiRED(KEEP / GRID**2),
    "flowcut": sl.prune.FlowCut(KEEP),
    "fopru": sl.prune.FoPru(KEEP / GRID**2),
    "random": sl.prune.Random(KEEP / GRID**2),
    "quota": sl.prune.QuoTA(KEEP, 1, probabilities=(1.0,)),
}
INSIDE = {
    "pyramiddrop": sl.prune.PyramidDrop(image_token_ratio_list=(1 / 3, 1 / 6, KEEP / GRID**2)),
    "mustdrop": sl.prune.MustDrop(tau_g=1 / GRID**2, tau_i=1.0, merge_threshold=None, keep_rate=0),
    "dyvte": sl.prune.DyVTE(exit_layer=1),
    "zipvl": sl.prune.ZipVL(tau=0.7),
    "slow-fast": sl.prune.SlowFast(pooling_stride=1, temporal_stride=1, spatial_stride=3),
}
SPARSE = {"zipvl": sl.prune.ZipVL(tau=0.7), "zipvl:keep": sl.prune.ZipVL(tau=0.7, cache_mode="keep")}
PART_LAYERS = 2  # of `lengths`


def short_prompt(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt with KEEP placeholders."""
    ids = inputs["input_ids"]
    placeholder = ids[0] == IMAGE
    stay = ~placeholder | (placeholder.cumsum(0) <= KEEP)
    return {"input_ids": ids[:, stay], "attention_mask": inputs["attention_mask"][:, stay]}


def counted(model: Any, task: Callable[[], object]) -> tuple[int, int]:
    """(formula of the decoder's layers, counted of everything), multiply-accumulates of one prefill."""
    entered: list[int] = []
    with ExitStack() as hooks, FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as mode:
        for layer in model.model.language_model.layers:  # inside the layers, behind the cuts
            hooks.callback(layer.mlp.register_forward_pre_hook(lambda m, args: entered.append(args[0].shape[1])).remove)
        task()
    return Decoder.of(model.config).prefill_macs(entered), mode.get_total_flops() // 2


def timed(tasks: dict[str, Callable[[], object]], count: int, device: str) -> dict[str, list[float]]:
    """Seconds of every task, interleaved, by the clock that suits."""
    if device != "cpu" or torch.get_num_threads() > 1:
        return rounds(tasks, count, device)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}

    def clocked(name: str) -> None:
        begin = time.process_time()
        tasks[name]()
        seconds[name].append(time.process_time() - begin)

    rounds({name: partial(clocked, name) for name in tasks}, count, device)
    return {name: found[1:] for name, found in seconds.items()}  # without the warm-up round


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Per way: seconds, speed-up, its shares of the FLOPs ratios, overhead, peak MB."""
    model, inputs = make_model(args.layers, args.device, tower=4), make_inputs(args.device)
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
    reducers = BEFORE | INSIDE
    tasks |= {name: partial(prefill, reducers[name]) for name in chosen(args.only, reducers)}
    macs = {name: counted(model, task) for name, task in tasks.items()}
    peaks = {name: peak_bytes(model, task) / 2**20 for name, task in tasks.items()}
    seconds = timed(tasks, args.rounds, args.device)
    found = {}
    print(f"\nprefill of {GRID**2} + {TEXT} tokens ({args.layers} layers x 1024), {args.rounds} rounds")
    print(
        f"{'':14s} {'seconds':>8s} {'speed-up':>18s} {'of decoder':>12s} {'of all':>12s} {'peak MB':>8s} "
        f"{'of ceiling':>11s} {'overhead':>9s}"
    )
    for name in tasks:
        ratios = [plain / mine for plain, mine in zip(seconds["plain"], seconds[name], strict=True)]
        low, speed, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        ratio_decoder, ratio_all = (plain / mine for plain, mine in zip(macs["plain"], macs[name], strict=True))
        row = found[name] = {
            "seconds": statistics.median(seconds[name]),
            "speed_up": speed,
            "speed_up_quartiles": [low, high],
            "decoder_ratio": ratio_decoder,
            "of_decoder": speed / ratio_decoder,
            "all_ratio": ratio_all,
            "of_all": speed / ratio_all,
            "peak_mb": peaks[name],
        }
        shares = " ".join(f"{row[k + '_ratio']:5.2f} {100 * row['of_' + k]:4.0f} %" for k in ("decoder", "all"))
        own = ""
        if name in BEFORE:
            rounds_of = list(zip(*(seconds[k] for k in (name, "short prompt", "plain")), strict=True))
            row["of_ceiling"] = statistics.median(short / mine for mine, short, _ in rounds_of)
            row["overhead"] = statistics.median((mine - short) / plain for mine, short, plain in rounds_of)
            own = f"{100 * row['of_ceiling']:9.0f} % {100 * row['overhead']:7.1f} %"
        spread = f"{speed:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{name:14s} {row['seconds']:8.3f} {spread:>18s} {shares} {row['peak_mb']:8.0f} {own}", flush=True)
    return found


def lengths(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Per number of pictures and way: tokens, seconds, speed-up, its share of the ratio of counted FLOPs, important tokens."""
    model, found = make_model(PART_LAYERS, args.device, tower=4), {}
    print(f"\nprefill of more pictures ({PART_LAYERS} layers x 1024)")
    print(f"{'':14s} {'tokens':>7s} {'important':>10s} {'seconds':>8s} {'speed-up':>9s} {'of all':>12s}")
    for pictures in (int(k) for k in args.pictures.split(",")):
        inputs = make_inputs(args.device, pictures)
        shares: dict[str, float] = {}

        def prefill(name: str, *systems: object, inputs=inputs, shares=shares) -> None:
            with torch.no_grad(), sl.attach(model, *systems) as attached:
                model(**inputs, use_cache=True, logits_to_keep=1)
            mean = [sum(s) / len(s) for s in (r["share_of_tokens"] for r in attached.report().values())]
            shares[name] = mean[0] if mean else 1.0

        tasks = {"plain": partial(prefill, "plain")}
        tasks |= {name: partial(prefill, name, system) for name, system in SPARSE.items()}
        macs = {name: counted(model, task)[1] for name, task in tasks.items()}
        seconds = {name: statistics.median(s) for name, s in timed(tasks, args.rounds, args.device).items()}
        for name in tasks:
            speed, ratio = seconds["plain"] / seconds[name], macs["plain"] / macs[name]
            row = {
                "tokens": inputs["input_ids"].shape[1],
                "share": shares[name],
                "seconds": seconds[name],
                "speed_up": speed,
                "all_ratio": ratio,
                "of_all": speed / ratio,
            }
            found[f"{name} {pictures}"] = row
            print(
                f"{name:14s} {row['tokens']:7d} {100 * row['share']:8.0f} % {row['seconds']:8.3f} {speed:9.2f}"
                f" {ratio:5.2f} {100 * speed / ratio:4.0f} %",
                flush=True,
            )
    return found


PARTS = {"reducers": measure, "lengths": lengths}


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="reducers, joined by commas; all when left out")
    parser.add_argument("--part", choices=PARTS, help="one of the two parts; both when left out")
    parser.add_argument(
        "--pictures", default="1,2,4,8", help="of the part `lengths`: pictures per prompt, 576 tokens each"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for part in [args.part] if args.part else PARTS:
        found |= PARTS[part](args)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

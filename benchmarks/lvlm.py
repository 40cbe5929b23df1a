"""What VAR and `record` cost on `generate`: interleaved rounds on one random LLaVA-shaped model, ratios of medians.

    python -m benchmarks.lvlm [--rounds 7] [--device cpu|cuda] [--layers 8] [--json out.json]

Model: decoder of 8 layers x 1024, 16 heads, 576 image + 64 text tokens, 32 new tokens. Its tower is made tiny on purpose:
nothing hides what the decoder pays. VAR's threshold is set so that each layer has a few sinks and every row is edited.
Beside them: the reference that materialises every attention map (the host's eager attention, then `redistribute`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers as tf

import sightline as sl
from benchmarks.reference import naive_var
from sightline.engine.attention import Call, Edit, attend
from sightline.errors import UnknownNameError, nearest
from sightline.evaluate.peak import live_bytes
from sightline.steer.var import VAR, factors, group_members

IMAGE, GRID, TEXT, NEW = 32000, 24, 64, 32


def make_model(layers: int, device: str, tower: int = 2) -> tf.LlavaForConditionalGeneration:
    """A random LLaVA: 576 visual tokens from a small tower, of which the last layer but one is used; Llama of width 1024."""
    torch.manual_seed(0)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=tower,
            num_attention_heads=1,
            image_size=96,
            patch_size=4,
        ),
        text_config=tf.LlamaConfig(
            hidden_size=1024,
            intermediate_size=2752,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=32064,
        ),
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
    )
    model = tf.LlavaForConditionalGeneration(config).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


def make_inputs(device: str, pictures: int = 1) -> dict[str, torch.Tensor]:
    """One prompt: 16 text tokens, 576 image tokens per picture, 48 text tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, 31000, (1, TEXT), generator=generator)
    ids = torch.cat([text[:, :16], torch.full((1, pictures * GRID * GRID), IMAGE), text[:, 16:]], 1)
    pixels = torch.randn(pictures, 3, 96, 96, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device),
    }


def rounds(tasks: dict[str, Callable[[], object]], count: int, device: str) -> dict[str, list[float]]:
    """Seconds of every task, interleaved; one warm-up round first."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(count + 1):
        for name, task in tasks.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            task()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - begin)
        print(f"round {i}/{count}", {n: round(s[-1], 2) for n, s in seconds.items() if s}, file=sys.stderr)
    return seconds


def chosen(only: str | None, known: Sequence[str]) -> list[str]:
    """The names in `only`, separated by commas; None: all. UnknownNameError names the nearest."""
    names = list(known) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise UnknownNameError(f"nothing here is called {name!r}: {nearest(name, list(known))}")
    return names


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of every task: median seconds, their ratio to the median of "plain", and the median distance of the rounds' ratios."""
    base = seconds["plain"]
    middle = statistics.median(base)
    found = {}
    for name, mine in seconds.items():
        ratio = statistics.median(mine) / middle
        spread = statistics.median(abs(a / b - ratio) for a, b in zip(mine, base, strict=True))
        found[name] = {"seconds": statistics.median(mine), "plain": middle, "ratio": ratio, "spread": spread,
                       "rounds": len(mine)}  # fmt: skip
    return found


def show(found: dict[str, dict[str, float]], path: str | None) -> None:
    """Print the rows and keep them in `path`, beside what earlier calls with other names left there."""
    print(f"\n{'generate':28s} {'seconds':>8s} {'plain':>8s} {'ratio':>6s} {'+-':>6s}")
    for name, row in found.items():
        print(f"{name:28s} {row['seconds']:8.2f} {row['plain']:8.2f} {row['ratio']:6.2f} {row['spread']:6.2f}")
    if path:
        file = Path(path)
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | found, indent=1))


def generate_costs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and ratios to plain SDPA `generate` of VAR, record, both, and the full-matrix reference."""
    model, inputs = make_model(args.layers, args.device), make_inputs(args.device)
    var = VAR(tau=1.8, sink_dims=(3, 7))  # random states reach phi 1.9 to 2.7 in these dimensions in the layers edited

    def run(*systems: object) -> None:
        with torch.no_grad(), sl.attach(model, *systems):
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)

    def plain() -> None:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)

    def eager() -> None:
        with torch.no_grad(), naive_var(model, var):
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)

    tasks = {"plain": plain, "var": lambda: run(var), "record": lambda: run(sl.record()),
             "var + record": lambda: run(var, sl.record()), "full-matrix reference": eager}  # fmt: skip
    seconds = rounds(tasks, args.rounds, args.device)
    with torch.no_grad(), sl.attach(model, var) as attached:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    acted = attached.report()["var"]
    if not acted["rows_edited"]:
        raise SystemExit(
            "VAR edited nothing on this random model: these seconds say nothing about it; choose a lower tau"
        )
    print(
        f"VAR acted on {acted['rows_edited']} of {acted['rows_seen']} rows, layers {acted['layers_with_visual_sinks']}"
    )
    base = statistics.median(seconds["plain"])
    return {n: {"seconds": statistics.median(s), "ratio": statistics.median(s) / base} for n, s in seconds.items()}


def peak_memory(device: str, tokens: int = 4096, heads: int = 16, dim: int = 64) -> dict[str, float]:
    """Largest extra memory of VAR's rows on one attention call of N tokens, against the full matrix (fp32), in MB."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator).to(device) for _ in range(3))
    visual = torch.zeros(1, tokens, dtype=torch.bool, device=device)
    visual[:, 35:611] = True
    sinks = torch.zeros_like(visual)
    sinks[:, [0, 100, 300]] = True
    groups = group_members(sinks, visual)
    call = Call(q, k, v, None, True, dim**-0.5)
    edit = Edit(start=611, groups=groups, factors=lambda m, _: factors(m, 576, p=0.6, rho=0.5, summ=0.01))

    def plain() -> tuple[torch.Tensor, None]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=dim**-0.5)
        return out.transpose(1, 2).contiguous(), None

    with torch.no_grad():
        extra = live_bytes(lambda: attend(call, plain, [edit], [])) - live_bytes(plain)
    full = heads * tokens * tokens * 4
    return {"extra_mb": extra / 2**20, "full_matrix_mb": full / 2**20, "share": extra / full}


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    costs = generate_costs(args)
    print(
        f"\n{'generate':24s} {'seconds':>8s} {'ratio':>6s}   ({args.layers} layers x 1024, 576 + 64 tokens, {NEW} new)"
    )
    for name, row in costs.items():
        print(f"{name:24s} {row['seconds']:8.2f} {row['ratio']:6.2f}")
    memory = peak_memory(args.device)
    print(f"\nVAR at N = 4096: {memory['extra_mb']:.1f} MB extra, {100 * memory['share']:.1f} % of the full matrix "
          f"({memory['full_matrix_mb']:.0f} MB)")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps({"generate": costs, "memory": memory}, indent=1))


if __name__ == "__main__":
    main()

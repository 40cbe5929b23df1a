"""What a combination of systems costs: FLOPs, time, cache and memory, measured interleaved with the baseline.

One question at a time (batch 1), the same for all; every round measures every combination once, in rotating order, after
warm-up rounds; the median of the rounds is reported. All combinations run on the same attention kernel of the host.

    prefill_gflops   counted by torch's FlopCounterMode over the whole first forward (tower, projector, decoder, lm_head);
                     1 multiply-accumulate = 2 FLOPs
    decoder_gflops   the part inside the decoder's layers, counted
    formula_gflops   the same by formula (see `flops`), from the tokens that entered each layer
    prefill_ms       prepared inputs -> first token (tower and selection included)
    ttft_ms          picture and text -> first token (preprocessing included)
    tokens_per_s     new tokens after the first / time after the first
    kv_mib           keys and values after the prefill
    peak_mib         most memory in use during the generation, weights included
    visual_share     share of the visual tokens that a decoder layer works on, mean over layers and several questions; where
                     a system keeps all tokens but lets attention see some (`share_of_tokens` of its report), that share
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import StoppingCriteria, StoppingCriteriaList

from sightline.engine.attach import attach
from sightline.engine.sequences import made_cache
from sightline.errors import ParameterError
from sightline.evaluate.flops import Decoder
from sightline.evaluate.peak import peak_bytes
from sightline.hosts.base import get

if TYPE_CHECKING:
    from rich.console import Console

    from sightline.engine.attach import Attachment
    from sightline.evaluate.runner import Rows
    from sightline.evaluate.task import Item, Task
    from sightline.lvlm import LVLM

WARMUP, ROUNDS, NEW_TOKENS, SHARE_QUESTIONS = 3, 10, 16, 8
MIB = 2**20


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """QK' and PV of (B, H, Q, D), (B, G, K, D), (B, G, K, E)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


# The CPU's fused attention, which some versions of torch count and others do not know.
UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _Stamps(StoppingCriteria):
    """Notes the time after every new token; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    lvlm: LVLM,
    rows: Rows,
    task: Task,
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    new_tokens: int = NEW_TOKENS,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Cost per label of `rows`, on the first question of a task.

    Raises:
        ParameterError: rounds or new_tokens is out of range.
    """
    from rich.progress import track

    if rounds < 1 or warmup < 0 or new_tokens < 2:
        raise ParameterError(
            f"rounds={rounds!r}, warmup={warmup!r}, new_tokens={new_tokens!r}: choose rounds >= 1, warmup >= 0 and new_tokens >= 2"
        )
    item = task.items[0]
    found = {label: count(lvlm, systems, task, item, new_tokens) for label, systems in rows.items()}
    timed: dict[str, list[tuple[float, float, float]]] = {label: [] for label in rows}
    labels = list(rows)
    for k in track(range(warmup + rounds), "cost", console=console, transient=True, disable=console is None):
        for label in labels[k % len(labels) :] + labels[: k % len(labels)]:
            once = _time(lvlm, rows[label], task, item, new_tokens)
            if k >= warmup:
                timed[label].append(once)
    for label, samples in timed.items():
        prefill, first, rate = (statistics.median(column) for column in zip(*samples, strict=True))
        spread = (
            [statistics.quantiles([s[0] for s in samples], n=4)[k] for k in (0, 2)] if rounds > 1 else [prefill] * 2
        )
        found[label] |= {
            "visual_share": visual_share(lvlm, rows[label], task),
            "prefill_ms": 1e3 * prefill,
            "prefill_ms_quartiles": [1e3 * value for value in spread],
            "ttft_ms": 1e3 * first,
            "tokens_per_s": rate,
            "rounds": rounds,
        }
    return found


def count(lvlm: LVLM, systems: tuple, task: Task, item: Item, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """What needs no clock: FLOPs, tokens per layer, cache and peak memory."""
    inputs = lvlm.inputs(task.open(item), task.prompt(item))
    layers = get(get(lvlm.model, lvlm.host.decoder), lvlm.host.layers)
    seen: list[
        tuple[int, int]
    ] = []  # rows and tokens that enter each layer, pass after pass: a second stream is one more
    with attach(lvlm.model, *systems, host=lvlm.host), ExitStack() as hooks:
        for layer in layers:  # behind the systems' own hooks: what really enters the layer
            hooks.callback(layer.register_forward_pre_hook(_keep_shape(seen), with_kwargs=True).remove)
        with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as mode:
            cache = made_cache(lvlm.model(**inputs, use_cache=True, logits_to_keep=1))
    kept, stored = [_held(layer) for layer in cache.layers], sum(_stored(layer) for layer in cache.layers)
    decoder = Decoder.of(lvlm.model.config)
    with attach(lvlm.model, *systems, host=lvlm.host):
        peak = peak_bytes(lvlm.model, lambda: _generate(lvlm, inputs, new_tokens))
    return {
        "prefill_gflops": mode.get_total_flops() / 1e9,
        "decoder_gflops": _inside_layers(mode, lvlm) / 1e9,
        "formula_gflops": 2
        * sum(_macs(decoder, seen[k : k + len(layers)]) for k in range(0, len(seen), len(layers)))
        / 1e9,
        "tokens_per_layer": sum(rows * tokens for rows, tokens in seen) / len(layers),
        "kv_mib": stored / MIB,
        "kv_formula_mib": decoder.kv_bytes(kept, cache.layers[0].keys.element_size()) / MIB,
        "peak_mib": peak / MIB,
    }


def visual_share(lvlm: LVLM, systems: tuple, task: Task, questions: int = SHARE_QUESTIONS) -> float:
    """Visual tokens that the decoder's layers see under `systems`, as a share of those of the plain prompt."""
    layers = get(get(lvlm.model, lvlm.host.decoder), lvlm.host.layers)
    placeholders = {
        getattr(lvlm.model.config, name or "", None) for name in (lvlm.host.image_token, lvlm.host.video_token)
    }
    shares = []
    for item in task.items[:: max(1, len(task.items) // questions)][:questions]:
        inputs, seen = lvlm.inputs(task.open(item), task.prompt(item)), []
        with attach(lvlm.model, *systems, host=lvlm.host) as attached, ExitStack() as hooks:
            for layer in layers:
                see = _keep_shape(seen, attached)
                hooks.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
            with torch.inference_mode():
                lvlm.model(**inputs, use_cache=True, logits_to_keep=1)
        visual = sum(int((inputs["input_ids"] == token).sum()) for token in placeholders - {None})
        mean = statistics.mean(tokens for _, tokens in seen) - inputs["input_ids"].shape[1] + visual
        stated = [mean for found in attached.report().values() for mean in _stated(found)]
        shares.append(min([mean / visual if visual else 1.0, *stated]))
    return statistics.mean(shares)


def _stated(report: Mapping[str, Any]) -> list[float]:
    """The share of tokens that attention sees, mean over layers, where a system reports it."""
    found = report.get("share_of_tokens") or []
    return [statistics.mean(found)] if found else []


def _held(layer: Any) -> int:
    """Tokens in a layer's cache, compressed ones too."""
    return layer.keys.shape[-2] + sum(block.high.shape[1] for block in getattr(layer, "blocks", ()))


def _stored(layer: Any) -> int:
    """Bytes of a layer's cache."""
    if hasattr(layer, "nbytes"):  # compressed
        return layer.nbytes
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))


def _macs(decoder: Decoder, seen: list[tuple[int, int]]) -> float:
    """Multiply-adds of one pass through all layers."""
    return seen[0][0] * decoder.prefill_macs([tokens for _, tokens in seen])


def _keep_shape(seen: list[tuple[int, int]], attached: Attachment | None = None) -> Any:
    """A hook that notes (rows, tokens); of an attachment only in the run that answers, not in further ones of systems."""

    def keep(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        now = attached and attached.sequences.current
        if not now or not (now.stream or now.second):
            seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    return keep


def _inside_layers(mode: FlopCounterMode, lvlm: LVLM) -> int:
    """FLOPs counted inside the decoder's layers."""
    path = f"{type(lvlm.model).__name__}.{lvlm.host.decoder}.{lvlm.host.layers}."
    counts = mode.get_flop_counts()
    mine = [name for name in counts if name.startswith(path) and "." not in name.removeprefix(path)]
    return sum(sum(counts[name].values()) for name in mine)


def _generate(lvlm: LVLM, inputs: Mapping[str, Any], new_tokens: int, stamps: _Stamps | None = None) -> None:
    criteria = StoppingCriteriaList([stamps] if stamps else [])
    with torch.inference_mode():
        lvlm.model.generate(
            **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, stopping_criteria=criteria
        )


def _time(lvlm: LVLM, systems: tuple, task: Task, item: Item, new_tokens: int) -> tuple[float, float, float]:
    """Seconds of the prefill, seconds to the first token from the picture on, tokens per second after it."""
    picture, prompt, stamps = task.open(item), task.prompt(item), _Stamps(lvlm.device)
    with attach(lvlm.model, *systems, host=lvlm.host):
        synchronize(lvlm.device)
        begin = time.perf_counter()
        inputs = lvlm.inputs(picture, prompt)
        synchronize(lvlm.device)
        ready = time.perf_counter()
        _generate(lvlm, inputs, new_tokens, stamps)
    first, last = stamps.times[0], stamps.times[-1]
    return first - ready, first - begin, (len(stamps.times) - 1) / max(last - first, 1e-9)

"""The training loop of every stage: AdamW and Muon, warm-up and cosine, bf16 autocast, progress, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sightline.errors import InputError, ParameterError
from sightline.learn.recipe import Plan

FLOOR = 0.1  # final learning rate as a fraction of the peak
PRECISIONS = ("auto", "bf16", "fp32")
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what the optimisers remember of a parameter


def precision_of(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of "auto", "bf16" or "fp32" (None: no autocast). Auto is bf16 where the device is fast at it."""
    if name not in PRECISIONS:
        raise ParameterError(f"precision={name!r}: choose one of {', '.join(PRECISIONS)}")
    if name == "auto":
        name = "bf16" if device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability() else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def rate(plan: Plan, step: int, progress: float) -> float:
    """Learning rate of a step: linear warm-up over `plan.warmup` steps, then cosine in `progress` down to FLOOR."""
    warm = min(1.0, (step + 1) / plan.warmup) if plan.warmup else 1.0
    return plan.lr * warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizers(parameters: dict[str, nn.Parameter], plan: Plan) -> list[torch.optim.Optimizer]:
    """AdamW, and with `plan.muon` Muon (Jordan et al., 2024) for the matrices of layers; each group knows its "peak" rate.

    Word embeddings and `plan.slow_parts` follow `plan.slow`; vectors and embeddings do not decay.
    """
    slow = {name for name in parameters if "embed_tokens" in name or name.startswith(plan.slow_parts)}
    matrices = {name for name, p in parameters.items() if p.ndim > 1 and "embed_tokens" not in name}
    layers = {name for name in matrices - slow if parameters[name].ndim == 2} if plan.muon else set()
    groups = []
    for late, decays in ((False, True), (False, False), (True, True), (True, False)):
        names = [n for n in parameters if n not in layers and (n in slow) == late and (n in matrices) == decays]
        if names:
            peak = plan.lr * (plan.slow if late else 1.0)
            decay = plan.weight_decay if decays else 0.0
            groups.append({"params": [parameters[n] for n in names], "weight_decay": decay, "peak": peak})
    made: list[torch.optim.Optimizer] = (
        [torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, plan.beta2))] if groups else []
    )
    if layers:
        group = {"params": [parameters[n] for n in parameters if n in layers], "peak": plan.muon}
        made.append(torch.optim.Muon([group], lr=plan.muon, weight_decay=plan.weight_decay, momentum=0.95))
    return made


class Trainer:
    """Trains `parameters` (name -> tensor) of a stage and keeps its checkpoint `folder/NAME.safetensors`.

    The checkpoint holds parameters, optimiser moments and the random state; its metadata the step, the seconds
    trained, and the loss curve. It is replaced atomically, so a kill at any moment loses at most `save_every` steps,
    and the resumed run sees the same batches in the same order. `state`: more tensors to keep, changed in place (running
    statistics, averages); `after` is called after every step.
    """

    def __init__(self, name: str, parameters: dict[str, nn.Parameter], plan: Plan, folder: Path, *,
                 precision: torch.dtype | None = None, minutes: float | None = None, save_every: int = 100,
                 state: dict[str, torch.Tensor] | None = None, after: Callable[[], None] | None = None):  # fmt: skip
        self.name, self.parameters, self.plan, self.folder = name, parameters, plan, Path(folder)
        self.state, self.after = state or {}, after
        self.dtype, self.minutes, self.save_every = precision, minutes, save_every
        self.step, self.seconds, self.curve, self.done = 0, 0.0, [], False
        self.optimizers = optimizers(parameters, plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._load()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def progress(self) -> float:
        """Share of the stage that is over: by steps, or by minutes if these run out first."""
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(self.step / self.plan.steps, by_time)

    def run(self, batches: Callable[[int], Iterator[Any]], loss_of: Callable[[Any], tuple[torch.Tensor, dict]]) -> None:
        """Train until done. `batches(k)` yields the batches from step k on; `loss_of` gives the loss and metrics."""
        if self.done:
            return
        device = next(iter(self.parameters.values())).device
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}")) as bar:
            task = bar.add_task(self.name, total=self.plan.steps, completed=self.step, note="")
            clock = time.perf_counter()
            for batch in batches(self.step):
                metrics = self._update(batch, loss_of, device)
                self.seconds, clock = self.seconds + time.perf_counter() - clock, time.perf_counter()
                self.step += 1
                self.curve.append({"step": self.step, "lr": round(self._lr, 8), **metrics})
                bar.update(task, completed=self.step, note=_note(self.curve))
                if self.progress >= 1:
                    break
                if self.step % self.save_every == 0:
                    self.save()
                    print(f"{self.name} {self.step} {self.seconds:.0f}s {_note(self.curve)}", flush=True)
        self.done = True
        self.save()

    def _update(self, batch: Any, loss_of: Callable, device: torch.device) -> dict:
        self._lr = rate(self.plan, self.step, self.progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr / self.plan.lr * group["peak"]
        cast = torch.autocast(device.type, self.dtype) if self.dtype else nullcontext()
        with cast:
            loss, metrics = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.after is not None:
            self.after()
        return {"loss": round(float(loss.detach()), 5), **{k: round(float(v), 5) for k, v in metrics.items()}}

    def save(self) -> None:
        """Write the checkpoint, replacing the old one at once."""
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach().contiguous()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().contiguous()
        for name, tensor in self.state.items():
            tensors[f"state.{name}"] = tensor.detach().clone().contiguous()
        facts = {"step": self.step, "seconds": self.seconds, "done": self.done, "curve": self.curve}
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"state": json.dumps(facts)})
        os.replace(partial, self.path)

    def _load(self) -> None:
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as stored:
            facts = json.loads(stored.metadata()["state"])
            names = set(stored.keys())
            for name, parameter in self.parameters.items():
                if f"parameter.{name}" not in names or stored.get_slice(f"parameter.{name}").get_shape() != list(
                    parameter.shape
                ):
                    raise InputError(
                        f"{self.path} was written with another recipe ({name} differs): choose an empty --out folder"
                    )
                with torch.no_grad():
                    parameter.copy_(stored.get_tensor(f"parameter.{name}"))
                moments = {k: stored.get_tensor(f"{k}.{name}") for k in MOMENTS if f"{k}.{name}" in names}
                if moments:
                    owner = self.optimizers[-1] if "momentum_buffer" in moments else self.optimizers[0]
                    owner.state[parameter] = {
                        k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
                    }
            for name, tensor in self.state.items():
                with torch.no_grad():
                    tensor.copy_(stored.get_tensor(f"state.{name}"))
            torch.set_rng_state(stored.get_tensor("rng"))
        self.step, self.seconds, self.curve = facts["step"], facts["seconds"], facts["curve"]
        self.done = facts["done"] or self.progress >= 1


def _note(curve: list[dict], window: int = 50) -> str:
    """Means of the last steps' numbers, in short."""
    recent = curve[-window:]
    keys = [key for key in recent[-1] if key not in ("step", "lr")]
    return " ".join(f"{key} {sum(row[key] for row in recent) / len(recent):.3f}" for key in keys)


def named(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a module by prefixed name, made trainable."""
    found = {f"{prefix}{name}": parameter for name, parameter in module.named_parameters()}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def draw_curves(curves: dict[str, list[dict]]):
    """Loss of every stage over its steps, one panel each: a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * max(1, len(curves)), 2.8), layout="constrained")
    for k, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), k + 1)
        steps, losses = [row["step"] for row in curve], [row["loss"] for row in curve]
        axes.plot(steps, losses, color="0.8", linewidth=0.8)
        width = max(1, len(losses) // 50)
        smooth = [sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1])
                  for i in range(len(losses))]  # fmt: skip
        axes.plot(steps, smooth, color="C0")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("loss")
    return figure

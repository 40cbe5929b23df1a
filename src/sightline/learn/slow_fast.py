"""Training of slow-fast (arXiv 2504.01328) on films of the generated world, in the paper's two stages.

Stage 1: projector (peak learning rate 1e-3) and the new branch (2e-4). Stage 2: decoder, projector and branch (2e-5). Cosine,
3 % warm-up; the loss is on the answers. The branch is saved under the keys of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sightline.engine.attach import attach
from sightline.errors import ParameterError
from sightline.evaluate.films import clip
from sightline.hosts import get
from sightline.learn import films, loop
from sightline.learn.recipe import Plan
from sightline.prune.parts.slow_branch import branch_state
from sightline.prune.slow_fast import SlowFast

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.clips import Clip
    from sightline.lvlm import LVLM

RATES = {1: (1e-3, 2e-4), 2: (2e-5, 2e-5)}  # peak learning rates: projector, the rest


def plan_for(stage: int, steps: int, batch: int) -> Plan:
    """The paper's schedule of a stage; ParameterError for another stage."""
    if stage not in RATES:
        raise ParameterError(f"stage={stage!r} is out of range: choose 1 (projector and branch) or 2 (decoder as well)")
    projector, rest = RATES[stage]
    return Plan(steps, batch, rest, weight_decay=0.0, warmup=math.ceil(0.03 * steps), slow=projector / rest)


def train(
    lvlm: LVLM,
    system: SlowFast,
    stage: int,
    plan: Plan,
    out: Path,
    *,
    frames: int = 32,
    size: int = 112,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> loop.Trainer:
    """Train a stage on `lvlm` itself; `out/branch.safetensors` is what `SlowFast(weights=...)` reads.

    An unfinished run in `out` goes on. For stage 2 give the system the `weights` of stage 1.

    Args:
        system: which tokens are fast, which layers are hybrid.
        frames, size: of the films, which come from the training split.
    """
    plan_for(stage, 1, 1)
    for parameter in lvlm.model.parameters():
        parameter.requires_grad_(False)
    with attach(lvlm.model, system, host=lvlm.host) as attached:
        branch = attached.setup("slow-fast").branch
        learned = {**loop.named("projector.", get(lvlm.model, lvlm.host.projector)), **loop.named("branch.", branch)}
        if stage == 2:
            learned |= loop.named("decoder.", get(lvlm.model, lvlm.host.decoder))
        trainer = loop.Trainer(f"slow-fast-{stage}", learned, plan, out, precision=precision)
        trainer.run(lambda first: batches(plan, first, frames, size, seed), lambda batch: (_loss(lvlm, *batch), {}))
        save_branch(branch, out / "branch.safetensors")
    return trainer


def save_branch(branch: torch.nn.ModuleDict, path: Path) -> None:
    """Write the branch's parameters, whole or not at all."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in branch_state(branch).items()}, partial)
    partial.replace(path)


def batches(
    plan: Plan, first: int, frames: int, size: int, seed: int
) -> Iterator[tuple[list[Clip], list[str], list[str]]]:
    """Clips, questions and answers of the steps from `first` on: one question a film."""
    for step in range(first, plan.steps):
        numbers = range(step * plan.batch, (step + 1) * plan.batch)
        asked = [films.question(seed, number) for number in numbers]
        yield [clip(k, size, frames) for k, _ in asked], [q.text for _, q in asked], [q.answer for _, q in asked]


def _loss(lvlm: LVLM, clips: list[Clip], questions: list[str], answers: list[str]) -> Tensor:
    batch, labels = films.with_answers(lvlm, lvlm.inputs(clips, questions), answers)
    return lvlm.model(**batch, labels=labels).loss

"""Training the gates of DyVTE (`sightline.prune.dyvte`) on a frozen vision-language model.

One step: a random layer k, and two passes without gradient over a batch with labels: the whole model, and the same with
all visual tokens removed behind layer k. Where the second answers (almost) like the first, leaving at k is right. The gate
of layer k learns that from what it will see at inference: the text between image and answer in the output of layer k.

Removing is what the paper's masking means for text (`engine.cuts` is tested to give the same numbers), and cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.engine.attach import attach
from sightline.engine.select import Keep
from sightline.engine.shape import shape_of
from sightline.engine.system import Site, System
from sightline.errors import InputError, ParameterError
from sightline.hosts import find
from sightline.learn.loop import Trainer, named
from sightline.learn.recipe import Plan
from sightline.prune.dyvte import NAME, WIDTH, Gate, features, text_of

if TYPE_CHECKING:
    from sightline.hosts import Host

AGREEMENT, LOSS_RATIO = 0.99, 1.03  # the paper's: leaving is right above the first and below the second
PLAN = Plan(steps=50, batch=128, lr=6e-5, weight_decay=0.0, warmup=2)  # 1 % of LLaVA's mixture, one epoch


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean cross-entropy of the answer tokens; logits (B, N, V), labels (B, N), negative: not supervised."""
    wanted = labels[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), wanted, reduction="none", ignore_index=-100)
    return loss.sum(1) / (wanted > 0).sum(1)


def gate_labels(full: Tensor, exited: Tensor, labels: Tensor) -> Tensor:
    """(B,) int64: 1 where the answer without visual tokens is as good as the full one.

    Args:
        full, exited: (B, N, V) logits of both passes. labels: (B, N), -100 where nothing is supervised.
    """
    answer = labels[:, 1:] > 0
    same = (full.argmax(-1) == exited.argmax(-1))[:, :-1] & answer
    agreement = same.sum(1) / answer.sum(1)
    as_low = answer_loss(exited, labels) < answer_loss(full, labels) * LOSS_RATIO
    return ((agreement > AGREEMENT) & as_low).long()


@dataclass(frozen=True)
class _Leave(System):
    """All visual tokens leave after `layer`; what its gate sees is written down."""

    layer: int

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        if site.layer != self.layer + 1:
            return None
        site.tally["features"] = features(hidden.detach(), text_of(site))
        return Keep(~site.tokens.visual[:, site.start :], "keep")


def judged(model: nn.Module, batch: dict[str, Any], layer: int, host: Host | None = None) -> tuple[Tensor, Tensor]:
    """What the gate of a layer sees in a batch, (B, 2D), and what it should say, (B,).

    Raises:
        InputError: the batch has no labels, or no picture.
    """
    labels = batch.get("labels")
    if labels is None:
        raise InputError("gates learn from answers: every batch needs `labels`, -100 where nothing is supervised")
    leave = _Leave(layer)
    with torch.no_grad():
        full = model(**batch, use_cache=False).logits
        with attach(model, leave, host=host) as attached:
            exited = model(**batch, use_cache=False).logits
    seen = attached.workers[0].tally.get("features")
    if seen is None:
        raise InputError("gates learn from pictures: a batch without any came")
    return seen, gate_labels(full, exited, labels)


def train(
    model: nn.Module,
    batches: Callable[[int], Iterator[dict[str, Any]]],
    out: str | Path,
    *,
    plan: Plan = PLAN,
    width: int = WIDTH,
    host: Host | None = None,
    save_every: int = 100,
) -> Path:
    """Train one gate per decoder layer; the model is not touched. Resumes from `out` where it was killed.

    Args:
        model: a vision-language model, in evaluation mode.
        batches: from a step on, the model's own inputs with `labels`, rows with one picture and one answer.
        out: folder for the checkpoint and the gates.
        plan: steps, learning rate and warm-up.
        width: of the gates' hidden layer.

    Returns:
        The file of gates, for `DyVTE(gates=...)`.

    Raises:
        InputError: a batch without labels or without pictures; a checkpoint of another shape.
        ParameterError: a decoder of one layer, or a model in training mode.
    """
    shape = shape_of(model, host or find(model))
    if shape.layers < 2:
        raise ParameterError("a decoder of one layer has no layer to leave at: nothing to train")
    if model.training:
        raise ParameterError("the model is in training mode: call model.eval(), the gates learn from its answers")
    weight = next(model.parameters())
    gates = nn.ModuleList(Gate(2 * shape.hidden_size, width) for _ in range(shape.layers)).to(weight.device)
    trainer = Trainer("gates", named("gates.", gates), plan, Path(out), save_every=save_every)

    def loss_of(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        layer = int(torch.randint(shape.layers - 1, ()))  # of the global generator, which the trainer restores
        seen, wanted = judged(model, batch, layer, host)
        logits = gates[layer](seen.float())
        right = (logits.argmax(-1) == wanted).float().mean()
        return F.cross_entropy(logits, wanted), {"right": right, "leave": wanted.float().mean()}

    trainer.run(batches, loss_of)
    file = Path(out) / "exit_gates.safetensors"
    found = {}
    for layer, one in enumerate(gates):
        found[NAME.format(layer, "w1")] = one.w1.weight.detach().cpu().contiguous()
        found[NAME.format(layer, "w2")] = one.w2.weight.detach().cpu().contiguous()
    save_file(found, file, metadata={"system": "dyvte", "steps": str(trainer.step)})
    return file

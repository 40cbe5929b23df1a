"""HAVEN's two trainings (arXiv 2503.19622), on films of the generated world: think before answering, and think the truth.

SRFT: supervised fine-tuning on answers that begin with thinking; the loss is on the response.
TDPO: preference between a thinking without and one with a false span, which differ in a few tokens:

    log pi(y) = (sum_unchanged log p + gamma sum_changed log p) / N,   N = unchanged + gamma changed
    loss      = -log sigmoid(beta [(log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))])

Changed tokens are those outside a longest common subsequence of y_w and y_l. gamma = 1: length-normalised DPO; `normalise`
False: plain sums. The official repository holds the benchmark only; the loss is the paper's equation 2 (after RLHF-V's dense
preference optimisation), which gives no gamma. In the paper thinking is distilled from another model and its
errors are found by annotators; here the world itself knows what is true, and one stated fact is made false. The decoder and
the projector are trained whole (the paper: LoRA), in plain torch.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline import scenes
from sightline.errors import check_range
from sightline.evaluate.films import clip
from sightline.hosts import get
from sightline.learn import films, loop
from sightline.learn.recipe import Plan
from sightline.scenes.asking import phrase

if TYPE_CHECKING:
    from sightline.clips import Clip
    from sightline.lvlm import LVLM
    from sightline.scenes.film import Film

RATES = {"srft": 2e-5, "tdpo": 5e-7}
EXCHANGE = (
    ("left", "right"), ("up", "down"), ("enters", "leaves"), ("appears", "vanishes"), ("stays", "moves"),
    ("there at the start", "not there at the start"), ("there at the end", "not there at the end"),
)  # fmt: skip


def thinking(film: Film, question: scenes.Question) -> str:
    """What a truthful thinker says of the things that a question is about, in whole sentences."""
    said = []
    for i in question.about:
        track, name = film.tracks[i], phrase(film, i) or f"a {film.tracks[i].colour} {film.tracks[i].kind}"
        doing = f"{track.path} to the {track.direction}" if track.direction in ("left", "right") else (
            f"moves {track.direction}" if track.direction else track.path.replace("still", "stays")
        )  # fmt: skip
        start, end = ("there" if track.in_view(k) else "not there" for k in (0, len(film) - 1))
        said.append(f"{name[0].upper()}{name[1:]} {doing}. It is {start} at the start and {end} at the end.")
    said += [f"{name}." for name in film.telling() if question.kind == "passing" and "passes" in name]
    return " ".join(said)


def response(film: Film, question: scenes.Question) -> str:
    """Thinking, then the answer."""
    return f"Thinking: {thinking(film, question)} Answer: {question.answer}"


def falsified(text: str, rng: np.random.Generator) -> str | None:
    """The thinking with one fact turned into its opposite, answer unchanged; None when it states none that has one."""
    head, mark, tail = text.partition(" Answer:")
    spans = []
    for first, second in EXCHANGE:
        for old, new in ((first, second), (second, first)):
            spans += [(m.start(), m.end(), new) for m in re.finditer(rf"(?<!not )\b{old}\b", head)]
    if not spans:
        return None
    start, end, new = spans[int(rng.integers(len(spans)))]
    return head[:start] + new + head[end:] + mark + tail


def changed(first: Sequence[int], second: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of each lie outside a longest common subsequence of both: two bool arrays."""
    n, m = len(first), len(second)
    longest = np.zeros((n + 1, m + 1), int)
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            same = first[i] == second[j]
            longest[i, j] = longest[i + 1, j + 1] + 1 if same else max(longest[i + 1, j], longest[i, j + 1])
    out = np.ones(n, bool), np.ones(m, bool)
    i = j = 0
    while i < n and j < m:
        if first[i] == second[j]:
            out[0][i] = out[1][j] = False
            i, j = i + 1, j + 1
        elif longest[i + 1, j] >= longest[i, j + 1]:
            i += 1
        else:
            j += 1
    return out


def weighted(logp: Tensor, mask: Tensor, altered: Tensor, gamma: float = 5.0, normalise: bool = True) -> Tensor:
    """log pi(y) of B responses.

    Args:
        logp: (B, N) of every token. mask: (B, N) bool, the response. altered: (B, N) bool, changed tokens.
    """
    weight = torch.where(altered, gamma, 1.0) * mask
    total = (weight * logp).sum(1)
    return total / weight.sum(1).clamp(min=1e-9) if normalise else total


def tdpo_loss(won: Tensor, lost: Tensor, won_before: Tensor, lost_before: Tensor, beta: float = 0.1) -> Tensor:
    """The preference loss from log pi of the policy and of the reference, (B,) each."""
    return -F.logsigmoid(beta * ((won - won_before) - (lost - lost_before))).mean()


def token_logps(model: torch.nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """(B, N) log-probability of every labelled token, 0 elsewhere."""
    logits = model(**batch).logits[:, :-1].float()
    wanted = labels[:, 1:]
    logp = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return F.pad(logp.masked_fill(wanted < 0, 0.0), (1, 0))


def plan_for(training: str, steps: int, batch: int) -> Plan:
    """Cosine with 3 % warm-up, no weight decay."""
    return Plan(steps, batch, RATES[training], weight_decay=0.0, warmup=math.ceil(0.03 * steps))


def srft(
    lvlm: LVLM,
    plan: Plan,
    out: Path,
    *,
    frames: int = 8,
    size: int = 112,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> loop.Trainer:
    """Teach `lvlm` itself to think before it answers. An unfinished run in `out` goes on."""

    def loss(batch: tuple[list[Clip], list[str], list[str], list[str]]) -> tuple[Tensor, dict]:
        clips, questions, true, _ = batch
        inputs, labels = films.with_answers(lvlm, lvlm.inputs(clips, questions), true)
        return lvlm.model(**inputs, labels=labels).loss, {}

    trainer = loop.Trainer("srft", _learned(lvlm), plan, out, precision=precision)
    trainer.run(lambda first: pairs(plan, first, frames, size, seed), loss)
    return trainer


def tdpo(
    lvlm: LVLM,
    plan: Plan,
    out: Path,
    *,
    beta: float = 0.1,
    gamma: float = 5.0,
    normalise: bool = True,
    frames: int = 8,
    size: int = 112,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> loop.Trainer:
    """Teach `lvlm` itself to prefer true thinking; the reference is the model as it comes in."""
    check_range("beta", beta, 0, 100)
    check_range("gamma", gamma, 0, 1000)
    reference = copy.deepcopy(lvlm.model)

    def loss(batch: tuple[list[Clip], list[str], list[str], list[str]]) -> tuple[Tensor, dict]:
        clips, questions, true, false = batch
        inputs = lvlm.inputs(clips, questions)
        sides = [films.with_answers(lvlm, inputs, answers) for answers in (true, false)]
        masks = [labels >= 0 for _, labels in sides]
        altered = _altered([labels for _, labels in sides])
        scores = []
        for model in (lvlm.model, reference):
            with torch.set_grad_enabled(model is not reference):
                scores += [
                    weighted(token_logps(model, given, labels), mask, moved, gamma, normalise)
                    for (given, labels), mask, moved in zip(sides, masks, altered, strict=True)
                ]
        won, lost, *before = scores
        return tdpo_loss(won, lost, *before, beta), {"margin": (won - lost).detach().mean()}

    trainer = loop.Trainer("tdpo", _learned(lvlm), plan, out, precision=precision)
    trainer.run(lambda first: pairs(plan, first, frames, size, seed), loss)
    return trainer


def _altered(labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N) bool of each side: labelled tokens that the other side does not have."""
    found = tuple(torch.zeros_like(side, dtype=torch.bool) for side in labels)
    for row in range(len(labels[0])):
        places = [(side[row] >= 0).nonzero().flatten() for side in labels]
        moved = changed(*(side[row][at].tolist() for side, at in zip(labels, places, strict=True)))
        for mask, at, which in zip(found, places, moved, strict=True):
            mask[row, at] = torch.from_numpy(which).to(mask.device)
    return found


def _learned(lvlm: LVLM) -> dict[str, torch.nn.Parameter]:
    for parameter in lvlm.model.parameters():
        parameter.requires_grad_(False)
    parts = {"projector.": lvlm.host.projector, "decoder.": lvlm.host.decoder}
    return {name: p for prefix, path in parts.items() for name, p in loop.named(prefix, get(lvlm.model, path)).items()}


def pairs(
    plan: Plan, first: int, frames: int, size: int, seed: int
) -> Iterator[tuple[list[Clip], list[str], list[str], list[str]]]:
    """Clips, questions, true and falsified responses of the steps from `first` on."""
    for step in range(first, plan.steps):
        rows, number = [], step * plan.batch * 1000
        while len(rows) < plan.batch:
            film_seed, asked = films.question(seed, number, ("motion", "order", "presence"))
            number += 1
            true = response(scenes.film(film_seed, **films.GLANCE), asked)
            false = falsified(true, np.random.Generator(np.random.PCG64([seed, number])))
            if false is not None:
                rows.append((clip(film_seed, size, frames), asked.text, true, false))
        yield tuple(map(list, zip(*rows, strict=True)))

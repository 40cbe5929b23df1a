"""The three trainings on films of the generated world as runs of a folder: load, check, train, save.

`slow-fast` trains the branch of slow-fast attention in two stages, `srft` teaches to think before answering, `tdpo` to prefer
true thinking. A folder remembers its settings, so a run goes on as it was begun; the trained model is in `model/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sightline.catalog import parse, to_spec
from sightline.errors import InputError, ParameterError, UnknownNameError, check_range, nearest
from sightline.learn import films, loop, reasoning, slow_fast
from sightline.learn.recipe import Plan
from sightline.loading import load
from sightline.prune.slow_fast import SlowFast

if TYPE_CHECKING:
    from sightline.clips import Clip
    from sightline.lvlm import LVLM

TRAININGS = ("slow-fast", "srft", "tdpo")
SHOWN = 8  # prompts of a dry run
Batch = tuple[list["Clip"], list[str], list[str], list[str]]  # clips, questions, answers, false answers (tdpo)


@dataclass(frozen=True)
class Settings:
    """What determines a run."""

    training: str
    model: str = "tiny"
    steps: int = 200
    batch: int = 4
    lr: float | None = None  # None: the paper's
    frames: int = 8
    size: int = 112  # pixels of a frame's side
    seed: int = 0
    stage: int = 1  # slow-fast
    system: str = "slow-fast"  # slow-fast: as on the command line, stage 2 with the weights of stage 1
    beta: float = 0.1  # tdpo
    gamma: float = 5.0
    normalise: bool = True

    def check(self) -> None:
        """ParameterError or UnknownNameError when something is out of range."""
        if self.training not in TRAININGS:
            raise UnknownNameError(f"no training {self.training!r}: {nearest(self.training, TRAININGS)}")
        for name, low, high in (("steps", 1, 10**7), ("batch", 1, 4096), ("frames", 2, 256), ("size", 28, 1024)):
            check_range(name, getattr(self, name), low, high)
        if self.lr is not None and not self.lr > 0:
            raise ParameterError(f"lr={self.lr!r} is out of range: choose a positive number")
        check_range("beta", self.beta, 0, 100)
        check_range("gamma", self.gamma, 0, 1000)
        self.plan()
        if self.training == "slow-fast":
            self.slow_fast()

    def plan(self) -> Plan:
        """Steps and learning rates."""
        if self.training == "slow-fast":
            plan = slow_fast.plan_for(self.stage, self.steps, self.batch)
        else:
            plan = reasoning.plan_for(self.training, self.steps, self.batch)
        return plan if self.lr is None else replace(plan, lr=self.lr)

    def slow_fast(self) -> SlowFast:
        """The system that `system` names; ParameterError when it is another one."""
        systems = parse(self.system)
        if len(systems) != 1 or not isinstance(systems[0], SlowFast):
            raise ParameterError(f"--with {self.system}: this training takes slow-fast with its parameters alone")
        return systems[0]

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches of the steps from `first` on."""
        if self.training == "slow-fast":
            found = slow_fast.batches(self.plan(), first, self.frames, self.size, self.seed)
            return ((*batch, []) for batch in found)
        return reasoning.pairs(self.plan(), first, self.frames, self.size, self.seed)


def run(settings: Settings, out: Path, *, device: torch.device, precision: str = "auto", dry_run: bool = False) -> dict:
    """Train, or with `dry_run` say what would be trained on. Resumes what stands in `out`.

    Returns:
        What was trained and where it is, or the statistics of the data.

    Raises:
        ParameterError, UnknownNameError, ModelError: before any training. InputError: `out` was begun with other settings.
    """
    settings.check()
    dtype = loop.precision_of(precision, device)
    if not dry_run:
        _same_settings(out, settings)
    lvlm = load(settings.model, device=device, dtype="float32")
    if dry_run:
        return statistics(lvlm, settings)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")
    common: dict[str, Any] = {"frames": settings.frames, "size": settings.size, "seed": settings.seed}
    common["precision"] = dtype
    plan, facts = settings.plan(), {}
    if settings.training == "slow-fast":
        trainer = slow_fast.train(lvlm, settings.slow_fast(), settings.stage, plan, out, **common)
        trained = replace(settings.slow_fast(), weights=str(out / "branch.safetensors"))
        facts = {"branch": str(out / "branch.safetensors"), "with": to_spec([trained])}
    elif settings.training == "srft":
        trainer = reasoning.srft(lvlm, plan, out, **common)
    else:
        preference = {"beta": settings.beta, "gamma": settings.gamma, "normalise": settings.normalise}
        trainer = reasoning.tdpo(lvlm, plan, out, **preference, **common)
    lvlm.model.save_pretrained(out / "model")
    lvlm.processor.save_pretrained(out / "model")
    draw = loop.draw_curves({trainer.name: trainer.curve})
    draw.savefig(out / "curves.png", dpi=120)
    return {"training": trainer.name, "steps": trainer.step, "loss": _mean(trainer.curve, "loss"),
            "model": str(out / "model"), **facts}  # fmt: skip


def statistics(lvlm: LVLM, settings: Settings) -> dict:
    """What the first samples look like: lengths in tokens, and one of them in words."""
    rows = [row for batch in islice(settings.batches(), -(-SHOWN // settings.batch)) for row in _rows(batch)][:SHOWN]
    lengths, changed = [], []
    for clip, question, answer, false in rows:
        inputs = lvlm.inputs([clip], [question])
        _, labels = films.with_answers(lvlm, inputs, [answer])
        lengths.append((inputs["input_ids"].shape[1], int((labels >= 0).sum())))
        if false:
            _, other = films.with_answers(lvlm, inputs, [false])
            sides = [side[side >= 0].tolist() for side in (labels, other)]
            changed.append(float(reasoning.changed(*sides)[0].mean()))
    prompts, answers = zip(*lengths, strict=True)
    _, question, answer, false = rows[0]
    found = {"samples looked at": len(rows), "samples in all": settings.steps * settings.batch,
             "longest prompt, tokens": max(prompts), "mean answer, tokens": sum(answers) / len(answers),
             "question": question, "answer": answer}  # fmt: skip
    if settings.training == "tdpo":
        found |= {"false answer": false, "share of tokens changed": round(sum(changed) / len(changed), 3)}
    return found


def _rows(batch: Batch) -> Iterator[tuple[Clip, str, str, str]]:
    clips, questions, answers, false = batch
    yield from zip(clips, questions, answers, false or [""] * len(clips), strict=True)


def _same_settings(out: Path, settings: Settings) -> None:
    """InputError when `out` holds a checkpoint of other settings; a run that never reached one binds nobody."""
    path = out / "settings.json"
    if not path.exists() or not any(out.glob("*.safetensors")):
        return
    begun, wanted = json.loads(path.read_text(encoding="utf-8")), asdict(settings)
    other = [f"{k}={begun.get(k)!r}, not {v!r}" for k, v in wanted.items() if begun.get(k) != v]
    if other:
        raise InputError(f"{out} was begun with {'; '.join(other)}: give the same settings, or another --out folder")


def _mean(curve: list[dict], key: str, last: int = 20) -> float:
    rows = curve[-last:]
    return round(sum(row[key] for row in rows) / len(rows), 5)

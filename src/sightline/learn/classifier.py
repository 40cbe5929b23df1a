"""`sightline train classifier`: a timm backbone on labelled pictures: AdamW, cosine, average of the weights, mixup, resumable."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.errors import InputError, ModelError, ParameterError
from sightline.learn import labelled
from sightline.learn.data import stream
from sightline.learn.loop import Trainer, draw_curves, named, precision_of
from sightline.learn.recipe import Plan

BALANCE = 0.01  # of MoH's balance losses, as its training has it


@dataclass(frozen=True)
class Settings:
    """What determines a run."""

    backbone: str
    data: str = "scenes"
    label: str = "context"
    size: int = 64
    steps: int | None = None
    epochs: float | None = None
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema: float = 0.999
    mixup: float = 0.0
    smoothing: float = 0.1
    drop_path: float = 0.0
    weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"size": self.size, "batch": self.batch, "lr": self.lr, "steps": self.steps, "epochs": self.epochs}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ParameterError(f"{name}={value!r} is out of range: choose a positive number")
        for name, value in {"ema": self.ema, "smoothing": self.smoothing, "drop_path": self.drop_path}.items():
            if not 0 <= value < 1:
                raise ParameterError(f"{name}={value!r} is out of range: choose {name} in [0, 1)")
        if self.mixup < 0 or self.weight_decay < 0:
            raise ParameterError(f"mixup={self.mixup!r}, weight_decay={self.weight_decay!r}: choose 0 or more")
        if self.size < 32:
            raise ParameterError(f"size={self.size!r} is out of range: choose 32 pixels or more")


class Average:
    """Exponential average of a model's weights and running statistics; young averages follow faster."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        seen = int(self.count)
        decay = min(self.decay, (1 + seen) / (10 + seen))
        for name, value in self.model.state_dict().items():
            mean = self.values[name]
            mean.lerp_(value, 1 - decay) if value.is_floating_point() else mean.copy_(value)


def run(settings: Settings, out: Path, *, device: torch.device, precision: str = "auto", workers: int = 0) -> dict:
    """Train, evaluate on held-out pictures; write model.safetensors (the average), model.json, results.json, curves.png.

    Returns the results: top-1 of the average and of the last weights in per cent, beside the share of the commonest class.

    Raises:
        UnknownNameError, ParameterError, InputError, ModelError: before any training.
    """
    data = open_data(settings)
    dtype = precision_of(precision, device)
    torch.manual_seed(settings.seed)
    model = make(settings, len(data.classes)).to(device)
    plan = plan_of(settings, data)
    check_folder(settings, out)
    average = Average(model, settings.ema)
    buffers = {name: b for name, b in model.named_buffers() if name in average.values}
    state = buffers | {f"average.{name}": value for name, value in average.values.items()} | {"count": average.count}
    trainer = Trainer("classifier", named("", model), plan, out, precision=dtype, state=state, after=average.update)
    model.train()
    make_sample = partial(labelled.seeded, data, seed=settings.seed)
    trainer.run(stream(make_sample, collate, plan, workers), Loss(model, settings, device))
    results = {
        "settings": asdict(settings),
        "classes": list(data.classes),
        "steps": trainer.step,
        "device": str(device),
    }
    results["seconds"] = round(trainer.seconds, 1)
    results["top1_last"], truth = evaluate(model, data, settings, device, dtype)
    model.load_state_dict(average.values)
    results["top1"], _ = evaluate(model, data, settings, device, dtype)
    results["baseline"] = 100 * max(Counter(truth).values()) / len(truth)
    results["held_out"] = len(truth)
    save_file({k: v.contiguous() for k, v in average.values.items()}, out / "model.safetensors")
    facts = {"backbone": settings.backbone, "classes": list(data.classes), "size": settings.size}
    (out / "model.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "curve.json").write_text(json.dumps(trainer.curve) + "\n")
    draw_curves({settings.backbone: trainer.curve}).savefig(out / "curves.png", dpi=130)
    return results


def open_data(settings: Settings) -> labelled.Labelled:
    if settings.data == "scenes":
        return labelled.Scenes(settings.size, settings.label, settings.seed)
    return labelled.Folder(Path(settings.data).expanduser(), settings.size, settings.seed)


def plan_of(settings: Settings, data: labelled.Labelled) -> Plan:
    """Steps, or passes over a folder; 5 % warm-up."""
    if settings.steps is None and settings.epochs is not None:
        if not isinstance(data, labelled.Folder):
            raise ParameterError("epochs: scenes never end, give steps")
        steps = math.ceil(settings.epochs * len(data.train) / settings.batch)
    else:
        steps = settings.steps or 600
    return Plan(steps, settings.batch, settings.lr, weight_decay=settings.weight_decay, warmup=math.ceil(steps / 20))


def make(settings: Settings, classes: int) -> nn.Module:
    """The backbone with a fresh head; `weights`: a published checkpoint to start from."""
    from sightline import backbones

    options = backbones.sized(settings.backbone, settings.size)
    if settings.drop_path:
        options["drop_path_rate"] = settings.drop_path
    if settings.weights is None:
        return backbones.create(settings.backbone, num_classes=classes, **options)
    model = backbones.create(settings.backbone, **options)
    path = Path(settings.weights).expanduser()
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: give the checkpoint of {settings.backbone}")
    from timm.models import load_checkpoint

    try:
        load_checkpoint(model, str(path))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        at = f" at {settings.size} x {settings.size}" if options.get("img_size") else ""
        raise ModelError(f"{str(path)!r} is no checkpoint of {settings.backbone}{at}: {first}") from error
    model.reset_classifier(classes)
    return model


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[nn.Module, list[str]]:
    """A trained classifier in eval mode and its classes, from a run's folder."""
    from safetensors.torch import load_file

    from sightline import backbones

    folder = Path(folder).expanduser()
    try:
        facts = json.loads((folder / "model.json").read_text())
    except OSError as error:
        raise InputError(f"no trained classifier in {str(folder)!r}: run `sightline train classifier`") from error
    options = backbones.sized(facts["backbone"], facts["size"])
    model = backbones.create(facts["backbone"], num_classes=len(facts["classes"]), **options)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().to(device), facts["classes"]


def check_folder(settings: Settings, out: Path) -> None:
    """Write what the run is, or raise InputError when the folder holds a checkpoint of another one."""
    path, wanted = out / "settings.json", asdict(settings)
    if path.exists() and any(out.glob("*.safetensors")):
        before = json.loads(path.read_text())
        changed = [k for k in wanted if before.get(k) != wanted[k]]
        if changed:
            k = changed[0]
            raise InputError(
                f"{str(out)!r} holds a run with {k}={before.get(k)!r}, now {wanted[k]!r}: choose another --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1) + "\n")


def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


class Loss:
    """Cross-entropy with smoothing, mixup and, for MoH, the balance of its routers."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device) -> None:
        self.model, self.settings, self.device = model, settings, device

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        x, y = (t.to(self.device) for t in batch)
        x, share = normalise(x, self.model), 1.0
        if self.settings.mixup:
            share = float(torch.distributions.Beta(self.settings.mixup, self.settings.mixup).sample())
            x = share * x + (1 - share) * x.flip(0)
        with _balance(self.model) as losses:
            scores = self.model(x).float()
        loss = share * self._entropy(scores, y)
        if share < 1:
            loss = loss + (1 - share) * self._entropy(scores, y.flip(0))
        if losses:
            loss = loss + BALANCE * torch.stack(losses).mean()
        return loss, {"top1": 100 * (scores.argmax(-1) == y).float().mean()}

    def _entropy(self, scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores, y, label_smoothing=self.settings.smoothing)


def _balance(model: nn.Module):
    from sightline.backbones.moh_vit import MoHTransNeXt, balance_losses

    return balance_losses(model) if isinstance(model, MoHTransNeXt) else nullcontext([])


def normalise(x: Tensor, model: nn.Module) -> Tensor:
    """Pictures in [0, 1] as the backbone's configuration wants them."""
    mean, std = (torch.tensor(model.default_cfg[k], device=x.device)[:, None, None] for k in ("mean", "std"))
    return (x - mean) / std


@torch.no_grad()
def evaluate(
    model: nn.Module, data: labelled.Labelled, settings: Settings, device: torch.device, dtype: torch.dtype | None
) -> tuple[float, list[int]]:
    """Top-1 in per cent on the held-out pictures, and their labels."""
    model.eval()
    right, truth = 0, []
    for start in range(0, data.held_out, settings.batch):
        x, y = collate([data.test(i) for i in range(start, min(start + settings.batch, data.held_out))])
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            scores = model(normalise(x.to(device), model))
        right += int((scores.argmax(-1).cpu() == y).sum())
        truth += y.tolist()
    return 100 * right / len(truth), truth

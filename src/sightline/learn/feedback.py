"""DEEM's first stage (`sightline.train.deem`) for a LLaVA: a frozen diffusion model's loss tunes the vision tower.

    L = text_weight L_text + weight L_feedback(tower's tokens of the picture, the picture)

Trained: tower, projector, the visual tokens' module and the projection to the condition. Frozen: language model, UNet, VAE. A LLaVA reads
its patches through the projector, not through the resampler, which serves the feedback alone and is put aside
afterwards (`feedback.safetensors`). The second stage (tower frozen, language model trained) is `sightline train instruct --stage 2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sightline.errors import InputError, ModelError, ParameterError
from sightline.learn import conversation, diffusion, instruct, loop
from sightline.learn.conversation import Sample
from sightline.learn.data import stream
from sightline.learn.diffusion import Diffusion, images_of
from sightline.learn.recipe import Plan, Recipe, Shape
from sightline.learn.tower import normalise
from sightline.learn.tuning import processor_of
from sightline.sources import BUNDLED
from sightline.train.deem import DEEM, DiffusionFeedbackLoss, VisualTokens

SMALL = {"queries": 16, "hidden": 128, "depth": 2, "heads": 4}  # a resampler that suits the tiny diffusion model
OTHERS = 1 << 20  # pictures from here on: others than those that instruction tuning has seen
HELD, HELD_STEPS = 64, (100, 300, 500, 700, 900)  # held-out pictures, and the time steps they are drawn at


def plan_for(steps: int, batch: int, lr: float = 1e-4) -> Plan:
    """DEEM's rates: the tower at a fifth of the others', AdamW (0.9, 0.995), weight decay 0.05, 10 % warm-up, cosine."""
    return Plan(steps, batch, lr, weight_decay=0.05, warmup=max(1, steps // 10), slow=0.2, slow_parts=("tower.",),
                beta2=0.995)  # fmt: skip


@dataclass(frozen=True)
class Eye:
    """A LLaVA and what gives it feedback."""

    model: LlavaForConditionalGeneration
    visual: VisualTokens
    feedback: DiffusionFeedbackLoss
    side: int  # pixels of the pictures that the diffusion model draws

    @classmethod
    def make(cls, model: LlavaForConditionalGeneration, painter: Diffusion, settings: DEEM, seed: int = 0) -> Eye:
        """Fresh visual tokens and projection for this model. ModelError when its tower has no class token."""
        config = model.config.vision_config
        if not hasattr(model.model.vision_tower.embeddings, "class_embedding"):
            raise ModelError(f"a {config.model_type} tower has no class token, which DEEM's visual tokens begin with")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            visual = settings.tokens(config.hidden_size, config.image_size // config.patch_size)
            loss = settings.feedback(painter.unet, painter.vae, painter.scheduler)
        return cls(model, visual.to(model.device), loss.to(model.device), painter.side)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the stage trains, by name; everything else is frozen."""
        self.model.requires_grad_(False)
        parts = {"tower.": self.model.model.vision_tower, "projector.": self.model.model.multi_modal_projector,
                 "visual.": self.visual, "condition.": self.feedback.condition_projection}  # fmt: skip
        return {name: p for prefix, part in parts.items() for name, p in loop.named(prefix, part).items()}

    def train(self, mode: bool = True) -> None:
        """Mode of what is trained; the language model stays as it is."""
        for part in (self.visual, self.feedback):
            part.train(mode)

    def loss(self, pixels: Tensor, seen: Tensor, **drawn: Tensor) -> Tensor:
        """Feedback loss of pictures (B, S, S, 3) uint8 and the tower's tokens of them (B, 1 + g^2, D)."""
        return self.feedback(images_of(pixels.to(seen.device), self.side), self.visual(seen), **drawn)

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Inside, the list receives what the tower gives the projector (class token included) at every call."""
        found: list[Tensor] = []
        layer = self.model.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[-1]
        hook = self.model.model.vision_tower.register_forward_hook(
            lambda module, args, kwargs, output: found.append(output.hidden_states[layer]), with_kwargs=True
        )
        try:
            yield found
        finally:
            hook.remove()

    def look(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> the tower's tokens (B, 1 + g^2, D)."""
        with self.watching() as found:
            self.model.model.vision_tower(normalise(pixels.to(self.model.device)), output_hidden_states=True)
        return found[0]

    @torch.no_grad()
    def held_out(self, make: Callable[[int], Sample], pictures: int) -> float:
        """Feedback loss of `make(0), ...` with the same noise each time, averaged over time steps."""
        self.train(False)
        pixels = torch.from_numpy(np.stack([make(k).pixels for k in range(pictures)]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            z = self.feedback.latents(images_of(pixels.to(self.model.device), self.side))
            noise = torch.randn(len(HELD_STEPS), *z.shape).to(z)
        visual = self.visual(self.look(pixels))
        total = len(self.feedback.kept)
        losses = [
            self.feedback.error(pixels, visual, latents=z, noise=noise[k],
                                timesteps=torch.full((len(z),), step * total // 1000, device=z.device)).mean()
            for k, step in enumerate(HELD_STEPS)
        ]  # fmt: skip
        return float(torch.stack(losses).mean())


def loss_of(batch: dict[str, Tensor], eye: Eye, settings: DEEM) -> tuple[Tensor, dict]:
    """The weighted sum, and both parts. A part of weight 0 is not computed."""
    if "pixels" not in batch:
        raise InputError("a batch without pictures: feedback needs records with pictures")
    parts: dict[str, Tensor] = {}
    if settings.text_weight:
        with eye.watching() as found:
            parts["text"], _ = instruct.loss_of(batch, eye.model)
        seen = found[0]
    else:
        seen = eye.look(batch["pixels"])
    loss = settings.text_weight * parts["text"] if parts else 0.0
    if settings.weight:
        parts["feedback"] = eye.loss(batch["pixels"], seen)
        loss = loss + settings.weight * parts["feedback"]
    return loss, {name: value.detach() for name, value in parts.items()}


def train(eye: Eye, processor: LlavaProcessor, make: Callable[[int], Sample], settings: DEEM, plan: Plan, folder: Path, *,
          precision: torch.dtype | None = None, workers: int = 0) -> loop.Trainer:  # fmt: skip
    """Train on samples `make(0), make(1), ...`, in place; checkpoint `folder/feedback.run.safetensors`."""
    if not settings.weight and not settings.text_weight:
        raise ParameterError("weight=0 and text_weight=0: nothing to train for; choose one above 0")
    trainer = loop.Trainer("feedback.run", eye.trained(), plan, folder, precision=precision)
    collate = partial(conversation.collate, pad=processor.tokenizer.pad_token_id)
    eye.train()
    trainer.run(stream(make, collate, plan, workers), partial(loss_of, eye=eye, settings=settings))
    eye.train(False)
    return trainer


def world_of(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> Callable[[int], Sample]:
    """Samples of the generated world, drawn for this model's pictures; -1, -2, ... are held out."""
    vision = model.config.vision_config
    recipe = Recipe(shape=Shape(image=vision.image_size, patch=vision.patch_size), turns=4, seed=seed)
    return partial(_world_sample, recipe=recipe, processor=processor)


def _world_sample(index: int, recipe: Recipe, processor: LlavaProcessor) -> Sample:
    return instruct.world_sample(OTHERS + index, recipe, processor)


def run(settings: DEEM, model: str, painter: str, out: Path, *, data: Path | None = None, images: Path | None = None,
        steps: int = 100, batch: int = 8, lr: float = 1e-4, seed: int = 0, device: torch.device, precision: str = "auto",
        workers: int = 0, held: int = HELD) -> dict:  # fmt: skip
    """Tune a LLaVA by feedback; save it to `out/model` and the feedback's own weights to `out/feedback.safetensors`.

    Args:
        model, painter: folder or id of a LLaVA and of a diffusion model, or "tiny" (a tiny diffusion model is trained
            first, into `out/diffusion`, when it is not there). data, images: LLaVA-format JSON and its pictures; None: scenes.
        held: held-out scenes for the losses that are returned.

    Returns:
        Steps, feedback loss on held-out pictures before and after (of scenes), and where the model is.

    Raises:
        ParameterError: numbers out of range. ModelError, InputError, MissingExtraError: what is given cannot be used.
    """
    if steps < 1 or batch < 1 or lr <= 0:
        raise ParameterError(f"steps={steps!r}, batch={batch!r}, lr={lr!r}: choose positive numbers")
    diffusion.diffusers()
    name = str(BUNDLED.get(model, model))
    processor = processor_of(name)
    net = LlavaForConditionalGeneration.from_pretrained(name, dtype=torch.float32).to(device).eval()
    records = instruct.Records(data, images, processor, 2, seed) if data else None
    if records is not None and any("image" not in row for row in records.rows):
        raise InputError(f"{data} holds records without a picture, which give no feedback: take them out")
    dtype = loop.precision_of(precision, device)
    made = diffusion.tiny(out / "diffusion", seed=seed, device=device, workers=workers) if painter == "tiny" else (
        diffusion.load(painter).to(device)
    )  # fmt: skip
    eye, world = Eye.make(net, made, settings, seed), world_of(net, processor, seed)
    facts = {} if records else {"held_out_before": eye.held_out(lambda k: world(-1 - k), held)}
    torch.manual_seed(seed)
    trainer = train(eye, processor, records or world, settings, plan_for(steps, batch, lr), out, precision=dtype,
                    workers=workers)  # fmt: skip
    facts |= {} if records else {"held_out_after": eye.held_out(lambda k: world(-1 - k), held)}
    net.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    kept = {"visual": eye.visual, "condition": eye.feedback.condition_projection}
    save_file({f"{part}.{k}": v.contiguous() for part, module in kept.items() for k, v in module.state_dict().items()},
              out / "feedback.safetensors")  # fmt: skip
    loop.draw_curves({"feedback": trainer.curve}).savefig(out / "curves.png", dpi=110)
    return {"steps": trainer.step, **facts, "model": str(out / "model")}

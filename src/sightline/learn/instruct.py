"""Stages 1 and 2 of visual instruction tuning (Liu et al., 2023, arXiv 2304.08485) for a transformers LLaVA.

Stage 1 aligns: the projector alone, on captions. Stage 2 instructs: projector and decoder, loss on answers and end
tokens. The tower is frozen in both. One trainer for the generated world and for any LLaVA-format JSON.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sightline import scenes
from sightline.catalog import to_spec
from sightline.engine.attach import attach
from sightline.engine.system import System
from sightline.errors import InputError, ParameterError, SightlineWarning
from sightline.learn import conversation
from sightline.learn.conversation import IGNORED, Sample
from sightline.learn.data import scene_of, stream
from sightline.learn.loop import Trainer, named
from sightline.learn.phrasing import describe, rephrase
from sightline.learn.recipe import Plan, Recipe
from sightline.learn.tower import normalise

MIX = (
    "exist",
    "colour",
    "leading",
    "context",
    *2 * ("count", "detail"),
    *4 * ("relation",),
)  # what is hard, more often
NAMES = {1: "align", 2: "instruct"}


def freeze(model: LlavaForConditionalGeneration, stage: int) -> dict[str, nn.Parameter]:
    """Freeze everything the stage leaves alone; the parameters it trains, by name."""
    if stage not in NAMES:
        raise ParameterError(f"stage={stage!r} is out of range: choose 1 (projector) or 2 (projector and decoder)")
    model.requires_grad_(False)
    trained = named("projector.", model.model.multi_modal_projector)
    if stage == 2:
        trained |= named("decoder.", model.model.language_model)
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            trained |= named("head.", model.lm_head)
    return trained


def loss_of(
    batch: dict[str, torch.Tensor], model: LlavaForConditionalGeneration, whole: bool = False
) -> tuple[torch.Tensor, dict]:
    """Mean next-token loss over supervised tokens, and the share of them that is predicted right.

    No padding mask is needed: padding is on the right and attention is causal.

    whole: call the whole model and give it the labels, for systems on it that must know where the answers are.
    """
    device = model.lm_head.weight.device
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    pixels = normalise(batch["pixels"]) if "pixels" in batch else None
    given = {"input_ids": batch["ids"], "pixel_values": pixels, "use_cache": False}
    target = batch["labels"][:, 1:]
    kept = target != IGNORED
    if whole:
        logits = model(**given, labels=batch["labels"]).logits[:, :-1][kept].float()  # (supervised, V)
    else:
        hidden = model.model(**given).last_hidden_state  # (B, T, D)
        logits = model.lm_head(hidden[:, :-1][kept]).float()
    return F.cross_entropy(logits, target[kept]), {"right": (logits.argmax(-1) == target[kept]).float().mean()}


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, make: Callable[[int], Sample], stage: int,
          plan: Plan, folder: Path, *, precision: torch.dtype | None, minutes: float | None = None,
          workers: int = 0, systems: Sequence[System] = (), name: str | None = None) -> Trainer:  # fmt: skip
    """Run stage 1 or 2 on samples `make(0), make(1), ...`, in place; checkpoint `folder/NAME.safetensors`.

    `name`: "align" or "instruct", by the stage, unless given.
    `systems` are on the model meanwhile: those that weights must be trained with, such as CCA. Raises InputError if the
    stage was begun with others.
    """
    trained, name = freeze(model, stage), name or NAMES[stage]
    same_as_begun(Path(folder), name, "systems", to_spec(systems), "none")
    trainer = Trainer(name, trained, plan, folder, precision=precision, minutes=minutes)
    collate = partial(conversation.collate, pad=processor.tokenizer.pad_token_id)
    with carrying(model, systems):
        trainer.run(stream(make, collate, plan, workers), partial(loss_of, model=model, whole=bool(systems)))
    model.eval()
    return trainer


@contextmanager
def carrying(model: LlavaForConditionalGeneration, systems: Sequence[System]) -> Iterator[None]:
    """The model with these systems on it, without the warning that its weights must be trained with them."""
    if not systems:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SightlineWarning)
        attached = attach(model, *systems)
    with attached:
        yield


def same_as_begun(folder: Path, stage: str, what: str, now: str, usual: str) -> None:
    """Note beside a stage's checkpoint with which `what` it is trained; InputError when it was begun with another.

    Nothing is written where it is the `usual`.
    """
    path = folder / f"{stage}.{what}.txt"
    begun = path.read_text(encoding="utf-8") if path.exists() else usual
    if (folder / f"{stage}.safetensors").exists() and begun != now:
        raise InputError(
            f"{folder} holds a stage {stage!r} trained with {begun}, not {now}: choose an empty --out folder"
        )
    if now != begun:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(now, encoding="utf-8")


def world_sample(index: int, recipe: Recipe, processor: LlavaProcessor) -> Sample:
    """Sample `index` of the stage "instruct": a picture with a caption or with questions."""
    scene, rng = scene_of("instruct", index, recipe.seed, recipe.shape.image)
    return picture_sample(scene, rng, recipe, processor)


def settle_sample(index: int, recipe: Recipe, processor: LlavaProcessor) -> Sample:
    """Sample `index` of the stage "settle": every `recipe.text_every`-th batch is text alone, the others are pictures."""
    scene, rng = scene_of("settle", index, recipe.seed, recipe.shape.image)
    if recipe.text_every and index // recipe.settle.batch % recipe.text_every == recipe.text_every - 1:
        return text_sample(scene, rng, recipe, processor)
    return picture_sample(scene, rng, recipe, processor)


def picture_sample(scene: scenes.Scene, rng: np.random.Generator, recipe: Recipe, processor: LlavaProcessor) -> Sample:
    """A picture: for a quarter of them a caption (a short one leads on to questions), for the others questions.

    Absent things asked about are any (no traps): a model that is never set right on what a place merely suggests keeps
    its priors, as large ones do.
    """
    if rng.random() < 0.25:
        style = "detailed" if rng.random() < 0.75 else "short"
        turns = [(describe(rng, style), scenes.caption(scene, rng, style))]
        turns += _asked(scene, rng, recipe.turns // 2) if style == "short" else []
    else:
        turns = _asked(scene, rng, recipe.turns)
    ids, labels = conversation.encode(turns, processor, recipe.shape.grid**2, stage=2)
    return Sample(ids, labels, np.asarray(scene.image))


def text_sample(scene: scenes.Scene, rng: np.random.Generator, recipe: Recipe, processor: LlavaProcessor) -> Sample:
    """The same without a picture, every token supervised: what a decoder knows of the world from text alone."""
    style = "detailed" if rng.random() < 0.75 else "short"
    turns = [(describe(rng, style), scenes.caption(scene, rng, style)), *_asked(scene, rng, recipe.turns // 2)]
    ids, _ = conversation.encode(turns, processor, 0, stage=2)
    return Sample(ids, list(ids), None)


def _asked(scene: scenes.Scene, rng: np.random.Generator, turns: int) -> list[tuple[str, str]]:
    return [(rephrase(q, rng), q.answer) for q in scenes.questions(scene, rng, turns, kinds=MIX, traps=False)]


class Records:
    """The samples of a LLaVA-format JSON file: `records(k)` is the k-th in an order shuffled anew every epoch."""

    def __init__(self, path: Path, images: Path | None, processor: LlavaProcessor, stage: int, seed: int = 0):
        self.images, self.processor, self.stage, self.seed = images, processor, stage, seed
        try:
            self.rows = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path} ({error}): give a LLaVA-format JSON list") from error
        if not isinstance(self.rows, list) or not self.rows:
            raise InputError(f"{path} holds no records: give a LLaVA-format JSON list")
        if images is None and any("image" in row for row in self.rows):
            raise InputError(f"{path} names pictures: give their folder with --images")
        self.turns = [conversation.check(row, images) for row in self.rows]
        if stage == 1 and any(len(turns) != 1 for turns in self.turns):
            raise InputError(f"{path}: stage 1 takes one question and one answer per record; use stage 2 for dialogues")
        bare = next((row for row in self.rows if "image" not in row), None) if stage == 1 else None
        if bare is not None:
            raise InputError(
                f"{path}: record {bare.get('id', '?')!r} has no picture; stage 1 aligns pictures, leave it out"
            )
        crop = processor.image_processor.crop_size
        self.side = crop["height"] if isinstance(crop, dict) else crop.height
        self.tokens = (self.side // processor.patch_size) ** 2 + processor.num_additional_image_tokens
        self.tokens -= processor.vision_feature_select_strategy == "default"

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.rows))
        k = int(np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))[place])
        return self.sample(k)

    def sample(self, k: int) -> Sample:
        """Record `k` of the file, tokenised; its picture padded to a square of the mean colour and resized."""
        picture = "image" in self.rows[k]
        tokens = self.tokens if picture else 0
        ids, labels = conversation.encode(self.turns[k], self.processor, tokens, stage=self.stage)
        return Sample(ids, labels, self._pixels(self.rows[k]["image"]) if picture else None)

    def _pixels(self, name: str) -> np.ndarray:
        try:
            with Image.open(self.images / name) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise InputError(f"cannot read picture {self.images / name}: {error}") from error
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * v) for v in self.processor.image_processor.image_mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return np.asarray(square.resize((self.side, self.side), Image.Resampling.BICUBIC))

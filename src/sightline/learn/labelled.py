"""Labelled pictures for a classifier: the generated world, or a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from sightline import scenes
from sightline.errors import InputError, ParameterError
from sightline.images import open_image
from sightline.learn.data import scene_of

LABELS = ("context", "kind")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELD_OUT = 10  # of a folder without `val`, every tenth picture is held out


class Labelled(Protocol):
    """Pictures by index; training samples never end, each is a function of its index."""

    classes: Sequence[str]
    held_out: int

    def sample(self, index: int) -> tuple[Tensor, int]: ...

    def test(self, index: int) -> tuple[Tensor, int]: ...


def augmentation(size: int) -> v2.Compose:
    """Random crop and flip to (3, size, size), values in [0, 1]."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=(0.5, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def plain(size: int) -> v2.Compose:
    """The middle square at `size`, values in [0, 1]."""
    steps = [v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(steps)


@dataclass(frozen=True)
class Scenes:
    """Scenes drawn as they are needed. label: "context" (which place), or "kind" of the object seen largest."""

    size: int
    label: str = "context"
    seed: int = 0
    held_out: int = 256

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ParameterError(f"label={self.label!r}: choose {' or '.join(LABELS)}")

    @property
    def classes(self) -> list[str]:
        return sorted(scenes.CONTEXTS if self.label == "context" else scenes.KINDS)

    def sample(self, index: int) -> tuple[Tensor, int]:
        scene, _ = scene_of("classifier", index, self.seed, self._side)
        flip = v2.RandomHorizontalFlip()(plain(self.size)(scene.image))
        return flip, self._class(scene)

    def test(self, index: int) -> tuple[Tensor, int]:
        scene = scenes.draw(scenes.seeds("test", index + 1)[-1], size=self._side)
        return plain(self.size)(scene.image), self._class(scene)

    @property
    def _side(self) -> int:
        """What is drawn: scenes have 56 to 1024 pixels."""
        return min(max(self.size, 56), 1024)

    def _class(self, scene: scenes.Scene) -> int:
        seen = scene.context if self.label == "context" else max(scene.objects, key=lambda o: o.area).kind
        return self.classes.index(seen)


class Folder:
    """`path/CLASS/*.jpg`, or `path/train/CLASS/...` with `path/val/CLASS/...`."""

    def __init__(self, path: Path, size: int, seed: int = 0) -> None:
        """Raises InputError unless there are two classes and pictures in each."""
        self.size, self.seed = size, seed
        root = path / "train" if (path / "train").is_dir() else path
        if not root.is_dir():
            raise InputError(f"no folder {str(path)!r}: give scenes, or a folder with one sub-folder per class")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(self.classes) < 2:
            raise InputError(f"folder {str(root)!r} holds {len(self.classes)} sub-folders: one per class, 2 at least")
        found = self._files(root)
        if (path / "val").is_dir():
            self.train, self.val = found, self._files(path / "val")
        else:
            self.train = [f for i, f in enumerate(found) if i % HELD_OUT]
            self.val = found[::HELD_OUT]
        self.held_out = len(self.val)
        self.augment, self.plain = augmentation(size), plain(size)

    def _files(self, root: Path) -> list[tuple[Path, int]]:
        found = []
        for label, name in enumerate(self.classes):
            files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in SUFFIXES)
            if not files:
                raise InputError(f"folder {str(root / name)!r} holds no pictures ({', '.join(SUFFIXES)})")
            found += [(file, label) for file in files]
        return found

    def sample(self, index: int) -> tuple[Tensor, int]:
        epoch, place = divmod(index, len(self.train))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        file, label = self.train[order[place]]
        return self.augment(open_image(file)), label

    def test(self, index: int) -> tuple[Tensor, int]:
        file, label = self.val[index]
        return self.plain(open_image(file)), label


def seeded(data: Labelled, index: int, seed: int) -> tuple[Tensor, int]:
    """The training sample of `index`, its random draws depending on index and seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed << 32) + index)
        return data.sample(index)

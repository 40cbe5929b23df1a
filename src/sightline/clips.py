"""Reading videos: an animation, a folder of frames or a list of pictures becomes a `Clip`, one input in time.

A list of pictures means a batch everywhere else; a clip is one thing that is asked about, whatever the number of its
frames. Film files need a decoder and are not read: save their frames first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sightline.errors import InputError, ParameterError
from sightline.images import Picture, count_frames, open_image

MAX_FRAMES = 32  # of what is opened from a path; a longer clip is looked at in this many places
SECONDS = 1.0  # between frames when nothing says so


@dataclass(frozen=True, eq=False)
class Clip:
    """A video: T frames of one size in order, upright RGB, and the second at which each is seen."""

    frames: tuple[Image.Image, ...] = field(repr=False)
    times: tuple[float, ...]
    name: str = "clip"

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.times):
            raise InputError(
                f"{self.name}: {len(self.frames)} frames and {len(self.times)} times; give one time a frame"
            )
        if any(b <= a for a, b in zip(self.times, self.times[1:], strict=False)):
            raise InputError(f"{self.name}: times {self.times[:4]}... must increase")
        sizes = {frame.size for frame in self.frames}
        if len(sizes) > 1:
            raise InputError(f"{self.name}: frames of {len(sizes)} sizes, {sorted(sizes)[:3]}: give all the same size")

    def __len__(self) -> int:
        """T"""
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every frame."""
        return self.frames[0].size

    @property
    def rate(self) -> float:
        """Frames per second, on average."""
        return (len(self) - 1) / (self.times[-1] - self.times[0]) if len(self) > 1 else 1 / SECONDS

    def sample(self, count: int) -> Clip:
        """`count` frames, evenly spaced, first and last included; the clip itself when it has no more."""
        if count < 1:
            raise ParameterError(f"frames={count!r} is out of range: choose a whole number from 1 up")
        if count >= len(self):
            return self
        chosen = [k * (len(self) - 1) // (count - 1) for k in range(count)] if count > 1 else [0]
        return replace(self, frames=tuple(self.frames[k] for k in chosen), times=tuple(self.times[k] for k in chosen))


def is_clip(source: Any) -> bool:
    """Whether `open_clip` is the door for it: a clip, a folder, or the path of an animation without a chosen frame."""
    if isinstance(source, Clip):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source).expanduser()
    return path.is_dir() or (path.is_file() and count_frames(path) > 1)


def open_clip(source: Clip | Picture | Sequence[Picture], frames: int | None = MAX_FRAMES) -> Clip:
    """A clip from an animation (GIF, WebP, PNG), a folder of pictures (in natural order of names), or pictures.

    Args:
        source: what to read; a clip is returned as it is.
        frames: look at this many, evenly spaced; None: at all.

    Raises:
        InputError: nothing to read, a damaged picture, frames of different sizes. ParameterError: frames below 1.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, list | tuple):
        clip = Clip(tuple(open_image(one) for one in source), tuple(SECONDS * k for k in range(len(source))))
    else:
        path = Path(os.fspath(source)).expanduser()
        clip = _folder(path) if path.is_dir() else _animation(path)
    return clip if frames is None else clip.sample(frames)


def _folder(path: Path) -> Clip:
    names = sorted((p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")), key=_natural)
    pictures = [p for p in names if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")]
    if not pictures:
        raise InputError(f"cannot read {str(path)!r}: it is a folder without pictures (PNG, JPEG, WebP, BMP, TIFF)")
    frames = tuple(open_image(p) for p in pictures)
    return Clip(frames, tuple(SECONDS * k for k in range(len(frames))), path.name)


def _animation(path: Path) -> Clip:
    count = count_frames(path)
    frames = tuple(open_image(path, frame=k + 1) for k in range(count))
    return Clip(frames, _times(path, count), path.name)


def _times(path: Path, count: int) -> tuple[float, ...]:
    """When each frame of an animation is shown; a second apart where the file does not say."""
    times, now = [], 0.0
    with Image.open(path) as image:
        for k in range(count):
            image.seek(k)
            times.append(now)
            now += float(image.info.get("duration") or 1000 * SECONDS) / 1000
    return tuple(times)


def _natural(path: Path) -> list[Any]:
    """frame_2 before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.lower())]

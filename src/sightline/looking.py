"""`look`: one picture, one question, answered without and with systems, and everything that was seen on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from sightline.hosts.geometry import Layout


@dataclass(frozen=True)
class Word:
    """A word of the answer and the generated tokens it is made of: [start, stop)."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """One answer. T generated tokens, L decoder layers, H heads, V visual tokens, G key groups."""

    label: str  # "none", or the systems as on the command line, e.g. "var:p=0.4"
    answer: str
    pieces: tuple[str, ...]  # (T) text of every generated token (end-of-sequence excluded)
    words: tuple[Word, ...]
    probability: np.ndarray  # (T,) float32, of the chosen token
    rows: np.ndarray  # (T, L, H, V) float16: attention (after the systems' edits) of the row that produced token t
    masses: np.ndarray  # (T, L, H, G) float32: attention mass on each group of `groups`; sums to 1 over G
    groups: tuple[str, ...]  # names of the G groups, e.g. ("start", "before", "image", "visual sink", "after", "generated")
    phi: np.ndarray  # (L, V) float32: sink value of every visual token at the input of every layer
    tau: float  # the threshold on phi that makes a token a sink
    sinks: tuple[np.ndarray, ...]  # per layer: indices (0..V-1) of the visual sinks
    text_sinks: tuple[tuple[tuple[int, str], ...], ...]  # per layer: (position, token text) of the sinks outside the image
    seconds: float  # wall time of the generation
    notes: dict[str, Any] = field(default_factory=dict)  # per system slug: what it did, as numbers (attached.report())


@dataclass(frozen=True)
class Look:
    """The result of `look`: the same question without systems (runs[0]) and, when asked for, with them (runs[1])."""

    image: Image.Image  # upright RGB, original size
    question: str
    model: str
    layout: Layout  # where the V visual tokens lie on the picture
    runs: tuple[Run, ...]
    settings: dict[str, Any]  # versions, device, dtype, seed, max_new_tokens, parameters
    warnings: tuple[str, ...] = ()  # plain lines, e.g. that the bundled model knows only the generated world

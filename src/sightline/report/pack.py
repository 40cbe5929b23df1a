"""Attention rows made small enough for a web page: averaged over a word's tokens, thinned when many, one byte each.

A byte q of a row with scale s stands for s * (q / 255)**2. The square keeps the faint tokens beside an attention sink
apart, which would all fall on the same byte were the bytes linear: the error is at most s / 255 at the top of the row
and s / 260 000 near zero.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sightline.report.summary import heads, word_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sightline.looking import Look, Run

BUDGET = 6_000_000  # bytes of attention in one page; base64 makes 8 MB of them


@dataclass(frozen=True)
class Channel:
    """One map per word: the mean over layers [first, stop) of one head, or of all heads when head is -1."""

    first: int
    stop: int
    head: int


@dataclass(frozen=True)
class Plan:
    """Which maps a page carries."""

    channels: tuple[Channel, ...]
    full: bool  # every layer and head alone
    remark: str  # what was averaged, for the reader; empty when nothing was


def plan(look: Look, budget: int = BUDGET) -> Plan:
    """Every (layer, head) when that fits into `budget` bytes; else head means per layer, and the strongest heads alone
    as far as there is room. When even one map per layer is too much, neighbouring layers are averaged.
    """
    _, layers, count, tokens = look.runs[0].rows.shape
    one = max(1, tokens * sum(len(run.words) + 1 for run in look.runs))  # bytes of one channel
    if one * layers * count <= budget:
        return Plan(tuple(Channel(i, i + 1, h) for i in range(layers) for h in range(count)), True, "")
    width = -(-layers // max(1, min(layers, budget // one)))  # layers per map
    means = [Channel(i, min(i + width, layers), -1) for i in range(0, layers, width)]
    spare = budget // one - len(means)
    alone = _strongest(look.runs, max(0, spare))
    return Plan(tuple(means + [Channel(i, i + 1, h) for i, h in alone]), False, _remark(width, len(alone), count))


def _strongest(runs: Sequence[Run], top: int) -> list[tuple[int, int]]:
    """(layer, head) of the heads with the largest mass on the image in any run, in layer order."""
    mass = np.max([heads(run).mass for run in runs], axis=0)  # (L, H)
    order = np.argsort(-mass, axis=None, kind="stable")[:top]
    return sorted((int(i) // mass.shape[1], int(i) % mass.shape[1]) for i in order)


def _remark(width: int, alone: int, count: int) -> str:
    lines = f"To keep this page small, its maps are averages over the {count} heads"
    lines += f" of {width} neighbouring layers each" if width > 1 else " of each layer"
    return lines + (f"; the {alone} heads that look most at the picture can also be seen alone." if alone else ".")


def pack_rows(run: Run, channels: Sequence[Channel]) -> tuple[bytes, bytes]:
    """(rows, scales) of every channel and word, the mean of the whole answer last.

    rows: uint8 (W + 1, C, V); scales: little-endian float32 (W + 1, C).
    """
    packed, scales = [], []
    for rows in _each_word(run):  # (L, H, V)
        maps = np.stack([_mean(rows, channel) for channel in channels])  # (C, V)
        scale = maps.max(axis=-1, initial=0.0)
        unit = np.divide(maps, scale[:, None], out=np.zeros_like(maps), where=scale[:, None] > 0)
        packed.append(np.rint(255 * np.sqrt(unit)).astype(np.uint8))
        scales.append(scale)
    return np.stack(packed).tobytes(), np.stack(scales).astype("<f4").tobytes()


def _mean(rows: np.ndarray, channel: Channel) -> np.ndarray:
    picked = rows[channel.first : channel.stop]
    return picked.mean(axis=(0, 1)) if channel.head < 0 else picked[:, channel.head].mean(axis=0)


def _each_word(run: Run) -> Iterator[np.ndarray]:
    for word in run.words:
        yield word_rows(run, word)
    yield word_rows(run)


def pack_masses(run: Run, full: bool) -> bytes:
    """uint8 (W + 1, L, H or 1, G): mass per key group in 255ths; one head, the mean, unless `full`."""
    parts = [run.masses[w.start : w.stop] for w in run.words] + [run.masses]
    means = [p.mean(axis=0, dtype=np.float32) if len(p) else np.zeros(p.shape[1:], np.float32) for p in parts]
    masses = np.stack(means)  # (W + 1, L, H, G)
    masses = masses if full else masses.mean(axis=2, keepdims=True)
    return np.rint(255 * np.clip(masses, 0, 1)).astype(np.uint8).tobytes()


def pack_phi(run: Run) -> tuple[bytes, list[float]]:
    """(little-endian uint16 (L, V), step per layer): phi = number * step."""
    phi = np.nan_to_num(run.phi.astype(np.float32))
    step = np.maximum(phi.max(axis=-1, initial=0.0), 1e-9) / 65535
    return np.rint(phi / step[:, None]).astype("<u2").tobytes(), [float(s) for s in step]


def text(data: bytes) -> str:
    """Base64, as the page decodes it."""
    return base64.b64encode(data).decode("ascii")

"""The numbers of a look: maps per word, heads, sinks; and all of it as plain JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.report.regions import Region, regions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sightline.looking import Look, Run, Word

IMAGE_MASS = 0.2  # VAR (arXiv 2503.03321): a head is image-centric when its mass on the image is at least this
SINK_SHARE = 0.5  # and at most this share of that mass falls on visual sinks


@dataclass(frozen=True)
class Heads:
    """How much every head looks at the picture, averaged over the answer's tokens."""

    mass: np.ndarray  # (L, H) attention on the image, 0..1
    sink_share: np.ndarray  # (L, H) share of that attention which falls on visual sinks
    centric: np.ndarray  # (L, H) bool: mass >= IMAGE_MASS and sink_share <= SINK_SHARE

    def largest(self, top: int) -> list[tuple[int, int]]:
        """(layer, head) of the image-centric heads with the largest mass, largest first."""
        order = np.argsort(-np.where(self.centric, self.mass, -1.0), axis=None, kind="stable")
        heads = self.mass.shape[1]
        return [(int(i) // heads, int(i) % heads) for i in order[: min(top, int(self.centric.sum()))]]


def word_rows(run: Run, word: Word | None = None) -> np.ndarray:
    """(L, H, V) float32: attention on the visual tokens, mean over a word's tokens; the whole answer without a word."""
    rows = run.rows if word is None else run.rows[word.start : word.stop]
    return rows.mean(axis=0, dtype=np.float32) if len(rows) else np.zeros(run.rows.shape[1:], np.float32)


def hide_sinks(rows: np.ndarray, sinks: Sequence[np.ndarray]) -> np.ndarray:
    """A copy of `rows` (L, ..., V) with every layer's sink columns set to zero."""
    rows = rows.copy()
    for layer, columns in enumerate(sinks):
        rows[layer][..., columns] = 0
    return rows


def heads(run: Run) -> Heads:
    """Mass on the image and the share of the sinks in it, per layer and head, averaged over the answer."""
    rows = word_rows(run)
    mass = rows.sum(axis=-1)  # (L, H)
    sink_mass = mass - hide_sinks(rows, run.sinks).sum(axis=-1)
    share = np.divide(sink_mass, mass, out=np.zeros_like(mass), where=mass > 0)
    return Heads(mass, share, (mass >= IMAGE_MASS) & (share <= SINK_SHARE))


@dataclass(frozen=True)
class WordSummary:
    """Where one word of the answer looked. Mean over the word's tokens, all layers and heads."""

    text: str
    probability: float  # product over the word's tokens
    image_mass: float  # attention on the picture, 0..1
    sink_share: float  # share of it that falls on visual sinks
    regions: list[Region]  # bright regions without the sinks; shares are of all attention on the picture


def words(look: Look, run: Run, top: int = 3) -> list[WordSummary]:
    """One summary per word of the run's answer, with the `top` image regions of each."""
    found = []
    for word in run.words:
        rows = word_rows(run, word)
        mass = float(rows.sum(axis=-1).mean())
        values = hide_sinks(rows, run.sinks).mean(axis=(0, 1))  # (V,)
        share = 1 - float(values.sum()) / mass if mass > 0 else 0.0
        probability = float(np.prod(run.probability[word.start : word.stop], dtype=np.float64))
        found.append(
            WordSummary(word.text, probability, mass, max(share, 0.0), regions(look.layout, values, mass, top))
        )
    return found


def sink_layers(run: Run) -> list[dict[str, Any]]:
    """Per layer: the visual sinks with their phi, the sinks in the text, and the largest phi on the picture."""
    layers = []
    for layer, columns in enumerate(run.sinks):
        phi = run.phi[layer]
        order = sorted((int(c) for c in columns), key=lambda c: (-phi[c], c))
        layers.append(
            {
                "layer": layer,
                "visual": [{"token": c, "phi": _digits(phi[c])} for c in order],
                "text": [{"position": int(at), "token": str(text)} for at, text in run.text_sinks[layer]],
                "largest_phi": _digits(phi.max()) if phi.size else None,
            }
        )
    return layers


def to_json(look: Look) -> dict[str, Any]:
    """Everything a script wants from a look, in plain JSON types; arrays of attention stay out."""
    return {
        "question": look.question,
        "model": look.model,
        "image": {"width": look.layout.size[0], "height": look.layout.size[1], "visual_tokens": len(look.layout)},
        "runs": [_run(look, run) for run in look.runs],
        "settings": plain(look.settings),
        "warnings": list(look.warnings),
    }


def _run(look: Look, run: Run) -> dict[str, Any]:
    scan = heads(run)
    centric = [
        {
            "layer": layer,
            "head": head,
            "image_mass": _digits(scan.mass[layer, head]),
            "sink_share": _digits(scan.sink_share[layer, head]),
        }
        for layer, head in scan.largest(scan.mass.size)
    ]
    layers, count = scan.mass.shape
    return {
        "label": run.label,
        "answer": run.answer,
        "tokens": len(run.pieces),
        "seconds": _digits(run.seconds),
        "words": [_word(w) for w in words(look, run)],
        "mass_by_group": _masses(run),
        "sinks": {"tau": _digits(run.tau), "layers": sink_layers(run)},
        "heads": {
            "layers": layers,
            "heads": count,
            "rule": {"image_mass_at_least": IMAGE_MASS, "sink_share_at_most": SINK_SHARE},
            "image_centric": centric,
        },
        "kept": [{"stage": s.name, "tokens": np.flatnonzero(s.kept).tolist()} for s in run.stages],
        "did": plain(run.notes),
    }


def _word(word: WordSummary) -> dict[str, Any]:
    return {
        "text": word.text,
        "probability": _digits(word.probability),
        "image_mass": _digits(word.image_mass),
        "sink_share": _digits(word.sink_share),
        "regions": [
            {"box": None if r.box is None else list(r.box), "place": r.place, "share": _digits(r.share)}
            for r in word.regions
        ],
    }


def _masses(run: Run) -> dict[str, float | None]:
    """Attention mass per key group, mean over tokens, layers and heads."""
    if not len(run.masses):
        return dict.fromkeys(run.groups)
    mean = run.masses.mean(axis=(0, 1, 2), dtype=np.float64)
    return {name: _digits(value) for name, value in zip(run.groups, mean, strict=True)}


def _digits(value: float, digits: int = 4) -> float | None:
    """`value` to `digits` significant digits; None when not finite (JSON has no NaN)."""
    return float(f"{float(value):.{digits}g}") if np.isfinite(value) else None


def plain(value: Any) -> Any:
    """`value` in JSON types: numpy numbers and arrays, paths, sets and anything else by their text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return _digits(value, 6)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=str)
    if hasattr(value, "tolist"):  # numpy arrays, torch tensors
        return plain(value.tolist())
    return str(value)

"""`look`: one picture, one question, answered without and with systems, and everything that was seen on the way."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sightline.errors import ParameterError, SightlineWarning

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from sightline.engine.record import Recorder, Seen
    from sightline.engine.system import System
    from sightline.hosts.geometry import Layout
    from sightline.loading import LVLM

DEFAULT_QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Word:
    """A word of the answer and the generated tokens it is made of: [start, stop)."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Stage:
    """Which visual tokens were left from some point on."""

    name: str  # "tower layer 5", "before the language model", "layer 8"
    kept: np.ndarray  # (V,) bool


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
    groups: tuple[
        str, ...
    ]  # names of the G groups, e.g. ("start", "before", "image", "visual sink", "after", "generated")
    phi: np.ndarray  # (L, V) float32: sink value of every visual token at the input of every layer
    tau: float  # the threshold on phi that makes a token a sink
    sinks: tuple[np.ndarray, ...]  # per layer: indices (0..V-1) of the visual sinks
    text_sinks: tuple[
        tuple[tuple[int, str], ...], ...
    ]  # per layer: (position, token text) of the sinks outside the image
    seconds: float  # wall time of the generation
    notes: dict[str, Any] = field(default_factory=dict)  # per system slug: what it did, as numbers (attached.report())
    stages: tuple[Stage, ...] = ()  # where visual tokens were dropped, in order; their rows and phi are 0 from there on


@dataclass(frozen=True)
class Look:
    """The result of `look`: the same question without systems (runs[0]) and, when asked for, with them (runs[1])."""

    image: Image.Image  # upright RGB, original size; of a video its frames on one page
    question: str
    model: str
    layout: Layout  # where the V visual tokens lie on the picture
    runs: tuple[Run, ...]
    settings: dict[str, Any]  # versions, device, dtype, seed, max_new_tokens, parameters
    warnings: tuple[str, ...] = ()  # plain lines, e.g. that the bundled model knows only the generated world

    def save(self, out: str | Path) -> dict[str, Path]:
        """Write report.html, PNGs and look.json into the folder `out`; returns their paths."""
        from sightline import report

        return report.save(self, Path(out))

    def to_json(self) -> dict[str, Any]:
        """Answers, regions per word, sinks and heads as JSON-able values."""
        from sightline import report

        return report.to_json(self)

    def show(self, console: Console) -> None:
        """Print the answers and what was seen."""
        from sightline import report

        report.show(self, console)


def look(
    image: Any = None,
    question: str | None = None,
    *,
    model: Any = "tiny",
    systems: Sequence[System] = (),
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **loading: Any,
) -> Look:
    """Ask a model about a picture, without and with systems, and keep what it looked at.

        seen = sl.look("photo.jpg", "Is there a dog?", systems=[sl.steer.VAR()])
        seen.runs[1].answer, seen.save("out")

    Args:
        image: path, PIL image or array; the path of an animation or a folder of frames, or a `Clip`, is a video, which the
            report shows frame beside frame; None: the bundled example.
        question: what to ask; None: the example's question (only with the example), else "What is in this picture?".
        model: "tiny" (bundled), a Hub id, a folder, or a loaded `LVLM`.
        systems: a list of instances such as `sl.steer.VAR()`; none: only the plain answer.
        max_new_tokens: length limit of the answer; decoding is greedy.
        device, dtype, loading: see `sightline.load`.
        seed: for anything random in the systems.

    Raises:
        InputError, ModelError, ParameterError: before any work is done.
    """
    from sightline.catalog import to_spec
    from sightline.clips import is_clip, open_clip
    from sightline.engine.checks import check_systems
    from sightline.engine.passes import planned
    from sightline.engine.record import record
    from sightline.hosts import layouts
    from sightline.hosts.pages import page
    from sightline.images import open_image
    from sightline.loading import LVLM, load
    from sightline.lvlm import check_max_new_tokens

    check_max_new_tokens(max_new_tokens)
    check_systems(systems)
    if image is None:
        image, example_question = example()
        question = example_question if question is None else question
    question = DEFAULT_QUESTION if question is None else question
    clip = open_clip(image) if is_clip(image) else None
    picture = open_image(image) if clip is None else clip.frames[0]
    if not isinstance(model, LVLM | str):
        raise ParameterError(f"model of type {type(model).__name__}: give what `sl.load` returns, or a name")
    lvlm = model if isinstance(model, LVLM) else load(model, device=device, dtype=dtype, **loading)
    inputs = lvlm.inputs(picture if clip is None else clip, question)
    frames = (picture,) if clip is None else clip.frames
    if clip is None:
        layout = layouts(lvlm.model, lvlm.processor, inputs, [picture.size], host=lvlm.host)[0]
    else:
        picture, layout = page(lvlm, inputs, clip)
    var = next((s for s in systems if s.slug == "var"), None)  # what it calls a sink is marked in both runs
    sinks = {"tau": getattr(var, "tau", None), "sink_dims": getattr(var, "sink_dims", None)}
    runs = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for wanted in [(), systems] if systems else [()]:
            chosen = planned(wanted, lvlm, frames, question)
            torch.manual_seed(seed)
            recorder = record(image_rows=True, **sinks)
            runs.append(_run(lvlm, inputs, chosen, max_new_tokens, recorder, label=to_spec(wanted)))
    return Look(picture, question, lvlm.name, layout, tuple(runs), _settings(lvlm, systems, max_new_tokens, seed),
                _warnings(lvlm, picture, runs, caught))  # fmt: skip


def example() -> tuple[Path, str]:
    """The bundled example: path of its picture, and its question."""
    folder = Path(__file__).parent / "examples"
    card = json.loads((folder / "example.json").read_text(encoding="utf-8"))
    return folder / card["image"], card["question"]


def _run(
    lvlm: LVLM, inputs: Any, systems: tuple[System, ...], max_new_tokens: int, recorder: Recorder, label: str
) -> Run:
    from sightline.engine.attach import attach
    from sightline.engine.record import GROUPS

    begin = time.perf_counter()
    with attach(lvlm.model, *systems, recorder, host=lvlm.host) as attached, torch.no_grad():
        made = lvlm.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    seconds = time.perf_counter() - begin
    seen = recorder.seen
    ids = made.sequences[0, -len(made.logits) :]
    ends = set(_as_list(lvlm.model.generation_config.eos_token_id))
    count = next((t for t, i in enumerate(ids.tolist()) if i in ends), len(ids))
    tokenizer = lvlm.processor.tokenizer
    pieces = _pieces(tokenizer, ids[:count].tolist())
    chosen = [made.logits[t][0].float().softmax(-1)[ids[t]] for t in range(count)]
    image = torch.isin(inputs["input_ids"][0].cpu(), torch.tensor(lvlm.visual_ids))
    places = image.nonzero().flatten().numpy()  # (V,) columns of the prompt
    original = seen.tokens.position[0].cpu().numpy()  # of every column that is left
    columns = seen.columns[0].cpu()
    left = np.searchsorted(places, original[columns.numpy()])  # which visual tokens the recorder saw
    phi = torch.stack([seen.phi[layer][0] for layer in sorted(seen.phi)]).cpu()  # (L, N)
    tau = recorder.setup["tau"]
    prompt_ids = inputs["input_ids"][0].tolist()
    visual = _spread(phi[:, columns].numpy(), left, len(places))
    outside = (phi > tau) & ~seen.tokens.visual[0].cpu()
    return Run(
        label=label,
        answer="".join(pieces).strip(),
        pieces=tuple(pieces),
        words=_words(pieces),
        probability=np.array([float(p) for p in chosen], np.float32),
        rows=_spread(seen.rows[:count, :, 0].numpy(), left, len(places)),
        masses=seen.masses[:count, :, 0].numpy(),
        groups=GROUPS,
        phi=visual,
        tau=float(tau),
        sinks=tuple(np.flatnonzero(layer > tau) for layer in visual),
        text_sinks=tuple(
            tuple((int(original[n]), tokenizer.decode([prompt_ids[original[n]]])) for n in row.nonzero().flatten())
            for row in outside
        ),
        seconds=seconds,
        notes=attached.report(),
        stages=_stages(seen, places),
    )


def _spread(values: np.ndarray, left: np.ndarray, count: int) -> np.ndarray:
    """(..., V') values of the visual tokens that are left -> (..., V), 0 for those that are gone."""
    if values.shape[-1] == count:
        return values
    found = np.zeros((*values.shape[:-1], count), values.dtype)
    found[..., left] = values
    return found


def _stages(seen: Seen, places: np.ndarray) -> tuple[Stage, ...]:
    """Every point from which fewer visual tokens went on than before it."""
    masks = []
    pictures = seen.pictures
    if pictures is not None and pictures.alive:
        where = pictures.places
        for layer, alive in enumerate(pictures.alive):
            there = torch.zeros(pictures.tower, dtype=torch.bool, device=alive.device).scatter(1, alive, True)
            patches = there[:, pictures.prefix :]
            masks.append((f"tower layer {layer}", ((where.pool(patches) > 0) | ~where.real).cpu().numpy()))
    for layer in sorted(seen.ledgers):
        tokens = seen.ledgers[layer]
        kept = np.isin(places, tokens.position[0][tokens.visual[0]].cpu().numpy())
        masks.append((f"layer {layer}" if layer else "before the language model", kept))
    found, before = [], np.ones(len(places), bool)
    for name, kept in masks:
        if (kept != before).any():
            found.append(Stage(name, kept))
        before = kept
    return tuple(found)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that every token adds to the answer (tokens that only finish a character add nothing before it)."""
    texts = [tokenizer.decode(ids[:t], skip_special_tokens=True) for t in range(len(ids) + 1)]
    whole = [*(t.rstrip("\ufffd") for t in texts[:-1]), texts[-1]]
    return [whole[t + 1][len(whole[t]) :] for t in range(len(ids))]


def _words(pieces: Sequence[str]) -> tuple[Word, ...]:
    """Group generated tokens into words: a token whose text begins with a space begins a new word."""
    words: list[Word] = []
    for t, piece in enumerate(pieces):
        fresh = not words or piece[:1].isspace() or words[-1].text[-1:].isspace()
        if fresh and piece.strip():
            words.append(Word(piece, t, t + 1))
        elif words:
            words[-1] = Word(words[-1].text + piece, words[-1].start, t + 1)
    return tuple(Word(w.text.strip(), w.start, w.stop) for w in words)


def _settings(lvlm: LVLM, systems: Sequence[System], max_new_tokens: int, seed: int) -> dict[str, Any]:
    import transformers

    from sightline import __version__
    from sightline.catalog import to_dict

    return {
        "model": lvlm.name,
        "host": lvlm.host.name,
        "systems": [to_dict(s) for s in systems],
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "seed": seed,
        "device": str(lvlm.device),
        "dtype": str(lvlm.dtype).removeprefix("torch."),
        "versions": {"sightline": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _warnings(lvlm: LVLM, picture: Image.Image, runs: Sequence[Run], caught: Sequence[Any]) -> tuple[str, ...]:
    from sightline.images import SOFTWARE
    from sightline.loading import BUNDLED

    lines = [str(w.message) for w in caught if issubclass(w.category, SightlineWarning)]
    if lvlm.name in BUNDLED and picture.info.get("Software") != SOFTWARE:
        lines.append(
            "The bundled model knows only sightline's generated world of simple drawings; for a photograph name a real "
            "model, for example --model llava-hf/llava-1.5-7b-hf"
        )
    if any(len(r.pieces) == 0 for r in runs):
        lines.append("The model gave an empty answer.")
    return tuple(lines)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]

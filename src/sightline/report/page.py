"""The self-contained HTML report: one file, no network, nothing executed but the script that is written here."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from difflib import SequenceMatcher
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from sightline.report import pack
from sightline.report.summary import IMAGE_MASS, SINK_SHARE, heads, plain, sink_layers, words

if TYPE_CHECKING:
    from PIL import Image

    from sightline.looking import Look, Run, Word
    from sightline.report.summary import Heads, WordSummary

PICTURE = 1024  # longest side of the embedded picture, pixels
LONGEST = 600  # characters of one setting or note
SCRIPTS = ("data.js", "maps.js", "draw.js", "app.js")


def render(look: Look, budget: int = pack.BUDGET) -> str:
    """The page as text. `budget`: bytes of attention to carry (`pack.plan` says what is averaged when it is exceeded)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    plan = pack.plan(look, budget)
    folder = files("sightline.report") / "templates"
    style = (folder / "report.css").read_text("utf-8")
    script = '"use strict";(() => {\n' + "\n".join((folder / s).read_text("utf-8") for s in SCRIPTS) + "})();"
    env = Environment(
        loader=PackageLoader("sightline.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters["percent"] = percent
    scans = [heads(run) for run in look.runs]
    found = [words(look, run) for run in look.runs]
    page = env.get_template("report.html.j2").render(
        look=look,
        runs=[_panel(look, *parts) for parts in zip(look.runs, scans, found, strict=True)],
        remark=plan.remark,
        settings=flat(plain(look.settings)),
        image_mass=IMAGE_MASS,
        sink_share=SINK_SHARE,
        crops=len(look.layout.grids),
        picture=picture_uri(look.image),
        style=Markup(style),
        script=Markup(script),
        data=Markup(safe_json(_data(look, plan, scans, found))),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be written to a file


def safe_json(value: Any) -> str:
    """JSON that may stand inside a <script> element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def percent(value: float) -> str:
    """0.1234 -> "12 %"; below ten percent one decimal is kept."""
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"


def segments(answer: str, words: tuple[Word, ...]) -> list[tuple[str, int]]:
    """The answer cut into (text, word index); -1 for what lies between words. Joined, it is the answer again.

    A word that cannot be found in the answer (its bytes were decoded differently) is put after a blank.
    """
    parts, at = [], 0
    for index, word in enumerate(words):
        begin = answer.find(word.text, at) if word.text else -1
        if begin < 0:
            parts += [(" ", -1), (word.text or "·", index)]
            continue
        parts += [(answer[at:begin], -1), (word.text, index)]
        at = begin + len(word.text)
    return [part for part in [*parts, (answer[at:], -1)] if part[0]]


def twins(first: tuple[Word, ...], second: tuple[Word, ...]) -> list[int]:
    """For each word of `first` the index of its counterpart in `second`, or -1.

    Words that both answers share are aligned; in between, words that stand in place of each other are paired in order.
    """
    pairs = [-1] * len(first)
    blocks = SequenceMatcher(None, [w.text for w in first], [w.text for w in second], autojunk=False).get_opcodes()
    for kind, a0, a1, b0, b1 in blocks:
        if kind in ("equal", "replace"):
            for step in range(min(a1 - a0, b1 - b0)):
                pairs[a0 + step] = b0 + step
    return pairs


def picture_uri(image: Image.Image) -> str:
    """The picture as a data URI: JPEG, at most PICTURE pixels long; small pictures as PNG, unchanged."""
    image = image.convert("RGB")
    buffer, small = io.BytesIO(), max(image.size) <= 128
    if small:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((PICTURE, PICTURE))
        image.save(buffer, "JPEG", quality=86)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) lines."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in flat(inner, f"{name}.{key}" if name else str(key))]
    shown = (
        value if isinstance(value, str) else "none" if value in (None, []) else json.dumps(value, ensure_ascii=False)
    )
    return [(name, shown if len(shown) <= LONGEST else shown[:LONGEST] + "… (whole in look.json)")]


def _panel(look: Look, run: Run, scan: Heads, found: list[WordSummary]) -> dict[str, Any]:
    """What the template needs of one run."""
    layers = sink_layers(run)
    return {
        "label": run.label,
        "title": title(run.label),
        "dir": direction(run.answer),
        "answer": run.answer,
        "parts": segments(run.answer, run.words),
        "words": found,
        "tokens": len(run.pieces),
        "seconds": run.seconds,
        "tau": run.tau,
        "sinks": layers,
        "has_sinks": any(layer["visual"] or layer["text"] for layer in layers),
        "has_phi": any(layer["largest_phi"] for layer in layers),  # a maximum over the sink dimensions: 0 without any
        "centric": [(i, h, scan.mass[i, h], scan.sink_share[i, h]) for i, h in scan.largest(12)],
        "centric_count": int(scan.centric.sum()),
        "did": flat(plain(run.notes)),
        "stages": [(stage.name, int(stage.kept.sum()), len(stage.kept)) for stage in run.stages],
        "kept": _kept(look, run) if run.stages else "",
    }


def _kept(look: Look, run: Run) -> str:
    """The figure of dropped tokens as a data URI."""
    from sightline.report.figures import kept
    from sightline.report.files import png

    return f"data:image/png;base64,{base64.b64encode(png(kept(look, run))).decode('ascii')}"


def title(label: str) -> str:
    """A reader's name for a run's label."""
    return "As it is" if label in ("", "none") else f"With {label}"


def direction(text: str) -> str:
    """Writing direction by the first strong character: "rtl" or "ltr"."""
    from unicodedata import bidirectional

    strong = (kind for kind in map(bidirectional, text) if kind in ("L", "R", "AL"))
    return "rtl" if next(strong, "L") != "L" else "ltr"


def _data(look: Look, plan: pack.Plan, scans: list[Heads], found: list[list[WordSummary]]) -> dict[str, Any]:
    """Everything the script reads."""
    import matplotlib

    layers, count = scans[0].mass.shape
    palette = (255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    layout = look.layout
    return {
        "size": list(layout.size),
        "boxes": [[round(float(x), 2) for x in box] if np.isfinite(box).all() else None for box in layout.boxes],
        "crop": layout.crop.tolist(),
        "cell": layout.cell.tolist(),
        "crops": len(layout.grids),
        "layers": layers,
        "heads": count,
        "full": plan.full,
        "channels": [[c.first, c.stop, c.head] for c in plan.channels],
        "groups": list(look.runs[0].groups),
        "palette": pack.text(palette.tobytes()),
        "runs": [_run(look, i, plan, scan, found[i]) for i, scan in enumerate(scans)],
    }


def _run(look: Look, index: int, plan: pack.Plan, scan: Heads, found: list[WordSummary]) -> dict[str, Any]:
    run = look.runs[index]
    rows, scales = pack.pack_rows(run, plan.channels)
    phi, step = pack.pack_phi(run)
    others = [other for i, other in enumerate(look.runs) if i != index]
    return {
        "title": title(run.label),
        "words": [w.text for w in run.words],
        "probability": [round(w.probability, 4) for w in found],
        "imageMass": [round(w.image_mass, 4) for w in found],
        "twin": twins(run.words, others[0].words) if others else [],
        "rows": pack.text(rows),
        "scales": pack.text(scales),
        "masses": pack.text(pack.pack_masses(run, plan.full)),
        "phi": pack.text(phi),
        "phiStep": step,
        "tau": float(run.tau),
        "sinks": [[int(c) for c in columns] for columns in run.sinks],
        "headMass": [round(float(x), 4) for x in scan.mass.ravel()],
        "headSink": [round(float(x), 4) for x in scan.sink_share.ravel()],
        "headCentric": scan.centric.ravel().astype(int).tolist(),
    }


def _hash(text: str) -> str:
    """Content-Security-Policy source that allows exactly this inline text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

"""A made-up Look with known truth: blobs of attention, two sinks, no model needed."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from sightline.hosts.geometry import Layout
from sightline.looking import Look, Run, Word

GROUPS = ("start", "before", "image", "visual sink", "after", "generated")
SINKS = (17, 150)


def picture(size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A grassy scene with a red ball upper left and a blue box lower right."""
    image = Image.new("RGB", size, "#a9c8e8")
    w, h = size
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, h * 0.55, w, h], fill="#7fa55c")
    draw.ellipse([w * 0.1, h * 0.1, w * 0.35, h * 0.43], fill="#c8372d")
    draw.rectangle([w * 0.62, h * 0.6, w * 0.9, h * 0.92], fill="#2d55a5")
    return image


def grid_layout(size: tuple[int, int], rows: int, columns: int, separators: bool = False) -> Layout:
    """One crop; with `separators`, a newline token (NaN box) after every row."""
    return crops_layout(size, [((0, 0, *size), rows, columns)], separators)


def crops_layout(size: tuple[int, int], crops: list, separators: bool = True) -> Layout:
    """Crops given as (box in pixels, rows, columns), in order."""
    boxes, crop, cell = [], [], []
    for number, ((x0, y0, x1, y1), rows, columns) in enumerate(crops):
        for r in range(rows):
            for c in range(columns):
                dx, dy = (x1 - x0) / columns, (y1 - y0) / rows
                boxes.append((x0 + c * dx, y0 + r * dy, x0 + (c + 1) * dx, y0 + (r + 1) * dy))
                crop.append(number)
                cell.append((r, c))
            if separators:
                boxes.append((np.nan,) * 4)
                crop.append(-1)
                cell.append((-1, -1))
    return Layout(
        size=size,
        boxes=np.array(boxes, np.float32),
        crop=np.array(crop),
        cell=np.array(cell),
        grids=tuple((rows, columns) for _, rows, columns in crops),
        patches=tuple((i,) for i in range(len(boxes))),
    )


def blob(layout: Layout, x: float, y: float, spread: float) -> np.ndarray:
    """(V,) bump around a point given as shares of width and height."""
    w, h = layout.size
    at = np.nan_to_num((layout.boxes[:, :2] + layout.boxes[:, 2:]) / 2, nan=-1e4) / (w, h)
    return np.exp(-(((at - (x, y)) / spread) ** 2).sum(-1) / 2) + 1e-3


def make_run(
    layout: Layout, pieces: list[str], label: str = "none", layers: int = 6, heads: int = 4,
    sinks: tuple[int, ...] = SINKS, sink_gain: float = 1.0, seed: int = 0,
) -> Run:  # fmt: skip
    """Words at even places look upper left, the others lower right; heads 0 look most; sinks from layer 2 on."""
    rng = np.random.default_rng(seed)
    T, L, H, V = len(pieces), layers, heads, len(layout)
    left, right = blob(layout, 0.22, 0.27, 0.08), blob(layout, 0.76, 0.76, 0.09)
    rows = np.zeros((T, L, H, V), np.float32)
    on_image = 0.12 + 0.5 * np.linspace(1, 0, H)[None, :] * np.linspace(0.4, 1, L)[:, None]  # (L, H)
    for t in range(T):
        noise = 1 + 0.4 * rng.random((L, H, V))
        sharp = np.linspace(0.2, 1, L)[:, None, None]
        row = sharp * (left if t % 2 == 0 else right) * noise + 0.01 * noise
        for layer in range(2, L):
            for sink in sinks:
                row[layer, :, sink] += 0.35 * sink_gain * row[layer].sum(-1)
        rows[t] = row / row.sum(-1, keepdims=True) * on_image[:, :, None]
    phi = rng.uniform(0.5, 3, (L, V)).astype(np.float32)
    for layer in range(2, L):
        phi[layer, list(sinks)] = 24 + 3 * layer + np.arange(len(sinks))
    per_layer = tuple(np.array(sinks if layer >= 2 else (), int) for layer in range(L))
    image = rows.sum(-1)
    on_sinks = np.stack([rows[:, i][..., per_layer[i]].sum(-1) for i in range(L)], axis=1) if T else image
    rest = 1 - image
    masses = np.stack([0.5 * rest, 0.1 * rest, image - on_sinks, on_sinks, 0.25 * rest, 0.15 * rest], -1)
    return Run(
        label=label,
        answer="".join(pieces).strip(),
        pieces=tuple(pieces),
        words=tuple(Word(p.strip(), i, i + 1) for i, p in enumerate(pieces)),
        probability=rng.uniform(0.4, 1, T).astype(np.float32),
        rows=rows.astype(np.float16),
        masses=masses.astype(np.float32),
        groups=GROUPS,
        phi=phi,
        tau=20.0,
        sinks=per_layer,
        text_sinks=tuple(((0, "<s>"),) if layer >= 2 and sinks else () for layer in range(L)),
        seconds=0.84,
        notes={} if label == "none" else {"var": {"p": 0.6, "heads edited": 14, "mass moved": np.float32(0.0725)}},
    )


def make_look(
    pieces: tuple[str, ...] = ("Yes", ",", " a", " red", " ball", " on", " the", " grass", "."),
    changed: tuple[str, ...] | None = ("Yes", ",", " one", " red", " ball", " beside", " a", " blue", " box", "."),
    layout: Layout | None = None,
    question: str = "Is there a ball in the picture?",
    size: tuple[int, int] = (320, 240),
    **options,
) -> Look:
    """A look with one run, or with a second one when `changed` is given. `options` go to `make_run`."""
    layout = layout or grid_layout(size, 14, 14)
    runs = [make_run(layout, list(pieces), **options)]
    if changed is not None:
        runs.append(make_run(layout, list(changed), label="var:p=0.6", sink_gain=0.6, seed=1, **options))
    return Look(
        image=picture(layout.size),
        question=question,
        model="tiny-llava (bundled)",
        layout=layout,
        runs=tuple(runs),
        settings={"seed": 0, "device": "cpu", "dtype": "float32", "versions": {"sightline": "0.1.0", "torch": "2.15"}},
        warnings=("The bundled model knows only the generated world.",),
    )

"""Figures of a look, as matplotlib `Figure` objects: save them, or show them in a notebook."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from sightline.report.page import title
from sightline.report.summary import heads as head_scan
from sightline.report.summary import hide_sinks, word_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from sightline.looking import Look, Run, Word

HEAT = "inferno"
SHEET = 40  # words on a contact sheet
CANVAS = 768  # longest side of an overlay, pixels
THUMB = 216  # the same on the contact sheet


def overlay(look: Look, run: Run, word: Word | int | None = None, sinks: bool = False) -> Figure:
    """The picture with the attention of one word (or of the whole answer) over it, mean over layers and heads.

    Colour is the rank of a pixel's heat. Sink columns are left out unless `sinks`.
    """
    word = run.words[word] if isinstance(word, int) else word
    width, height = look.layout.size
    tall = float(np.clip(6 * height / width, 1.5, 12))
    figure = Figure(figsize=(6, tall + 0.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(_blend(look, _values(run, word, sinks), CANVAS))
    axes.set_axis_off()
    said = run.answer if word is None else word.text
    axes.set_title(f"{_plain(title(run.label), 40)}: {_plain(said, 60) or '(empty answer)'}", fontsize=11, loc="left")
    return figure


def words(look: Look, run: Run, sinks: bool = False, most: int = SHEET) -> Figure:
    """A contact sheet: one small overlay per word of the answer, at most `most` (the first ones)."""
    shown = run.words[:most]
    columns = min(6, max(1, len(shown)))
    cells = [_blend(look, _values(run, word, sinks), THUMB) for word in shown] or [_blend(look, None, THUMB)]
    tall, wide = cells[0].shape[:2]
    rows, step_x, step_y = -(-len(cells) // columns), wide + THUMB // 24, tall + THUMB // 7
    sheet = np.full((rows * step_y, columns * step_x, 3), 255, np.uint8)
    figure = Figure(figsize=(max(columns * step_x / 110, 4), rows * step_y / 110 + 0.5), layout="constrained")
    axes = figure.subplots()
    for index, cell in enumerate(cells):
        top, left = index // columns * step_y + step_y - tall, index % columns * step_x
        sheet[top : top + tall, left : left + wide] = cell
        name = (_plain(shown[index].text, 18) or "·") if shown else ""
        axes.text(left + wide / 2, top - THUMB / 40, name, ha="center", va="bottom", fontsize=9)
    axes.imshow(sheet, aspect="equal")
    axes.set_axis_off()
    more = f" (first {len(shown)} of {len(run.words)} words)" if len(shown) < len(run.words) else ""
    _headline(figure, f"{_plain(title(run.label), 60)}{more}" + ("" if shown else ": empty answer"))
    return figure


def sinks(look: Look, run: Run, layers: Sequence[int] | None = None) -> Figure:
    """Sink value phi of every visual token on the picture at `layers` (by default four), and over all layers below.

    Every token that is a sink somewhere has its own line; the band shows the others between their 5th and 95th percentile.
    """
    depth = len(run.phi)
    layers = np.unique(np.linspace(0, depth - 1, 4).round().astype(int)) if layers is None else np.asarray(layers)
    width, height = look.layout.size
    tall = float(np.clip(2.2 * height / width, 0.8, 5))
    figure = Figure(figsize=(9, tall + 3.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(tall + 0.5, 2.9))
    maps = top.subplots(1, len(layers), squeeze=False)[0]
    highest = max(float(np.nanmax(run.phi, initial=0.0)), float(run.tau))
    for axes, layer in zip(maps, layers, strict=True):
        drawn = _boxes(axes, look, run.phi[layer], highest)
        axes.set_title(f"layer {layer}: {len(run.sinks[layer])} sinks", fontsize=9)
    top.colorbar(drawn, ax=list(maps), shrink=0.85, label="φ")
    _phi_lines(bottom.subplots(), run)
    _headline(figure, f"Sink value of the visual tokens · {_plain(title(run.label), 60)}")
    return figure


def heads(look: Look, run: Run) -> Figure:
    """Layer by head: attention mass on the picture, mean over the answer. A dot marks an image-centric head."""
    scan = head_scan(run)
    depth, count = scan.mass.shape
    size = (float(np.clip(0.32 * count + 2.2, 4.5, 14)), float(np.clip(0.32 * depth + 1.6, 3.2, 14)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scan.mass, cmap=HEAT, vmin=0, vmax=max(float(scan.mass.max(initial=0)), 0.05), aspect="auto")
    at = np.argwhere(scan.centric)
    if len(at):
        bright = scan.mass[scan.centric] > 0.6 * scan.mass.max()
        axes.scatter(at[:, 1], at[:, 0], s=14, c=np.where(bright, "black", "white"), linewidths=0)
    figure.colorbar(image, label="attention on the picture")
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(f"{_plain(title(run.label), 40)}: {len(at)} image-centric heads", fontsize=11, loc="left")
    _whole_numbers(axes)
    return figure


def masses(look: Look, run: Run) -> Figure:
    """Attention mass per group of keys and layer, mean over the answer and the heads, as stacked bars."""
    mean = run.masses.mean(axis=(0, 2), dtype=np.float64) if len(run.masses) else np.zeros(run.masses.shape[1::2])
    depth = len(mean)  # mean: (L, G)
    figure = Figure(figsize=(float(np.clip(0.3 * depth + 3.5, 6, 14)), 3.4), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(depth)
    for name, share, colour in zip(run.groups, mean.T, group_colours(run.groups), strict=True):
        axes.bar(np.arange(depth), share, bottom=below, color=colour, width=0.78, label=name)
        below += share
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1))
    axes.set_title(f"Where the attention goes · {_plain(title(run.label), 60)}", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False, fontsize=9)
    _whole_numbers(axes, y=False)
    return figure


def kept(look: Look, run: Run) -> Figure:
    """The picture at every stage at which visual tokens were dropped: what was dropped is dark."""
    from matplotlib.collections import PolyCollection

    count = max(1, len(run.stages))
    columns = min(4, count)
    width, height = look.layout.size
    rows = -(-count // columns)
    tall = float(np.clip(3 * height / width, 0.8, 6)) + 0.4
    figure = Figure(figsize=(3 * columns, rows * tall + 0.4), layout="constrained")
    boxes = look.layout.boxes
    for axes, stage in zip(figure.subplots(rows, columns, squeeze=False).flat, [*run.stages], strict=False):
        gone = _unseen(look, stage.kept)
        corners = boxes[gone][:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        axes.imshow(look.image.convert("RGB"), extent=(0, width, height, 0))
        axes.add_collection(PolyCollection(corners, facecolor=(0, 0, 0, 0.72), linewidths=0, antialiased=False))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_title(f"{stage.name}: {int(stage.kept.sum())} of {len(stage.kept)}", fontsize=9)
    for axes in figure.axes:
        axes.set_axis_off()
    said = "" if run.stages else ": nothing was dropped"
    _headline(figure, f"Visual tokens that are left · {_plain(title(run.label), 60)}{said}")
    return figure


def _unseen(look: Look, kept: np.ndarray) -> np.ndarray:
    """(n,) dropped tokens that are dark: of pictures seen in tiles, those of the tiles; the base where there are none."""
    layout = look.layout
    detail = (layout.crop >= 0) & ~np.isin(layout.crop, layout.bases or (layout.base,))
    shown = detail if detail.any() else layout.crop >= 0
    return np.flatnonzero(shown & ~kept & np.isfinite(layout.boxes).all(1))


def group_colours(groups: Sequence[str]) -> list[str]:
    """The page's colours: the picture orange, its sinks vermilion, the rest cool; told apart by colour-blind eyes."""
    cool = iter(("#9aa3ad", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#f0e442") * 2)
    seen = [("image" in name or "visual" in name, "sink" in name) for name in groups]
    return [("#d55e00" if sink else "#e69f00") if on_image else next(cool) for on_image, sink in seen]


def _values(run: Run, word: Word | None, sinks: bool) -> np.ndarray:
    rows = word_rows(run, word)
    return (rows if sinks else hide_sinks(rows, run.sinks)).mean(axis=(0, 1))  # (V,)


def _blend(look: Look, values: np.ndarray | None, longest: int) -> np.ndarray:
    """(h, w, 3) uint8: the picture with the heat of `values` (V,) over it, `longest` pixels on its longest side."""
    import matplotlib

    scale = longest / max(look.layout.size)
    width, height = (max(1, round(side * scale)) for side in look.layout.size)
    base = np.asarray(look.image.convert("RGB").resize((width, height)), np.float32)
    if values is None:
        return base.astype(np.uint8)
    heat = _ranks(look.layout.heatmap(values, (width, height)))  # (h, w)
    colour = 255 * matplotlib.colormaps[HEAT](heat)[..., :3]
    alpha = (0.85 * heat**1.3)[..., None]
    return (base + (colour - base) * alpha).round().astype(np.uint8)


def _ranks(heat: np.ndarray) -> np.ndarray:
    """Share of the positive pixels that are cooler, ties in the middle; 0 stays 0."""
    flat, warm = heat.ravel(), heat.ravel() > 0
    ranks = np.zeros(flat.shape)
    if warm.any():
        _, place, count = np.unique(flat[warm], return_inverse=True, return_counts=True)
        ranks[warm] = ((np.cumsum(count) - count / 2) / count.sum())[place]
    return ranks.reshape(heat.shape)


def _boxes(axes: Axes, look: Look, values: np.ndarray, highest: float):
    """Every token's box filled by its value, the largest on top."""
    from matplotlib.collections import PolyCollection

    boxes = look.layout.boxes
    order = [i for i in np.argsort(values, kind="stable") if np.isfinite(boxes[i]).all()]
    corners = boxes[order][:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    drawn = PolyCollection(corners, array=values[order], cmap="viridis", linewidths=0, antialiased=False)
    drawn.set_clim(0, highest)
    axes.add_collection(drawn)
    axes.set(xlim=(0, look.layout.size[0]), ylim=(look.layout.size[1], 0), aspect="equal", xticks=(), yticks=())
    return drawn


def _phi_lines(axes: Axes, run: Run) -> None:
    depth = np.arange(len(run.phi))
    ever = sorted({int(t) for columns in run.sinks for t in columns})
    others = np.delete(run.phi, ever, axis=1)
    if others.shape[1]:
        low, middle, high = np.nanpercentile(others, (5, 50, 95), axis=1)
        axes.fill_between(
            depth, low, high, color="#9aa3ad", alpha=0.4, linewidth=0, label="other visual tokens, 5–95 %"
        )
        axes.plot(depth, middle, color="#626a73", linewidth=1)
    for token in ever[:40]:
        axes.plot(depth, run.phi[:, token], color="#d55e00", alpha=0.8, linewidth=1.3, marker=".")
    if len(ever) <= 6:
        _name_lines(axes, {f"token {t}": float(run.phi[-1, t]) for t in ever}, x=float(depth[-1]))
    axes.axhline(run.tau, color="#0072b2", linestyle="--", linewidth=1, label=f"τ = {run.tau:g}")
    axes.set(xlabel="layer", ylabel="φ", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="best")
    _whole_numbers(axes, y=False)


def _name_lines(axes: Axes, ends: dict[str, float], x: float) -> None:
    """Names at the right ends of lines, pushed up where they would lie on each other."""
    gap, below = 0.07 * max([axes.get_ylim()[1], *ends.values()]), -np.inf
    for name, y in sorted(ends.items(), key=lambda end: end[1]):
        below = max(y, below + gap)
        axes.annotate(name, (x, y), xytext=(x, below), textcoords=_beside(axes), fontsize=8, va="center")


def _beside(axes: Axes):
    """Data coordinates, eight points to the right."""
    from matplotlib.transforms import offset_copy

    return offset_copy(axes.transData, fig=axes.figure.figure, x=8, units="points")


def _whole_numbers(axes: Axes, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis) if y else (axes.xaxis,):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _headline(figure: Figure, text: str) -> None:
    """A title above all axes; what is wider than the figure goes on in further lines, for which the figure grows."""
    lines = wrap(text, max(20, int(11 * figure.get_figwidth())))  # characters of 11 points to an inch
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=11)


def _plain(text: str, longest: int) -> str:
    """Text for a title: one line of printable characters, cut to `longest`, no mathtext."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
    return line.replace("$", r"\$")

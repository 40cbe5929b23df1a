"""The figures of a study, as matplotlib `Figure` objects."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sightline.explain import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sightline.explain.questions import Item

SINK, OTHER, BLUE, GREY = "#d55e00", "#e69f00", panels.BLUE, "#626a73"
LABELS = {
    "none": "model as it is",
    "var": "VAR",
    "no head selection": "VAR in all heads",
    "budget to text": "VAR, budget to the text",
    "budget to all": "VAR, budget to all tokens",
    "mask sinks": "sinks hidden",
    "mask random": "random tokens hidden",
}


def draw_all(found: dict[str, Any], items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """{file stem: PNG} of every figure that the study has data for."""
    shown = [(items[int(row["id"])], row["map"]) for row in rows if row.get("map")]
    made = {"sinks": sinks(found, shown), "maps": maps(found, shown), "heads": heads(found)}
    if found["contribution"]:
        made["contribution"] = contribution(found)
    if found["contrast"]:
        made["masking"], made["ablations"] = masking(found), ablations(found)
    return {name: png(figure) for name, figure in made.items()}


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def sinks(found: dict[str, Any], shown: Sequence[tuple[Item, dict[str, Any]]]) -> Figure:
    """phi on one picture at four layers; phi against received attention at the same layers; phi by layer."""
    config = found["config"]
    depth, tau = config["layers"], config["found_tau"]
    layers = np.unique(np.linspace(0, depth - 1, 4).round().astype(int))
    item, first = shown[0]
    phi, boxes = panels.array(first["phi"]), panels.array(first["boxes"])
    highest = max(float(np.nanmax(phi)), tau)
    figure = Figure(figsize=(11, 8), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 1, 0.95))
    axes = top.subplots(1, len(layers) + 1)
    panels.picture(axes[0], item)
    axes[0].set_title("picture", fontsize=9)
    for place, layer in zip(axes[1:], layers, strict=True):
        drawn = panels.tokens(place, item, boxes, phi[layer], highest)
        place.set_title(f"φ entering layer {layer}", fontsize=9)
    top.colorbar(drawn, ax=list(axes), shrink=0.8, label="φ")
    for place, layer in zip(middle.subplots(1, len(layers)), layers, strict=True):
        _scatter(place, [m for _, m in shown], int(layer), tau)
    middle.supylabel("attention from text", fontsize=9)
    middle.suptitle(
        f"attention that a visual token gets, against its φ ({len(shown)} pictures; coloured: sinks)", fontsize=9
    )
    left, right = bottom.subplots(1, 2)
    x = np.arange(depth)
    left.plot(x, found["sinks"]["phi max"], color=SINK, marker=".", label="largest visual token")
    left.plot(x, found["sinks"]["phi median"], color=GREY, marker=".", label="median visual token")
    left.axhline(tau, color=BLUE, linestyle="--", linewidth=1, label=f"τ = {tau:.3g}")
    left.set(xlabel="layer", ylabel="φ, mean over pictures", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.bar(x, found["sinks"]["per picture"], color=SINK, width=0.7)
    right.set(
        xlabel="layer", ylabel="visual sinks per picture", ylim=(0, max(1, *found["sinks"]["per picture"]) * 1.05)
    )
    panels.tidy(left, right)
    return figure


def maps(found: dict[str, Any], shown: Sequence[tuple[Item, dict[str, Any]]]) -> Figure:
    """Attention of the text on the pictures, with and without sinks; sinks on background against the base rate."""
    layers = found["sinks"]["layers"] or list(range(found["config"]["layers"]))
    tau = found["config"]["found_tau"]
    name = "sinks" if found["config"]["found_dims"] else "tokens over τ"
    figure = Figure(figsize=(10, 1.9 * len(shown) + 2.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.9 * len(shown), 2.4))
    grid = top.subplots(len(shown), 4, squeeze=False)
    for k, (row, (item, whole)) in enumerate(zip(grid, shown, strict=True)):
        phi, received, boxes = (panels.array(whole[key]) for key in ("phi", "received", "boxes"))
        sink = phi > tau
        values = {"attention from text": received, f"without the {name}": np.where(sink, 0, received)}
        panels.picture(row[0], item)
        for place, (title, map_) in zip(row[1:3], values.items(), strict=True):
            mean = map_[layers].mean(0)
            panels.tokens(place, item, boxes, mean, float(mean.max()), cmap="inferno")
            if k == 0:
                place.set_title(title, fontsize=9)
        panels.tokens(row[3], item, boxes, sink[layers].mean(0), 1.0, cmap="Reds")
        objects = np.array(boxes)[~np.array(whole["background"])]
        panels.outline(row[3], objects)
    grid[0][0].set_title("picture", fontsize=9)
    grid[0][3].set_title(f"{name} (darker: in more layers);\nblue: tokens that show objects", fontsize=8)
    left, right = bottom.subplots(1, 2)
    numbers = found["maps"]
    panels.bars(
        left, {"visual sinks": numbers["sinks on background"], "all visual tokens": numbers["base rate"]}, (SINK, GREY)
    )
    left.set(ylabel="share on background", ylim=(0, 1.05))
    pairs = {
        "all tokens": numbers["attention on objects"],
        "without sinks": numbers["attention on objects without sinks"],
    }
    panels.bars(right, pairs, (SINK, OTHER))
    right.axhline(
        numbers["area of objects"], color=GREY, linestyle=":", linewidth=1, label="share of tokens on objects"
    )
    right.set(ylabel="attention on objects", ylim=(0, 1.05))
    right.legend(frameon=False, fontsize=8)
    panels.tidy(left, right, whole=False)
    return figure


def heads(found: dict[str, Any]) -> Figure:
    """Layer by head: attention of the text on the picture, and how often a head passes VAR's test."""
    mass, selected = np.array(found["heads"]["mass"]), np.array(found["heads"]["selected"])
    depth, count = mass.shape
    figure = Figure(figsize=(float(np.clip(0.5 * count + 4, 8, 16)), float(np.clip(0.26 * depth + 1.6, 3.4, 12))))
    figure.set_layout_engine("constrained")
    names = ("attention on the picture", "share of text queries that pass the test")
    for axes, table, name, cmap in zip(
        figure.subplots(1, 2), (mass, selected), names, ("inferno", "viridis"), strict=True
    ):
        top = max(float(table.max()), 0.05) if cmap == "inferno" else 1.0
        drawn = axes.imshow(table, cmap=cmap, vmin=0, vmax=top, aspect="auto")
        figure.colorbar(drawn, ax=axes, shrink=0.9)
        axes.set(xlabel="head", ylabel="layer")
        axes.set_title(name, fontsize=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def contribution(found: dict[str, Any]) -> Figure:
    """Per layer and token: attention received, and norm of what is added to the text, sinks against other tokens."""
    numbers = found["contribution"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    both = figure.subplots(1, 2)
    names = {"attention": "attention per token", "norm": "norm of the contribution per token"}
    for axes, (what, title) in zip(both, names.items(), strict=True):
        for group, colour in (("sink", SINK), ("other", GREY)):
            values = panels.array(numbers[f"{group} {what}"])
            label = "visual sinks" if group == "sink" else "other visual tokens"
            axes.plot(np.arange(len(values)), values, color=colour, marker="o", markersize=4, label=label)
        axes.set(xlabel="layer", xlim=(-0.5, len(values) - 0.5))
        panels.scale(axes, [*numbers[f"sink {what}"], *numbers[f"other {what}"]])
        axes.set_title(title, fontsize=10, loc="left")
    both[0].legend(frameon=False, fontsize=8)
    panels.tidy(*both)
    return figure


def masking(found: dict[str, Any]) -> Figure:
    """What hiding sinks, and as many other tokens, does to accuracy and to the true answer's log-probability."""
    names = ("none", "mask sinks", "mask random")
    scores = {LABELS[name]: found["conditions"][name] for name in names}
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    groups = [g for g in ("random", "popular", "adversarial", "open") if g in found["conditions"]["none"]]
    for k, (label, colour) in enumerate(zip(scores, (GREY, SINK, BLUE), strict=True)):
        marks = [scores[label][g]["accuracy"] for g in groups]
        panels.marks(left, np.arange(len(groups)) + 0.2 * (k - 1), marks, colour, label, factor=100)
    left.set_xticks(
        range(len(groups)), ["open\nquestions" if g == "open" else f"POPE\n{g}" for g in groups], fontsize=8
    )
    left.set(ylabel="accuracy, %", ylim=(0, 102))
    left.legend(frameon=False, fontsize=7, loc="lower left")
    for axes, key, title in (
        (middle, "accuracy change", "change of accuracy, points"),
        (right, "logprob change", "change of log p(truth)"),
    ):
        for k, (name, colour) in enumerate((("mask sinks", SINK), ("mask random", BLUE))):
            panels.marks(axes, [k], [found["conditions"][name]["all"][key]], colour, factor=panels.unit(key))
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xticks([0, 1], ["sinks\nhidden", "random\nhidden"], fontsize=8)
        axes.set_xlim(-0.6, 1.6)
        axes.set_title(title, fontsize=9, loc="left")
    panels.tidy(left, middle, right, whole=False)
    return figure


def ablations(found: dict[str, Any]) -> Figure:
    """Change against the model as it is, for VAR and its variants, and over its strength p."""
    conditions = found["conditions"]
    names = [n for n in ("var", "no head selection", "budget to text", "budget to all") if n in conditions]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=(1.25, 1), sharex=False)
    sweep = sorted([(float(n[2:]), n) for n in conditions if n.startswith("p=")] + [(0.6, "var"), (1.0, "none")])
    titles = {"accuracy change": "change of POPE accuracy, points", "logprob change": "change of log p(truth), POPE"}
    for (left, right), (key, title) in zip(grid, titles.items(), strict=True):
        for k, name in enumerate(names):
            one = conditions[name]["pope"][key]
            panels.marks(left, [k], [one], SINK if name == "var" else BLUE, flip=True, factor=panels.unit(key))
        left.axvline(0, color=GREY, linewidth=0.8)
        left.set_yticks(range(len(names)), [LABELS[n] for n in names], fontsize=8)
        left.set_ylim(len(names) - 0.5, -0.5)
        left.set_title(title, fontsize=10, loc="left")
        panels.marks(
            right,
            [p for p, _ in sweep],
            [conditions[n]["pope"][key] for _, n in sweep],
            SINK,
            line=True,
            factor=panels.unit(key),
        )
        right.axhline(0, color=GREY, linewidth=0.8)
        right.set(xlabel="p, share that the sinks keep (1 = model as it is)")
    panels.tidy(*grid.flat, whole=False)
    return figure


def _scatter(axes: Axes, whole: Sequence[dict[str, Any]], layer: int, tau: float) -> None:
    phi = np.concatenate([panels.array(m["phi"])[layer] for m in whole])
    received = np.concatenate([panels.array(m["received"])[layer] for m in whole])
    sink = phi > tau
    axes.scatter(phi[~sink], received[~sink], s=5, color=GREY, alpha=0.5, linewidths=0, label="visual tokens")
    axes.scatter(phi[sink], received[sink], s=9, color=SINK, alpha=0.8, linewidths=0, label="sinks")
    axes.axvline(tau, color=BLUE, linestyle="--", linewidth=1)
    axes.set_xlabel(f"φ, layer {layer}", fontsize=9)
    axes.set_ylim(0, float(received.max()) * 1.1 or 1)
    axes.tick_params(labelsize=7)
    panels.tidy(axes, whole=False)

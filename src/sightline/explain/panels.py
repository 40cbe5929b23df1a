"""What the figures of a study are drawn with: pictures, values on tokens, points with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sightline.explain.questions import Item

BLUE = "#0072b2"


def scale(axes: Axes, values: Sequence[float | None]) -> None:
    """A logarithmic axis where values differ by more than ten times, else one from zero."""
    some = [v for v in values if v]
    if some and max(some) > 10 * min(some):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)


def picture(axes: Axes, item: Item) -> None:
    """The picture of a question, without axes."""
    axes.imshow(np.asarray(item.scene.image), interpolation="nearest")
    axes.set_axis_off()


def tokens(axes: Axes, item: Item, boxes: np.ndarray, values: np.ndarray, highest: float, cmap: str = "viridis") -> Any:
    """Every token's box filled by its value."""
    good = np.isfinite(boxes).all(1)
    drawn = PolyCollection(corners(boxes[good]), array=values[good], cmap=cmap, linewidths=0, antialiased=False)
    drawn.set_clim(0, highest if highest > 0 else 1)
    axes.add_collection(drawn)
    side = item.scene.size
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=(), yticks=())
    return drawn


def outline(axes: Axes, boxes: np.ndarray) -> None:
    """A thin line around each of these boxes: the tokens that show objects."""
    good = np.isfinite(boxes).all(1)
    axes.add_collection(PolyCollection(corners(boxes[good]), facecolors="none", edgecolors=BLUE, linewidths=0.5))


def corners(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) boxes -> (n, 4, 2) corners."""
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)


def bars(axes: Axes, values: dict[str, dict[str, Any]], colours: Sequence[str]) -> None:
    """A bar with its interval per value."""
    for k, (one, colour) in enumerate(zip(values.values(), colours, strict=True)):
        if one["value"] is not None:
            axes.bar(k, one["value"], color=colour, width=0.6, alpha=0.85)
            marks(axes, [k], [one], "black")
    axes.set_xticks(range(len(values)), list(values), fontsize=9)
    axes.set_xlim(-0.7, len(values) - 0.3)


def marks(
    axes: Axes, at: Sequence[float], ones: Sequence[dict[str, Any]], colour: str, label: str | None = None,
    flip: bool = False, line: bool = False, factor: float = 1,
) -> None:  # fmt: skip
    """Points with their intervals; `flip`: values along x; `factor`: 100 for percent."""
    good = [(p, o) for p, o in zip(at, ones, strict=True) if o["value"] is not None]
    if not good:
        return
    places = [p for p, _ in good]
    values, low, high = (factor * array([o[key] for _, o in good]) for key in ("value", "low", "high"))
    spread = np.clip([values - low, high - values], 0, None)
    style = {
        "fmt": "o-" if line else "o",
        "color": colour,
        "markersize": 5,
        "capsize": 3,
        "linewidth": 1.2,
        "label": label,
    }
    if flip:
        axes.errorbar(values, places, xerr=spread, **style)
    else:
        axes.errorbar(places, values, yerr=spread, **style)


def unit(key: str) -> int:
    """100 for shares, which are shown in percent; 1 for the rest."""
    return 100 if key.startswith("accuracy") else 1


def tidy(*many: Axes, whole: bool = True) -> None:
    """No frame above and on the right; `whole`: whole numbers along x."""
    for axes in many:
        axes.spines[["top", "right"]].set_visible(False)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def array(values: Any) -> np.ndarray:
    """As floats; None becomes NaN."""
    return np.array(values, dtype=float)

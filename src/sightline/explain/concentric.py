"""The two analyses of Concentric Causal Attention (NeurIPS 2024, arXiv 2410.15926), on any model and any systems.

Information flow: how much instruction tokens look at each place of the picture. With A (H, Q, K) the attention of a decoder
layer (the paper: the first) and T the tokens behind the picture without the last,

    flow_j = mean_{q in T} mean_h A_hqj        j a visual token                                            (V,)

A model that reads the picture in raster order looks more at what stands near the question; rings make the map symmetric.

Spatial position probing: the same object is pasted at every cell of a grid on an empty place, and asked for; the share of
pictures in which it is found, by cell and size. `Reversed` gives the model its visual tokens last first, as a control: what
changes with the place in the sequence moves, what changes with the place in the picture stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sightline import scenes
from sightline.engine.attach import attach
from sightline.engine.attention import Probe
from sightline.engine.streams import last_prompt
from sightline.engine.system import Site, System
from sightline.engine.tokens import Role
from sightline.errors import InputError, ParameterError, check_range
from sightline.evaluate.pope import says_yes
from sightline.explain.observing import prefill, prompts
from sightline.explain.questions import picture_size
from sightline.explain.sinks import spearman
from sightline.hosts import layouts
from sightline.scenes.backdrops import backdrop
from sightline.scenes.contexts import CONTEXTS
from sightline.scenes.naming import with_article

if TYPE_CHECKING:
    from sightline.hosts.geometry import Layout
    from sightline.lvlm import LVLM


@dataclass(frozen=True, eq=False)
class InformationFlow:
    """Flow to the V visual tokens of pictures of one form."""

    layout: Layout
    flow: np.ndarray  # (n, V) float32

    def grid(self) -> np.ndarray:
        """(rows, columns) mean over the pictures, of the view that shows the whole picture."""
        mine = np.flatnonzero(self.layout.crop == self.layout.base)
        found = np.full(self.layout.grids[self.layout.base], np.nan, np.float32)
        found[self.layout.cell[mine, 0], self.layout.cell[mine, 1]] = self.flow.mean(0)[mine]
        return found

    def decay(self) -> float:
        """Spearman correlation of the mean flow with the place in raster order; near 1: what is nearer the text gets more."""
        map_ = self.grid().flatten()
        return float(spearman(np.arange(map_.size), map_))

    def symmetry(self) -> float:
        """Mean Pearson correlation of the map with its images under the symmetries of the square (or rectangle)."""
        map_ = self.grid()
        turned = [np.flip(map_, 0), np.flip(map_, 1), np.flip(map_, (0, 1))]
        if map_.shape[0] == map_.shape[1]:
            turned += [t.T for t in (map_, *turned)]
        return float(np.mean([np.corrcoef(map_.flatten(), t.flatten())[0, 1] for t in turned]))


class _Flow(System):
    """Sums a layer's rows of instruction tokens; changes nothing."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.tokens: Any = None
        self.total: Tensor | None = None  # (B, N)
        self.rows: Tensor | None = None  # (B, N) bool

    def attention(self, site: Site) -> Probe | None:
        if site.layer != self.layer or not site.prefill:
            return None
        tokens = self.tokens = site.tokens
        columns = torch.arange(tokens.shape[1], device=tokens.role.device)
        self.rows = (tokens.role == int(Role.AFTER)) & (columns != last_prompt(tokens)[:, None])
        self.total = torch.zeros(tokens.shape, device=tokens.role.device)
        return Probe(self._see, start=tokens.first_after)

    def _see(self, weights: Tensor, first: int) -> None:  # (B, H, R, N)
        mine = self.rows[:, first : first + weights.shape[2]]
        self.total += (weights.mean(1) * mine[..., None]).sum(1)


def information_flow(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    layer: int = 0,
    systems: Sequence[System] = (),
    batch: int = 8,
) -> InformationFlow:
    """Flow from instruction tokens to the visual tokens: one picture and one question each, `batch` at a time.

    Raises:
        InputError: none, lengths that differ, or pictures whose visual tokens lie differently.
        ParameterError: no such layer.
    """
    check_range("layer", layer, 0, lvlm.model.config.get_text_config().num_hidden_layers - 1)
    found, layout = [], None
    for a in range(0, max(len(questions), len(images), 1), batch):
        inputs = prompts(lvlm, images[a : a + batch], questions[a : a + batch])
        seer = _Flow(layer)
        with attach(lvlm.model, *systems, seer, host=lvlm.host):
            prefill(lvlm, inputs)
        sizes = [image.size for image in images[a : a + batch]]
        places = layouts(lvlm.model, lvlm.processor, inputs, sizes, host=lvlm.host)
        layout = layout or places[0]
        if any(len(p) != len(layout) or p.grids != layout.grids for p in places):
            raise InputError("information flow averages over pictures: give pictures of one size")
        mean = seer.total / seer.rows.sum(1, keepdim=True).clamp(min=1)
        found += [row[visual].float().cpu().numpy() for row, visual in zip(mean, seer.tokens.visual, strict=True)]
    return InformationFlow(layout, np.stack(found))


class Reversed(System):
    """The visual tokens of every picture in reverse order; positions and mask stay."""

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Tensor:
        new = embeddings.clone()
        image = site.tokens.image[:, site.start :]
        for row in range(len(new)):
            for number in image[row].unique().tolist():
                if number >= 0:
                    mine = (image[row] == number).nonzero().flatten()
                    new[row, mine] = embeddings[row, mine.flip(0)]
        return new


@dataclass(frozen=True, eq=False)
class SpatialProbe:
    """Whether things were found at every place. S sizes, a grid of R x R cells, n things."""

    found: np.ndarray  # (S, R, R, n) bool: answered yes where it stands
    empty: np.ndarray  # (n,) bool: answered yes to the empty place; the share is what guessing gives
    sizes: tuple[float, ...]  # longest side, share of the picture

    @property
    def accuracy(self) -> np.ndarray:
        """(S, R, R) share of things found."""
        return self.found.mean(-1)


def spatial_probe(
    lvlm: LVLM,
    n: int = 8,
    *,
    cells: int = 5,
    sizes: Sequence[float] = (0.2, 0.35),
    systems: Sequence[System] = (),
    seed: int = 0,
    batch: int = 16,
) -> SpatialProbe:
    """Paste `n` things of held-out scenes at every cell, and ask whether they are there.

    Args:
        cells: rows and columns of the grid of places. sizes: longest side of the things, shares of the picture's side.
        systems: on the model meanwhile, for example `[Reversed()]`.

    Raises:
        ParameterError: a number is out of range.
    """
    for name, value, low, high in (("n", n, 1, 10_000), ("cells", cells, 2, 64), ("batch", batch, 1, 4096)):
        check_range(name, value, low, high)
    if not sizes or any(not 0.02 <= size <= 1 for size in sizes):
        raise ParameterError(f"sizes={tuple(sizes)!r} is out of range: choose shares of the picture in [0.02, 1]")
    side, said = picture_size(lvlm.processor), []
    asked: list[tuple[Image.Image, str]] = []
    for thing, kind, place in things(n, seed, side):
        question = f"Is there {with_article(kind)} in the image?"
        asked.append((place, question))
        spots = [(i, j) for i in range(cells) for j in range(cells)]
        asked += [(pasted(place, thing, size, i, j, cells), question) for size in sizes for i, j in spots]
    for a in range(0, len(asked), batch):
        pictures, questions = zip(*asked[a : a + batch], strict=True)
        answers = lvlm.ask(list(pictures), list(questions), systems=list(systems), max_new_tokens=8)
        said += [says_yes(answer) for answer in answers]
    rows = np.array(said).reshape(n, 1 + len(sizes) * cells**2)
    found = rows[:, 1:].reshape(n, len(sizes), cells, cells).transpose(1, 2, 3, 0)
    return SpatialProbe(found, rows[:, 0], tuple(sizes))


def things(n: int, seed: int, side: int) -> Iterator[tuple[Image.Image, str, Image.Image]]:
    """`n` things cut out of held-out scenes (RGBA), their kinds, and empty places of the same kind of scene."""
    number, made = 0, 0
    while made < n:
        (scene_seed,) = scenes.seeds("test", seed * 100_003 + number + 1)[-1:]
        number += 1
        scene = scenes.draw(scene_seed, size=max(side, 224))
        whole = [o for o in scene.objects if o.size == "large" and all(0 < v < scene.size for v in o.box)]
        if not whole:
            continue
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        thing = max(whole, key=lambda o: int(o.mask.sum()))
        x0, y0, x1, y1 = (int(v) for v in thing.box)
        cut = scene.image.convert("RGB").crop((x0, y0, x1, y1))
        cut.putalpha(Image.fromarray(np.uint8(255) * thing.mask[y0:y1, x0:x1].astype(np.uint8)))
        horizon = float(np.mean(CONTEXTS[scene.context].horizon))
        yield cut, thing.kind, backdrop(scene.context, 2 * side, horizon, rng).reduce(2)
        made += 1


def pasted(place: Image.Image, thing: Image.Image, size: float, row: int, column: int, cells: int) -> Image.Image:
    """The place with the thing's centre on a cell's (moved inside where it would stick out)."""
    longest = size * place.width
    width, height = (max(1, round(v * longest / max(thing.size))) for v in thing.size)
    x = min(max(round((column + 0.5) / cells * place.width - width / 2), 0), place.width - width)
    y = min(max(round((row + 0.5) / cells * place.height - height / 2), 0), place.height - height)
    new, small = place.copy(), thing.resize((width, height), Image.Resampling.LANCZOS)
    new.paste(small, (x, y), small)
    return new

"""Experiment 2: are the visual sinks needed? Hide them from the text, and hide as many other visual tokens.

    A_q = softmax(s_q + m),   m_j = -inf for the hidden tokens j of this layer, 0 elsewhere,   q: text after the picture

"sinks": the visual sinks of the layer. "random": as many visual tokens that are not sinks there, the first of one random
order of the picture's tokens; so, like the sinks, they stay mostly the same from layer to layer.

Source: section 4 of "See What You Are Told", arXiv 2503.03321 (ICLR 2025): hiding the sinks changes little, hiding as
many other tokens hurts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sightline.engine.attention import Edit
from sightline.engine.tokens import Role
from sightline.errors import ParameterError
from sightline.explain.scoring import Reply, ask
from sightline.steer.var import VAR

if TYPE_CHECKING:
    from torch import Tensor

    from sightline.engine.system import Site
    from sightline.explain.questions import Item
    from sightline.lvlm import LVLM


@dataclass(frozen=True)
class MaskTokens(VAR):
    """Hides visual tokens from the text queries. Finds sinks as VAR does, in every layer. Not a published system.

    `generators`: for "random", one per row of the batch; each is asked once per prompt.
    """

    hide: Literal["sinks", "random"] = "sinks"
    generators: tuple[np.random.Generator, ...] = ()
    first_layer: int = 0
    skip_last_layer: bool = False
    slug = ""

    def attention(self, site: Site) -> Edit | None:
        if not site.state.get((site.layer, "active")):
            return None
        start = max(site.tokens.first_after - site.start, 0)
        if start >= site.queries:
            return None
        hidden = self._hidden(site)[:, None]  # (B, 1, N)
        if site.prefill:
            text = site.tokens.role[:, site.start + start :] == int(Role.AFTER)
            hidden = hidden & text[..., None]  # (B, R, N)
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
        return Edit(start=start, bias=bias[:, None])

    def report(self, tally: dict[Any, Any], setup: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _hidden(self, site: Site) -> Tensor:
        """(B, N) bool: what this layer hides; N positions of the prompt."""
        key = (site.layer, "hidden")
        if site.prefill:
            groups = site.state[site.layer, "groups"] > 0  # (B, N, 3): visual non-sinks, visual sinks, text sinks
            sinks = groups[..., 1]
            site.state[key] = sinks if self.hide == "sinks" else self._random(site, groups[..., 0], sinks.sum(1))
        return site.state[key]

    def _random(self, site: Site, others: Tensor, count: Tensor) -> Tensor:
        """The `count` (B,) tokens of `others` (B, N) that come first in the prompt's random order."""
        rank = site.state.get("rank")
        if rank is None or rank.shape != others.shape:
            rows, width = others.shape
            if len(self.generators) != rows:
                raise ParameterError(f"{len(self.generators)} generators for {rows} rows: give one per row")
            rank = np.full((rows, width), np.inf)
            for b, columns in enumerate(site.tokens.visual.cpu()):
                rank[b, columns.numpy()] = self.generators[b].random(int(columns.sum()))
            rank = site.state["rank"] = torch.from_numpy(rank).to(others.device)
        place = rank.masked_fill(~others, torch.inf).argsort(1).argsort(1)  # (B, N)
        return (place < count[:, None]) & others


def mask_sinks(
    lvlm: LVLM,
    items: Sequence[Item],
    *,
    draws: int = 3,
    seed: int = 0,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
) -> dict[str, list[Reply]]:
    """Answers of one batch of questions with nothing, the sinks, and random other tokens hidden.

    Args:
        lvlm: a loaded model. items: the questions.
        draws: how many random draws. seed: of the draws; each question has its own stream.
        tau, sink_dims: as in VAR.

    Returns:
        {"none": replies, "mask sinks": replies, "mask random 1": replies, ...}
    """
    if not 1 <= draws <= 100:
        raise ParameterError(f"draws={draws} is out of range: choose draws in [1, 100]")
    parts = [i.scene.image for i in items], [i.text for i in items], [i.answer for i in items]
    systems: dict[str, list[VAR]] = {"none": [], "mask sinks": [MaskTokens(tau=tau, sink_dims=sink_dims)]}
    for draw in range(1, draws + 1):
        systems[f"mask random {draw}"] = [random_mask(items, draw, seed, tau, sink_dims)]
    return {name: ask(lvlm, *parts, chosen) for name, chosen in systems.items()}


def random_mask(
    items: Sequence[Item], draw: int, seed: int, tau: float | None, sink_dims: tuple[int, ...] | None
) -> MaskTokens:
    """The mask of draw number `draw` for these questions: the same for a question in any batch."""
    generators = tuple(np.random.default_rng([seed, draw, item.number]) for item in items)
    return MaskTokens(tau=tau, sink_dims=sink_dims, hide="random", generators=generators)

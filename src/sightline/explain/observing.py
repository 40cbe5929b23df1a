"""One forward of the prompt, and everything the sink analysis reads from it. No N x N map is kept.

For every decoder layer, with A (H, Q, K) after softmax, I the visual tokens, S those with phi > tau, and q over the text
queries after the picture:

    received[h, j] = mean_q A_hqj                                j in I
    mass[h]        = mean_q sum_{j in I} A_hqj,     sink_mass[h] = mean_q sum_{j in I ∩ S} A_hqj
    selected[h]    = share of q with  sum_I A >= summ  and  sum_{I ∩ S} A / sum_I (A + 1e-6) <= 1 - min_nonsink_ratio

Source: "See What You Are Told", arXiv 2503.03321 (ICLR 2025); its parameter values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sightline.engine.attach import attach
from sightline.engine.attention import Probe
from sightline.engine.sinks import check_tau, default_tau, sink_dims_of, sink_value
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import InputError
from sightline.hosts import layouts
from sightline.steer.var import edited_rows

if TYPE_CHECKING:
    from PIL import Image

    from sightline.hosts.geometry import Layout
    from sightline.lvlm import LVLM

SUMM, MIN_NONSINK_RATIO = 0.2, 0.5  # VAR's head test


@dataclass(frozen=True, eq=False)
class Observation:
    """What the prompt of one question looked like. L decoder layers, H heads, V visual tokens."""

    layout: Layout  # where the V tokens lie on the picture
    phi: np.ndarray  # (L, V) float32: sink value entering every layer
    received: np.ndarray  # (L, H, V) float32: attention from the text queries, mean over them
    mass: np.ndarray  # (L, H) float32: attention of the text queries on the picture
    sink_mass: np.ndarray  # (L, H) float32: the part of it on visual sinks
    selected: np.ndarray  # (L, H) float32: share of text queries that pass VAR's head test
    rows: int  # text queries after the picture
    tau: float
    dims: tuple[int, ...]

    @property
    def sinks(self) -> np.ndarray:
        """(L, V) bool: the visual sinks of every layer."""
        return self.phi > self.tau


class Observer(System):
    """Sees the prompt; changes nothing. After a forward, `phi`, `received`, ... are filled, one entry per layer."""

    def __init__(self, tau: float | None = None, sink_dims: tuple[int, ...] | None = None) -> None:
        self.tau, self.sink_dims = tau, sink_dims
        self.tokens: Any = None  # the ledger of the prompt
        self.phi: dict[int, Tensor] = {}  # (B, N)
        self.received: dict[int, Tensor] = {}  # (B, H, N)
        self.tests: dict[int, Tensor] = {}  # (B, H, 3): mass, sink mass, selected

    def prepare(self, shape: Shape) -> None:
        self.tau = default_tau(shape.hidden_size) if self.tau is None else self.tau
        check_tau(self.tau, shape.hidden_size)
        self.sink_dims = sink_dims_of(shape, self.tau) if self.sink_dims is None else tuple(self.sink_dims)

    def hidden(self, site: Site, hidden: Tensor) -> None:
        if site.prefill:
            self.tokens = site.tokens
            self.phi[site.layer] = sink_value(hidden, self.sink_dims)

    def attention(self, site: Site) -> Probe | None:
        if not site.prefill:
            return None
        start = site.tokens.first_after
        rows = self.text_rows(start)  # (B, R)
        self.received.pop(site.layer, None)
        self.tests.pop(site.layer, None)
        return Probe(partial(self.see, site.layer, rows, start), start=start)

    def text_rows(self, start: int) -> Tensor:
        """(B, N - start) bool: queries that are text after the picture."""
        return self.tokens.role[:, start:] == int(Role.AFTER)

    def see(self, layer: int, rows: Tensor, start: int, weights: Tensor, first: int) -> None:
        """Add rows (B, H, R, N) of attention, from query `first` on, to the sums over text queries."""
        mine = rows[:, None, first - start : first - start + weights.shape[2]].to(weights.dtype)  # (B, 1, R)
        visual = self.tokens.visual
        sinks = visual & (self.phi[layer] > self.tau)  # (B, N)
        mass, on_sinks = weights @ _column(visual, weights), weights @ _column(sinks, weights)  # (B, H, R, 1)
        count = visual.sum(1)[:, None, None, None]
        passed = edited_rows(mass, on_sinks, count, rho=1 - MIN_NONSINK_RATIO, summ=SUMM).to(weights.dtype)
        tests = (torch.cat([mass, on_sinks, passed], -1) * mine[..., None]).sum(2)  # (B, H, 3)
        received = (weights * mine[..., None]).sum(2)  # (B, H, N)
        self.tests[layer] = self.tests.get(layer, 0) + tests
        self.received[layer] = self.received.get(layer, 0) + received


def observe(
    lvlm: LVLM,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    tau: float | None = None,
    sink_dims: tuple[int, ...] | None = None,
) -> list[Observation]:
    """Look at the prompts of one batch: one picture and one question each.

    Args:
        lvlm: a loaded model.
        images, questions: of equal length.
        tau, sink_dims: as in VAR; None: the defaults for this model.

    Raises:
        InputError: the lengths differ, or there are none.
        ParameterError: tau can never be exceeded at this model's width.
    """
    observer = Observer(tau, sink_dims)
    inputs = prompts(lvlm, images, questions)
    with attach(lvlm.model, observer, host=lvlm.host):
        prefill(lvlm, inputs)
    places = layouts(lvlm.model, lvlm.processor, inputs, [image.size for image in images], host=lvlm.host)
    return [_observation(observer, b, place) for b, place in enumerate(places)]


def prompts(lvlm: LVLM, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
    """Model inputs of a batch. Raises InputError unless there is one picture per question, and at least one."""
    if isinstance(images, str) or isinstance(questions, str) or not isinstance(images, Sequence):
        raise InputError("pictures and questions come as lists here: [picture], ['Is there a dog?']")
    if not images or len(images) != len(questions):
        raise InputError(f"{len(images)} pictures and {len(questions)} questions: give one picture per question")
    return lvlm.inputs(list(images), list(questions))


def prefill(lvlm: LVLM, inputs: Any) -> None:
    """Run the prompts through the model once."""
    with torch.no_grad():
        lvlm.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)


def _column(member: Tensor, like: Tensor) -> Tensor:
    """(B, N) bool -> (B, 1, N, 1) in the dtype of `like`."""
    return member[:, None, :, None].to(like.dtype)


def _observation(observer: Observer, b: int, layout: Layout) -> Observation:
    columns = observer.tokens.visual[b].nonzero().flatten()
    layers = sorted(observer.phi)
    rows = int(observer.text_rows(0)[b].sum())
    tests = torch.stack([observer.tests[i][b] for i in layers]) / max(rows, 1)  # (L, H, 3)
    mass, on_sinks, passed = tests.float().cpu().unbind(-1)
    return Observation(
        layout=layout,
        phi=torch.stack([observer.phi[i][b, columns] for i in layers]).cpu().numpy(),
        received=(torch.stack([observer.received[i][b][:, columns] for i in layers]) / max(rows, 1)).cpu().numpy(),
        mass=mass.numpy(),
        sink_mass=on_sinks.numpy(),
        selected=passed.numpy(),
        rows=rows,
        tau=float(observer.tau),
        dims=observer.sink_dims,
    )

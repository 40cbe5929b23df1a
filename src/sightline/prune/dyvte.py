"""Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings (DyVTE).

NeurIPS 2025, arXiv 2411.19628. Official code: DoubtedSteam/DyVTE (no licence file).

Visual tokens stop mattering once text has taken up the picture. A small gate per decoder layer looks at the text and says
"exit": all visual tokens leave at once, and deeper layers run and cache text alone. After layer l, x (B, N, D):

    f    = [ mean of x over text after the image but its last token ; x of the last token ]          (B, 2D)
    z    = W2 GELU(W1 f)                        W1 (width, 2D), W2 (2, width), no biases, erf form       (B, 2)
    exit at the first l with z_1 > z_0 (a tie stays); positions keep their values, the gap stays

Gates are asked on the prompt only. They are trained by `sightline.learn.exit_gates`: for a random layer, exit is right
(label 1) iff the answer with the image removed behind it agrees in more than 99 % of its tokens and its loss is below 1.03
of the full one; cross-entropy on the gate alone, the host frozen.

Against the official code: (1) the real image span of every row instead of columns 35..610, so batches, padding and several
pictures work: rows exit one by one. (2) A text of one token counts as its own mean; there NaN. (3) Dropout 0.1 is declared
there and unused; it is left out. (4) Leaving after the last layer saves nothing: that gate is neither asked nor trained.
(5) Never exiting works; there decoding would then fail. (6) One sync with the device per layer until all rows left: whether
to go on is decided by numbers. `gates` has the official names `model.visual_gates_router.<layer>.w1.weight`, `.w2.weight`.

Cost: 2 D width + 2 width multiply-adds per layer and row; width 2048 adds 7 % parameters to a 7B model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.select import Keep
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import InputError, ParameterError

WIDTH = 2048
NAME = "model.visual_gates_router.{}.{}.weight"


class Gate(nn.Module):
    """f (B, 2D) -> logits (B, 2) of staying and leaving."""

    def __init__(self, dim: int, width: int = WIDTH) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, 2, bias=False)
        for layer in (self.w1, self.w2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Tensor) -> Tensor:
        return gate(features, self.w1.weight, self.w2.weight)


def gate(features: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """(B, 2D), (width, 2D), (2, width) -> (B, 2). Equal rows of W2 give equal numbers: a tie is a tie."""
    return (F.gelu(F.linear(features, w1))[:, None] * w2).sum(-1)  # a matrix product sums its columns in other orders


def features(hidden: Tensor, text: Tensor) -> Tensor:
    """What a gate sees.

    Args:
        hidden: (B, Q, D) output of a decoder layer. text: (B, Q) bool, the text after the image.

    Returns:
        (B, 2D): mean of all text tokens but the last, then the last one. Zero for a row without text.
    """
    order = torch.arange(text.shape[1], device=text.device)
    last = torch.where(text, order, -1).amax(1)  # (B,)
    rest = text & (order != last[:, None])
    rest = torch.where(rest.any(1, keepdim=True), rest, text)  # one token: its own mean
    weight = rest.to(hidden.dtype)[..., None]
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    final = hidden.gather(1, last.clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
    return torch.cat([mean, final.masked_fill(last[:, None] < 0, 0.0)], -1)


def text_of(site: Site) -> Tensor:
    """(B, Q) bool: the block's text after the image; where labels are given, without the answer."""
    text = site.tokens.role[:, site.start :] == int(Role.AFTER)
    labels = site.labels
    if labels is None:
        return text
    if site.columns is not None:
        column = site.columns[:, site.start :] - (site.whole.shape[1] - labels.shape[1])
        labels = labels.gather(1, column.clamp(min=0))
    return text & (labels < 0)


@system(
    "dyvte",
    kind="prune",
    paper=Paper(
        title="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
        authors="Wu, Qiong and Lin, Wenhao and Zhou, Yiyi and Ye, Weihao and Zeng, Zhanpeng and Sun, Xiaoshuai and "
        "Ji, Rongrong",
        venue="NeurIPS",
        year=2025,
        arxiv="2411.19628",
        code="DoubtedSteam/DyVTE",
    ),
    summary="lets all image tokens leave at the layer where a trained gate finds that text has taken up the picture",
    published=(("LLaVA-1.5, abstract: computation saved without loss of accuracy", "up to 45.7 %"),),
)
@dataclass(frozen=True)
class DyVTE(System):
    """Dynamic visual-token exit. Needs trained gates, or a fixed layer."""

    gates: str | None = param(None, "file (.safetensors) of trained gates, one per decoder layer")
    exit_layer: int | None = param(
        None, "leave after this decoder layer (0-based) whatever gates say; -1: never; none: the gates decide", low=-1
    )

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.exit_layer == -1

    def prepare(self, shape: Shape) -> dict[str, Any]:
        if self.exit_layer is not None:
            if self.exit_layer >= shape.layers:
                raise ParameterError(
                    f"dyvte: exit_layer={self.exit_layer}: the decoder has {shape.layers} layers; choose one in "
                    f"[-1, {shape.layers - 1}]"
                )
            return {"gates": [], "layers": shape.layers}
        if self.gates is None:
            raise ParameterError(
                "dyvte needs trained gates: give gates=<file.safetensors> (made by sightline.learn.exit_gates.train), or "
                "exit_layer=<layer> to leave at a fixed one"
            )
        return {"gates": load_gates(self.gates, shape.layers, shape.hidden_size), "layers": shape.layers}

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        layer = site.layer - 1  # whose output this is
        if layer < 0:
            return None
        visual = site.tokens.visual[:, site.start :]  # (B, Q)
        if layer == 0:
            site.tally.setdefault("rows", []).append(visual.any(1).sum())
        if self.exit_layer is not None:
            if layer != self.exit_layer:
                return None
            leaves = visual.any(1)
        else:
            text = text_of(site)
            w1, w2 = (w.to(hidden) for w in site.setup["gates"][layer])
            site.setup["gates"][layer] = (w1, w2)
            z = gate(features(hidden.detach(), text), w1, w2)  # (B, 2)
            leaves = (z[:, 1] > z[:, 0]) & text.any(1) & visual.any(1)
        site.tally.setdefault(layer, []).append(leaves.sum())
        return Keep(~(visual & leaves[:, None]), "keep")

    def report(self, tally: dict[Any, Any], setup: dict[str, Any]) -> dict[str, Any]:
        total = {k: int(torch.stack(v).sum()) for k, v in tally.items()}
        rows = total.pop("rows", 0)
        exits = {layer: count for layer, count in sorted(total.items()) if count}
        stayed = rows - sum(exits.values())
        depth = sum((layer + 1) * count for layer, count in exits.items()) + stayed * setup["layers"]
        return {
            "samples": rows,
            "exits": {str(layer): count for layer, count in exits.items()},  # layer after which -> samples
            "mean_layers_with_image": depth / rows if rows else float(setup["layers"]),
        }


def load_gates(path: str, layers: int, hidden: int) -> list[tuple[Tensor, Tensor]]:
    """(W1, W2) of every layer.

    Raises:
        InputError: the file cannot be read, or its gates are for another model.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"dyvte: gates={path!r} is not a file: train gates with sightline.learn.exit_gates.train")
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise InputError(f"dyvte: {path} cannot be read as safetensors ({error})") from error
    pairs = []
    for layer in range(layers):
        w1, w2 = (found.get(NAME.format(layer, name)) for name in ("w1", "w2"))
        if w1 is None or w2 is None or w1.shape[1] != 2 * hidden or w2.shape != (2, w1.shape[0]):
            raise InputError(
                f"{path} has no gate for layer {layer} of a decoder of {layers} layers and width {hidden}: these gates "
                "were trained for another model"
            )
        pairs.append((w1, w2))
    return pairs

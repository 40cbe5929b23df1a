"""PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction.

CVPR 2025, arXiv 2410.17247. Official code: Cooperx521/PyramidDrop (MIT).

The decoder is split into stages. Before layer l_s of `layer_list` the image tokens still there are ranked by what the last
instruction token would give them in that very layer, and a fixed share of the ORIGINAL number V_0 goes on:

    w_j   = mean_h softmax(q_r K^T / sqrt(d))_j             rows r, over all keys, layer l_s on all its tokens (B, H, R, M)
    s_j   = mean_r w_j                                      j: image tokens
    keep    int(V_0 rho_s) largest s_j, in their old order  rho: `image_token_ratio_list`

Rows r: the last prompt token; in training, for every answer the token just before its first supervised one. Positions are
renumbered without gaps at every stage; caches of earlier stages keep their tokens. Training works by attaching the system
while the host's own trainer runs: the ranking has no gradient, the kept tokens have theirs.

Against the official code: (1) grouped-query heads, padding on either side, SDPA with masks and eager attention work. (2) It
takes one image span per sample; here every picture is ranked within its own budget, or all of a sample together with
`per_image=False`. (3) It cuts sequences to 2048 tokens again after every stage; here nothing but image tokens is dropped.
(4) Labels decide the rows wherever they are given, also outside training mode: the answer never ranks its own picture.
(5) Equal scores: the earlier token stays. (6) `layer_list` none scales 8/16/24 of 32 layers to the depth; the released
scripts use 8/16/24 for 40 layers, too.

Cost per stage: the projections of one layer over the M tokens before the cut, and R rows of attention; no M x M map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.select import Keep, best_in_parts
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import ParameterError

IGNORE = -100  # label of tokens that are not supervised


def scores(weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """What the asking rows give to every token: (B, H, R, M) attention weights -> (B, M) fp32.

    rows: (B, R) bool, which of them count; None: all.
    """
    mean = weights.float().mean(1)  # (B, R, M)
    if rows is None:
        return mean.mean(1)
    return (mean * rows[..., None]).sum(1) / rows.sum(1).clamp(min=1)[:, None]


def kept(scores: Tensor, image: Tensor, totals: Tensor, ratio: float) -> Tensor:
    """(B, M) bool: the int(V_0 ratio) best image tokens of every picture.

    Args:
        scores: (B, M). image: (B, M) int, which picture a token belongs to; negative: text, never dropped.
        totals: (B, P) int, how many tokens every picture had at first.
    """
    counts = (totals.double() * ratio).long()  # truncated as Python's int() does
    return best_in_parts(scores, image, counts) | (image < 0)


def asking_rows(labels: Tensor, real: Tensor) -> Tensor:
    """(B, Q) bool: tokens just before the first supervised token of every answer; labels (B, Q), real (B, Q) no padding."""
    begins = (labels[:, 1:] != IGNORE) & (labels[:, :-1] == IGNORE) & real[:, :-1]
    return torch.nn.functional.pad(begins, (0, 1))


@system(
    "pyramiddrop",
    kind="prune",
    paper=Paper(
        title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        authors="Xing, Long and Huang, Qidong and Dong, Xiaoyi and Lu, Jiajie and Zhang, Pan and Zang, Yuhang and "
        "Cao, Yuhang and He, Conghui and Wang, Jiaqi and Wu, Feng and Lin, Dahua",
        venue="CVPR",
        year=2025,
        arxiv="2410.17247",
        code="Cooperx521/PyramidDrop",
        licence="MIT",
    ),
    summary="drops image tokens in stages inside the language model, by what the last instruction token looks at",
    published=(
        ("LLaVA-1.5-7B, training-free: TFLOPs of the image tokens", "3.82 -> 1.78"),
        ("LLaVA-1.5-7B, training-free: MME / GQA / POPE / TextVQA", "1510.7/62.0/85.9/58.2 -> 1500.8/60.1/84.8/57.5"),
        ("LLaVA-1.5-7B, trained with it: MME / GQA / POPE", "1467.3 / 61.9 / 86.0; 104 -> 79 GPU hours"),
    ),
)
@dataclass(frozen=True)
class PyramidDrop(System):
    """Staged drop of image tokens inside the language model, at inference and in training."""

    layer_list: tuple[int, ...] | None = param(
        None,
        "decoder layers (0-based) before which tokens are dropped, rising; none: 1/4, 2/4, 3/4 of the depth",
        low=1,
    )
    image_token_ratio_list: tuple[float, ...] = param(
        (0.5, 0.25, 0.125),
        "share of the original image tokens that goes on at each; all 1 changes nothing",
        low=0,
        high=1,
    )
    per_image: bool = param(True, "rank every picture within its own budget; false: all pictures of a sample together")

    def __post_init__(self) -> None:
        check_parameters(self)
        layers, ratios = self.layer_list, self.image_token_ratio_list
        if list(ratios) != sorted(ratios, reverse=True) or not ratios:
            raise ParameterError(f"pyramiddrop: image_token_ratio_list={ratios} must not rise, e.g. (0.5, 0.25, 0.125)")
        if layers is not None and (len(layers) != len(ratios) or sorted(set(layers)) != list(layers)):
            raise ParameterError(
                f"pyramiddrop: layer_list={layers} must rise, with one layer for each of {len(ratios)} ratios"
            )

    def idle(self) -> bool:
        return all(ratio == 1 for ratio in self.image_token_ratio_list)

    def prepare(self, shape: Shape) -> dict[int, float]:
        """{layer: ratio}"""
        stages = len(self.image_token_ratio_list)
        even = tuple(max(1, round(shape.layers * s / (stages + 1))) for s in range(1, stages + 1))
        layers = even if self.layer_list is None else self.layer_list
        if max(layers) >= shape.layers or len(set(layers)) < stages:
            raise ParameterError(
                f"pyramiddrop: layers {layers} do not suit a decoder of {shape.layers} layers: choose layer_list in "
                f"[1, {shape.layers - 1}], one for each of {stages} ratios"
            )
        return dict(zip(layers, self.image_token_ratio_list, strict=True))

    def cut(self, site: Site, hidden: Tensor) -> Keep | None:
        ratio = site.setup.get(site.layer)
        if ratio is None:
            return None
        role = site.tokens.role[:, site.start :]  # (B, Q)
        image = site.tokens.image[:, site.start :].long()
        image = image if self.per_image else image.clamp(max=0)
        rows = self._rows(site, role)
        width = int(rows.sum(1).max())
        queries = rows.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]  # (B, R)
        asked = rows.gather(1, queries)
        weights = site.cuts.rows(torch.where(asked, queries, -1))[..., site.start :]  # (B, H, R, Q)
        keep = kept(scores(weights, asked), image, self._totals(site), ratio)
        keep = keep | ~rows.any(1, keepdim=True)  # nobody asks
        visual = role == int(Role.IMAGE)
        site.tally.setdefault(site.layer, []).append(torch.stack([visual.sum(), (visual & keep).sum()]))
        return Keep(keep, "renumber")

    def _rows(self, site: Site, role: Tensor) -> Tensor:
        """(B, Q) bool: the tokens that rank."""
        real = (role != int(Role.PAD)) & (role != int(Role.GENERATED))
        if site.labels is None:
            order = torch.arange(role.shape[1], device=role.device)
            return real & (order == torch.where(real, order, -1).amax(1, keepdim=True))
        labels = site.labels
        if site.columns is not None:
            column = site.columns[:, site.start :] - (site.whole.shape[1] - labels.shape[1])
            labels = labels.gather(1, column.clamp(min=0)).masked_fill(column < 0, IGNORE)
        return asking_rows(labels, real)

    def _totals(self, site: Site) -> Tensor:
        """(B, P) image tokens of every picture before anything was dropped."""
        image = site.whole.image.long()
        image = image if self.per_image else image.clamp(max=0)
        known = site.state.get("totals")
        if known is None or known[0] is not site.whole:
            pictures = int(image.max()) + 1
            totals = torch.nn.functional.one_hot(image + 1, pictures + 1)[..., 1:].sum(1)
            known = site.state["totals"] = (site.whole, totals)
        return known[1]

    def report(self, tally: dict[Any, Any], setup: dict[int, float]) -> dict[str, Any]:
        layers = sorted(tally)
        counts = [torch.stack(tally[layer]).sum(0).tolist() for layer in layers]
        return {
            "layers": layers,  # before which tokens were dropped
            "image_tokens_before": [before for before, _ in counts],
            "image_tokens_after": [after for _, after in counts],
        }

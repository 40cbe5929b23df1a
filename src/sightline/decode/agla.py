"""AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention.

CVPR 2025, arXiv 2406.12718. Official code: Lackel/AGLA (no licence stated).

An image-text matcher says which pixels matter for the question; the others are blacked out; and the scores of the whole and
of the masked picture are added under a plausibility cut by the whole one:

    c      = 1/(T-2) sum_{t=1..T-2} mean_h A_t relu(dA_t)      Grad-CAM of the match score at one cross-attention, (h, w)
    c      scaled to [0, 1], resized to S x S (cubic spline, zeros outside), blurred (sigma 0.02 S), scaled again; S = 384
    rho    = min(1 - s / 2, 1 - 1e-5)                          s in [-1, 1]: similarity of picture and question
    keep   = c >= the (S S rho)-th largest value               share of pixels that stay, at least a half
    L*     = L + alpha L_masked   where L >= log(beta) + max L, else -inf                                      (B, V)

The sum is not normalised: with alpha = 2 it is as sharp as one model at a third of the temperature, as in the release.

`matcher`: "tiny" is bundled and knows the generated world only; any BLIP retrieval checkpoint of transformers goes by its
name, for example Salesforce/blip-itm-large-coco (the paper's; cross-attention block 6).

Against the official code: (1) the mask is laid over the picture in its own size, where the release squeezes every picture to
384 x 384 first; a picture of that size gives the same. (2) A constant map is 0/0 after the blur there; here it keeps
everything. (3) With several pictures in a prompt each has its own map.

Cost: the matcher once per picture and question, a second prefill, and two rows per token instead of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.decode.contrast import weigh
from sightline.engine.prompts import Prompt
from sightline.engine.system import Site, System

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 384  # pixels of the map
BLUR = 0.02  # sigma, in sides


def gradcam(attention: Tensor, gradient: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean relevance of the patches for the words of a text.

    Args:
        attention, gradient: (B, H, T, 1 + P) of the cross-attention; the class token of the picture comes first.
        mask: (B, T) 1 for real tokens; the first and the last real one are marks of the text's beginning and end.
        grid: (h, w) with h w = P.

    Returns:
        (B, h, w).
    """
    cam = attention[..., 1:] * gradient[..., 1:].clamp(min=0) * mask[:, None, :, None]
    cam = cam.mean(1)  # (B, T, P)
    count = mask.sum(1) - 2
    place = torch.arange(mask.shape[1], device=mask.device)
    words = (place >= 1) & (place <= count[:, None])
    return ((cam * words[..., None]).sum(1) / count[:, None]).unflatten(-1, grid)


def relevance(cam: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(side, side) map in [0, 1] from a Grad-CAM (h, w): resized by cubic splines and blurred. A constant gives ones."""
    cam = np.asarray(cam, dtype=np.float64)
    cam = cam - cam.min()
    if cam.max() > 0:
        cam = cam / cam.max()
    large = np.clip(spline_matrix(cam.shape[0], side) @ cam @ spline_matrix(cam.shape[1], side).T, cam.min(), cam.max())
    smooth = blur_matrix(side, BLUR * side)
    found = smooth @ large @ smooth.T
    found -= found.min()
    return found / found.max() if found.max() > 0 else np.ones_like(found)


def keep_ratio(similarity: float) -> float:
    """rho: the share of pixels that stay, from the similarity of picture and text in [-1, 1]."""
    return min(1 - similarity / 2, 1 - 1e-5)


def keep_mask(cam: np.ndarray, similarity: float, side: int = SIDE, ratio: float | None = None) -> np.ndarray:
    """(side, side) bool: the pixels that stay; `ratio`: their share, instead of the one by similarity."""
    found = relevance(cam, side)
    largest = -np.sort(-found, axis=None)
    ratio = keep_ratio(similarity) if ratio is None else ratio
    return found >= largest[min(int(side * side * ratio), side * side - 1)]


def masked(picture: Image, keep: np.ndarray) -> Image:
    """The picture with the other pixels black; `keep` is stretched onto it."""
    from PIL import Image

    mask = Image.fromarray(keep).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), mask)


def assemble(logits: Tensor, local: Tensor, *, alpha: float, beta: float) -> Tensor:
    """L* (..., V) from the scores of the whole picture and of the masked one; -inf for implausible tokens."""
    return weigh(logits, local, first_weight=1, second_weight=alpha, beta=beta)


@lru_cache(maxsize=16)
def spline_matrix(size: int, side: int) -> np.ndarray:
    """(side, size): cubic B-spline interpolation of `size` samples at `side` pixel centres, zeros beyond the samples."""
    border = 12  # zeros on either side; a spline's influence falls by 0.27 a sample
    n = size + 2 * border
    samples = np.eye(n) * (4 / 6) + (np.eye(n, k=1) + np.eye(n, k=-1)) / 6  # spline weights -> values
    samples[0, 1] = samples[-1, -2] = 2 / 6  # mirrored ends
    weights = np.linalg.inv(samples)[:, border : border + size]  # (n, size)
    place = (np.arange(side) + 0.5) * size / side - 0.5 + border
    away = np.abs(place[:, None] - np.arange(n))  # (side, n)
    near, far = 2 / 3 - away**2 + away**3 / 2, np.clip(2 - away, 0, None) ** 3 / 6
    return np.where(away < 1, near, far) @ weights


@lru_cache(maxsize=4)
def blur_matrix(side: int, sigma: float) -> np.ndarray:
    """(side, side): Gaussian blur of a row, cut at four sigmas, mirrored at the ends (the end sample twice)."""
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    found = np.zeros((side, side))
    for i in range(side):
        place = np.mod(i + np.arange(-radius, radius + 1), 2 * side)
        np.add.at(found[i], np.where(place < side, place, 2 * side - 1 - place), kernel)
    return found


@system(
    "agla",
    kind="decode",
    paper=Paper(
        title="Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention",
        authors="An, Wenbin and Tian, Feng and Leng, Sicong and Nie, Jiahao and Lin, Haonan and Wang, QianYing and Dai, Guang "
        "and Chen, Ping and Lu, Shijian",
        venue="CVPR",
        year=2025,
        arxiv="2406.12718",
        code="Lackel/AGLA",
        licence="none stated",
    ),
    summary="adds the scores of a view in which only what matters for the question is left",
    published=(
        ("POPE accuracy / F1, LLaVA-1.5, random, mean of three data sets", "83.49/82.28 -> 88.54/87.71"),
        ("POPE accuracy / F1, LLaVA-1.5, adversarial", "76.03/76.26 -> 81.13/81.36"),
    ),
)
@dataclass(frozen=True)
class AGLA(System):
    """Assembly of global and local attention. A matching model and a second stream; no training of the model."""

    alpha: float = param(2.0, "weight of the masked picture's scores", low=0)
    beta: float = param(0.5, "tokens less likely than this share of the likeliest are cut; 0 cuts none", low=0, high=1)
    matcher: str = param("tiny", "image-text matcher: tiny (bundled, generated world), or a BLIP retrieval checkpoint")
    ratio: float | None = param(
        None, "share of pixels that stay; none: by the similarity, at least a half", low=0, high=1
    )
    block: int = param(6, "cross-attention block of a BLIP matcher that is read", low=0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any] | None:
        """The same questions about pictures in which only what matters is left."""
        if not site.tokens.has_image:
            return None
        from sightline.matching import load_matcher

        note = prompt.note
        if not any(note.pictures):  # a video of the host's own kind: no picture to mask
            return None
        matcher = load_matcher(self.matcher, self.block, site.tokens.role.device)
        rows = [
            [self._mask(site, matcher, picture, question) for picture in row]
            for row, question in zip(note.pictures, note.questions, strict=True)
        ]
        seeing = torch.tensor([len(row) > 0 for row in note.pictures], device=site.tokens.role.device)
        site.state["seeing"] = seeing.repeat_interleave(prompt.repeats)[:, None]  # (B, 1)
        return prompt.ask(note.questions, rows)

    def _mask(self, site: Site, matcher: Any, picture: Image, question: str) -> Image:
        similarity, cam = matcher.look(picture, question)
        keep = keep_mask(cam, similarity, ratio=self.ratio)
        site.tally.setdefault("kept", []).append(float(keep.mean()))
        site.tally.setdefault("similarity", []).append(float(similarity))
        return masked(picture, keep)

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        return torch.where(site.state["seeing"], assemble(logits, second, alpha=self.alpha, beta=self.beta), logits)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        kept, similarity = tally.get("kept", []), tally.get("similarity", [])
        mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
        return {"pictures": len(kept), "mean_share_kept": mean(kept), "mean_similarity": mean(similarity)}

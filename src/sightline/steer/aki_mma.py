"""Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs (AKI, MMA).

arXiv 2503.02597. Official code: sony/aki (CC BY-NC 4.0), weights Sony/AKI-4B-phi-3.5-mini.

In a decoder the picture comes before the question, so its tokens never see what is asked. Modality-mutual attention opens
the mask for that: with visual tokens at columns a..b-1 and the question at b..e-1,

    M = causal,    M[a:b, b:e] = 1,    columns of padding 0                                   (S, S), 1 = may attend

Text stays causal, and the answer (from e on) is hidden from the picture. In the prompt and in training, all layers and
heads; while generating, every new token sees all that came before, as ever. No parameter. **Weights must have been trained
with it**: on others it is off their distribution, and answers get worse.

The question ends with the prompt: the assistant's marker is inside the span, as in the official code. In training it ends
where the first supervised token stands (`labels`), so nothing of an answer leaks.

Against the official code: (1) it holds for one picture and the first assistant marker; here every visual token sees all
text between itself and the first answer, other pictures' tokens never. (2) Masks per row, whatever the padding.

Cost: (b-a)(e-b) more pairs, one (B, 1, Q, Q) boolean mask per prompt, and the fast kernel with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import warn


def modality_mutual_mask(real: Tensor, image_begin: int, image_end: int, question_end: int) -> Tensor:
    """The mask of one sample.

    Args:
        real: (S,) 1 where there is a token, 0 where padding.
        image_begin, image_end, question_end: a, b and e above.

    Returns:
        (S, S) bool, True where the query (row) may attend to the key. Rows of padding keep their causal pattern.
    """
    allowed = torch.ones(len(real), len(real), dtype=torch.bool, device=real.device).tril()
    allowed[image_begin:image_end, image_end:question_end] = True
    return allowed & real.bool()[None]


def question_of(role: Tensor, limit: int | None = None) -> Tensor:
    """(B, N) bool: text after the first picture and before the first answer, its first `limit` tokens per row."""
    answered = (role == int(Role.GENERATED)).cumsum(1) > 0
    question = (role == int(Role.AFTER)) & ~answered
    return question if limit is None else question & (question.cumsum(1) <= limit)


@system(
    "aki-mma",
    kind="steer",
    paper=Paper(
        title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
        authors="Wang, Wei-Yao and Wang, Zhao and Suzuki, Helen and Kobayashi, Yoshiyuki",
        venue="arXiv",
        year=2025,
        arxiv="2503.02597",
        code="sony/aki",
        licence="CC BY-NC 4.0",
    ),
    summary="lets visual tokens attend to the question behind them; for weights trained with it",
    needs=("image_tokens", "trained weights"),
    published=(
        ("POPE, same set-up, causal 79.8", "82.7 (repository's table)"),
        ("MMBench, same set-up, causal 64.9", "71.8 (repository's table)"),
    ),
)
@dataclass(frozen=True)
class AKIMMA(System):
    """Modality-mutual attention. For weights trained with it; train them with `sightline train ... --with aki-mma`."""

    question: int | None = param(None, "question tokens that a picture sees, from the first; none: all; 0: none", low=0)
    trained: bool = param(False, "the weights were trained with it: do not warn")

    everywhere = True

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.question == 0

    def prepare(self, shape: Shape) -> None:
        if not self.trained and not self.idle():
            warn(
                "aki-mma changes the mask: only weights trained with it answer well under it "
                "(Sony/AKI-4B-phi-3.5-mini, or your own; aki-mma:trained=true says that these are)",
            )

    def mask(self, site: Site, allowed: Tensor) -> Tensor | None:
        tokens = site.tokens
        if not tokens.has_image:
            return None
        question = question_of(tokens.role, self.question)  # (B, N)
        visual = tokens.visual[:, site.start :]  # (B, Q)
        columns = torch.arange(tokens.shape[1], device=question.device)
        later = columns > columns[site.start :, None]  # (Q, N)
        opened = visual[:, :, None] & question[:, None] & later
        site.tally.setdefault("pairs", []).append(opened.sum())
        return allowed | opened[:, None]

    def report(self, tally: dict[Any, Any], setup: None) -> dict[str, Any]:
        return {"pairs_opened": int(sum(tally.get("pairs", [])))}

"""VDGD: Visual Description Grounding Reduces Hallucinations and Boosts Reasoning in LVLMs.

ICLR 2025, arXiv 2405.15683. Official code: Sreyan88/VDGD (Apache-2.0).

The model first describes the picture for the task; the description goes before the question; and while answering, of the
plausible next tokens those are preferred that lie closest to some position of the description:

    E_j     raw scores of description token j = 1..n                                        (n, V)
    L       scores after "The input image is described as follows: {D} {question}"          (B, V)
    C       plausible tokens of L (see `candidates`)
    d_j(v)  = KL(onehot(v) || softmax(E_j)) = -log softmax(E_j)[v]
    score   = -reduction_j d_j(v) for v in C, -inf elsewhere;  reduction: min, avg or sum over j

`scale="paper"` (default): C = {v : p(v) >= alpha max p}. `scale="release"`: C is the nucleus `top_p` of L / `temperature`,
and the score is divided by the vocabulary's size V: torch's kl_div with "batchmean" does so to a vector, which makes the
choice among C almost uniform. Which of the two gave the published table is not known.

`use_dd` debiases the description: what a text-only amateur model would write without the picture is subtracted,

    L_D     = (1 + dd_alpha) E_j - dd_alpha L_text   where E_j >= log(dd_beta) + max E_j, -inf elsewhere

with L_text (V,) the amateur's scores behind the description's request: as released the amateur reads the request alone, never
what was written behind it. `amateur` names a language model with the same vocabulary; none: the model itself, without the
picture. The E_j that are kept stay the raw ones.

Against the official code: (1) the whole prefix is not run anew for every token. (2) For "min" a running minimum over j is
kept, (B, V), for the others the sum; never (n, V). (3) `description` takes a text that any model wrote; it is scored by one
forward of the description prompt with that text behind it. (4) The first stream still reads the question as it was asked:
`record` shows it, and rows without a picture are answered by it.

Cost: the description (a generation of its own), a second prefill, and two rows per token instead of one; `use_dd` one more
prompt without the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.decode.contrast import plausible, weigh
from sightline.engine.prompts import Prompt
from sightline.engine.system import Site, System
from sightline.errors import ParameterError

DESCRIBE = (
    "I have been given an image to complete the task described as: {question}\n\nTo help me complete the task, describe the "
    "given image in detail: for scenes, all objects in the foreground and background, their properties, relations and "
    "counts; for charts, graphs and tables, all numbers, all written text and every other detail."
)
DESCRIBED = "The input image is described as follows: {description} {question}"
Reduction = Literal["min", "avg", "sum"]


def nucleus(logits: Tensor, *, top_p: float = 0.5, temperature: float = 0.5) -> Tensor:
    """(..., V) bool: the most likely tokens of softmax(logits / temperature) that together hold `top_p`; at least one."""
    ordered, index = (logits / temperature).sort(-1)
    low = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    low[..., -1] = False
    return ~low.scatter(-1, index, low)


def distances(description_logits: Tensor, reduction: Reduction = "min") -> Tensor:
    """(V,) reduction over j of d_j(v): raw scores (n, V) of the description's tokens, n >= 1."""
    away = -description_logits.float().log_softmax(-1)
    return {"min": lambda: away.amin(0), "avg": lambda: away.mean(0), "sum": lambda: away.sum(0)}[reduction]()


def rescore(candidates: Tensor, distance: Tensor, *, scale: Literal["paper", "release"] = "release") -> Tensor:
    """(..., V) new scores: minus the distance on the candidates, -inf elsewhere; "release" divides by V."""
    scores = -distance / distance.shape[-1] if scale == "release" else -distance
    return scores.expand(candidates.shape).masked_fill(~candidates, -torch.inf)


@system(
    "vdgd",
    kind="decode",
    paper=Paper(
        title="Visual Description Grounding Reduces Hallucinations and Boosts Reasoning in LVLMs",
        authors="Ghosh, Sreyan and Evuru, Chandra Kiran Reddy and Kumar, Sonal and Tyagi, Utkarsh and Nieto, Oriol and Jin, "
        "Zeyu and Manocha, Dinesh",
        venue="ICLR",
        year=2025,
        arxiv="2405.15683",
        code="Sreyan88/VDGD",
        licence="Apache-2.0",
    ),
    summary="the model describes the picture first, then prefers tokens that its description supports",
    published=(("VaLLu, GPT-4 score 1-5, LLaVA-1.5", "2.03 -> 2.64"), ("MathVista, LLaVA-1.5", "1.65 -> 2.19")),
)
@dataclass(frozen=True)
class VDGD(System):
    """Visual description grounded decoding. No training; a description and a second stream."""

    reduction: Literal["min", "avg", "sum"] = param("min", "over the description's tokens")
    scale: Literal["paper", "release"] = param("paper", "paper: plausible tokens, -KL; release: nucleus, -KL / V")
    alpha: float = param(
        0.1, "paper: a candidate has at least this share of the likeliest token's probability", low=0, high=1
    )
    top_p: float = param(0.5, "release: mass of the nucleus", low=0, high=1)
    temperature: float = param(0.5, "release: temperature of the nucleus", low=1e-4)
    description_tokens: int = param(1024, "longest description; 0 changes nothing", low=0)
    description: str | None = param(None, "the description, when it is given; none: the model writes it")
    use_dd: bool = param(False, "weigh the description against a model that does not see the picture")
    dd_alpha: float = param(1.0, "strength of that contrast", low=0)
    dd_beta: float = param(
        0.1, "a word of it has at least this share of the likeliest one's probability", low=0, high=1
    )
    amateur: str | None = param(None, "a causal language model with the same vocabulary; none: this model, blind")

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.description_tokens == 0

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any] | None:
        """Have the pictures described, and put the descriptions before the questions."""
        if not site.tokens.has_image:
            return None
        note = prompt.note
        seeing = prompt.tokens.visual.any(1)[:: prompt.repeats].tolist()
        requests = [DESCRIBE.format(question=question) for question in note.questions]
        request = prompt.ask(requests)
        if self.description is None:
            texts, logits = prompt.write(request, self.description_tokens, self._debias(prompt, request, requests))
        else:
            texts, logits = prompt.read(request, self.description)
        device = site.tokens.role.device
        rows = [distances(row, self.reduction) if len(row) else None for row in logits]
        none = torch.zeros(logits[0].shape[-1], device=device)
        site.state["distance"] = torch.stack([none if r is None else r for r in rows])  # (B', V)
        site.state["grounded"] = torch.tensor(
            [s and r is not None for s, r in zip(seeing, rows, strict=True)], device=device
        )
        site.tally.setdefault("descriptions", []).extend(t for t, s in zip(texts, seeing, strict=True) if s)
        asked = zip(note.questions, texts, seeing, strict=True)
        return prompt.ask([DESCRIBED.format(description=t, question=q) if s else q for q, t, s in asked])

    def _debias(
        self, prompt: Prompt, request: Mapping[str, Any], requests: Sequence[str]
    ) -> Callable[[Tensor], Tensor] | None:
        """How the scores (B', V) of a description's token are weighed against the amateur's; None: not at all."""
        if not self.use_dd or self.dd_alpha == 0 == self.dd_beta:
            return None
        if self.amateur is None:
            blind = prompt.scores(prompt.blind(request))
        else:
            from sightline.amateur import next_scores

            blind = next_scores(self.amateur, requests, prompt.tokens.role.device)
        weights = {"first_weight": 1 + self.dd_alpha, "second_weight": -self.dd_alpha, "beta": self.dd_beta}

        def weighed(scores: Tensor) -> Tensor:
            if blind.shape[-1] != scores.shape[-1]:
                raise ParameterError(
                    f"amateur={self.amateur!r} has a vocabulary of {blind.shape[-1]} tokens, this model one of "
                    f"{scores.shape[-1]}: choose a language model with the same vocabulary, or none"
                )
            return weigh(scores, blind.to(scores.dtype), **weights)

        return weighed

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        """The second stream's candidates by their distance to the description; the first stream's scores without one."""
        repeats = len(logits) // len(site.state["grounded"])
        distance = site.state["distance"].repeat_interleave(repeats, 0)
        grounded = site.state["grounded"].repeat_interleave(repeats)[:, None]
        if self.scale == "paper":
            new = rescore(plausible(second, self.alpha), distance, scale="paper")
        else:
            new = rescore(nucleus(second, top_p=self.top_p, temperature=self.temperature), distance)
        return torch.where(grounded, new, logits)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        return {"descriptions": list(tally.get("descriptions", []))}

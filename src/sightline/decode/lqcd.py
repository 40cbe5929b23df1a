"""LQCD: Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models (leading query contrastive decoding).

arXiv 2408.11261 (v2: "Sycophancy in Vision-Language Models: A Systematic Analysis and an Inference-Time Mitigation
Framework"). No official code was found. The contrast is the paper's, as arXiv 2411.15287 quotes it; the cut and the scaler are
named in v2's abstract, and take the customary form here.

A leading question ("There is a dog in the image, right?") drags the answer along. The same picture is read with a neutral
query x_N and with a leading one x_L, and what the lead adds is subtracted:

    L_N = scores after (v, x_N, y_<t),  L_L = scores after (v, x_L, y_<t)                                       (B, V)
    L*  = (1 + s alpha) L_N - s alpha L_L   where L_N >= log(beta) + max L_N, else -inf

A question that leads gets its neutral form for a second stream (then that stream is L_N); a question that does not lead
gets the lead appended (then the second stream is L_L), so that the method can always be on. s in [0, 1] is the strength of
the lead in the user's question (v2's sentiment scaler): by default 1; `scaled` takes it from the wording, 0 for a question
that does not lead.

Where the paper has a language model rewrite the query, `neutral_form` here knows the English patterns of leading questions:
tags ("..., right?", "... isn't there?"), stated beliefs ("I think ...", "I'm sure that ..."), statements ending in a
question mark. Questions behind an opening ("Based on the image, is there ...") and alternatives ("... yes or no?") are neutral.

Cost: a second prefill with all tokens (encoded pictures are used again) and two rows per token instead of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.decode.contrast import plausible
from sightline.engine.prompts import Prompt
from sightline.engine.system import Site, System

AUXILIARY = "is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|must|might|may"
BELIEF = re.compile(
    r"^\s*(?:(?:i|we)(?:'m| am|'re| are| do not| don't)? (?:quite |really |pretty |very |absolutely |almost )*"
    r"(?:think|believe|guess|suppose|assume|bet|know|sure|certain|confident|positive|convinced)"
    r"|surely|obviously|clearly|certainly|of course|it is (?:obvious|clear)|everyone (?:knows|can see))"
    r"(?:,)? (?:that )?",
    re.IGNORECASE,
)
TAG = re.compile(
    r"(?:\s*[,;.]\s*|(?<!\bthe)(?<!\bor)(?<!\band)(?<!\bon)(?<!\bto)(?<!\bis)(?<!\bare)(?<!\bthat)(?<!\ball)\s+)"
    r"(?:right|correct|yes|no|true|okay|ok|don't you (?:think|agree|see it)|wouldn't you (?:say|agree)"
    rf"|(?:can't|won't|(?:{AUXILIARY})(?:n't)?) (?:it|there|they|he|she|we|you|this|that|these|those)(?: not)?)\s*\?\s*$",
    re.IGNORECASE,
)
CHOICE = re.compile(r"\bor\s+[^,;.?!]+\?\s*$", re.IGNORECASE)  # "There is a dog, yes or no?"
VERB = re.compile(
    r"^(.*?)\s+(?:(is|are|was|were|has|have|could|would|should|must|might|may)(?:n't)?|(can|will|wo)(?:'t|n't)?)\s+(.*)$",
    re.IGNORECASE,
)
WH = "what|which|who|whose|whom|where|when|why|how"
ASKS = re.compile(
    rf"^(?:{WH}|{AUXILIARY}|describe|list|name|tell|count|explain|give|write|please)\b(?!'t)", re.IGNORECASE
)
ENDS_ASKING = re.compile(rf"\b(?:{WH})\s*\?\s*$", re.IGNORECASE)  # "The man is holding what?"
CONTRACTED = re.compile(r"^(it|that|this|there|he|she|they|we|you|these|those)'(s|re)\b", re.IGNORECASE)


def lead_strength(question: str) -> float:
    """How strongly a question leads, by its wording: 0 neutral, 0.5 a bare statement with a question mark, 1 a tag or belief."""
    text = question.strip()
    if any(BELIEF.match(part) for part in _sentences(text)):
        return 1.0
    if CHOICE.search(text) or ENDS_ASKING.search(text):
        return 0.0
    tag = TAG.search(text)
    clauses = _clauses(text[: tag.start()] if tag else text)
    if tag and clauses:
        return 0.0 if any(ASKS.match(clause) for clause in (clauses[0], clauses[-1])) else 1.0
    states = text.endswith("?") and len(text.split()) > 2 and not any(ASKS.match(clause) for clause in clauses)
    return 0.5 if states else 0.0


def neutral_form(question: str) -> str:
    """The question without its lead: "There is a dog in the image, right?" -> "Is there a dog in the image?"."""
    if lead_strength(question) == 0:
        return question
    others = [part for part in _sentences(question) if not BELIEF.match(part)]
    if any(ASKS.match(part) for part in others):  # a belief beside a question of its own
        return " ".join(others)
    text = BELIEF.sub("", question.strip(), count=1).strip()
    text = TAG.sub("", text).rstrip(" ?.!,")
    if ASKS.match(text):
        return f"{text}?"
    text = CONTRACTED.sub(lambda found: f"{found[1]} {'is' if found[2] == 's' else 'are'}", text)
    found = VERB.match(text)
    if found is None:
        return f"Is it true that {text[:1].lower() + text[1:]}?"
    subject, verb, rest = found[1], (found[2] or found[3]).lower(), found[4].removeprefix("not ")
    if LOWER.match(subject):
        subject = subject[:1].lower() + subject[1:]
    if rest.startswith("no "):
        some = "any" if verb in ("are", "were", "have") else "an" if rest[3:4] in "aeiou" else "a"
        rest = f"{some} {rest[3:]}"
    if verb in ("has", "have") and not PERFECT.match(rest):
        return f"{'Does' if verb == 'has' else 'Do'} {subject} have {rest}?"
    return f"{'Will' if verb == 'wo' else verb.capitalize()} {subject} {rest}?"


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def _clauses(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[.!?,;:]+(?:\s+|$)", text) if part.strip()]


PERFECT = re.compile(r"(?:been|got|gone|\w+ed)\b", re.IGNORECASE)
LOWER = re.compile(  # first words that are no names
    r"(?:there|it|this|that|these|those|the|an?|they|he|she|we|you|some|all|both|one|two|three|four|five|six|no|every|each"
    r"|his|her|its|their|my|our|your)\b",
    re.IGNORECASE,
)


def contrast(neutral: Tensor, leading: Tensor, *, alpha: float | Tensor, beta: float) -> Tensor:
    """L* (B, V) from the scores under the neutral and the leading query; alpha a number or (B, 1)."""
    mixed = (1 + alpha) * neutral - alpha * leading
    return mixed.masked_fill(~plausible(neutral, beta), -torch.inf)


@system(
    "lqcd",
    kind="decode",
    paper=Paper(
        title="Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models",
        authors="Zhao, Yunpu and Zhang, Rui and Xiao, Junbin and Ke, Changxin and Hou, Ruibo and Hao, Yifan and Guo, Qi and "
        "Chen, Yunji",
        venue="arXiv",
        year=2024,
        arxiv="2408.11261",
    ),
    summary="subtracts what a leading question adds, against the same question put neutrally",
    needs=(),
)
@dataclass(frozen=True)
class LQCD(System):
    """Leading query contrastive decoding. No training; a second stream with another question."""

    alpha: float = param(1.0, "strength of the contrast", low=0)
    beta: float = param(0.1, "tokens less likely than this share of the likeliest are cut; 0 cuts none", low=0, high=1)
    lead: str = param("I think the answer is yes.", "what is appended to a question that does not lead by itself")
    scaled: bool = param(
        False, "scale alpha by how strongly the user's question leads (v2); neutral questions: plain decoding"
    )

    def __post_init__(self) -> None:
        check_parameters(self)

    def idle(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def second(self, site: Site, prompt: Prompt) -> Mapping[str, Any]:
        """Leading questions put neutrally, neutral ones with the lead."""
        asked = prompt.note.questions
        strength = [lead_strength(question) for question in asked]
        device, repeats = site.tokens.role.device, prompt.repeats
        rows = torch.tensor(strength, device=device).repeat_interleave(repeats)[:, None]  # (B, 1)
        site.state["leads"] = rows > 0
        site.state["alpha"] = self.alpha * rows if self.scaled else torch.full_like(rows, self.alpha)
        site.tally["leading"] = site.tally.get("leading", 0) + sum(s > 0 for s in strength)
        site.tally["asked"] = site.tally.get("asked", 0) + len(asked)
        return prompt.ask([neutral_form(q) if s else f"{q} {self.lead}" for q, s in zip(asked, strength, strict=True)])

    def contrast(self, site: Site, logits: Tensor, second: Tensor) -> Tensor:
        leads = site.state["leads"]
        neutral, leading = torch.where(leads, second, logits), torch.where(leads, logits, second)
        return contrast(neutral, leading, alpha=site.state["alpha"], beta=self.beta)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        return {"questions": tally.get("asked", 0), "leading": tally.get("leading", 0)}

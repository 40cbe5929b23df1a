"""Which heads look at the picture: vision-aware head divergence (VHD), its ranking, and T-VHD over an answer.

For head i of decoder layer l, with a_li(c) (D_head,) its output at one position given the context c,

    VHD_li   = || a_li(picture, text) - a_li(text) ||_2               at the prompt's last position        (L, H)
    T-VHD_t  = sum_l sum_{i in the k largest of layer l} VHD_li,t     at the position that predicts token t of an answer

Words with a low T-VHD are said from the language alone: hallucinated words have a lower one than right words.
Source: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949 (ACL 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sightline.engine.attach import attach
from sightline.engine.attention import Edit
from sightline.engine.streams import last_prompt
from sightline.engine.system import Site, System
from sightline.errors import ParameterError
from sightline.explain.observing import prefill, prompts
from sightline.explain.scoring import answered
from sightline.steer.vhr import head_divergence

if TYPE_CHECKING:
    from PIL import Image

    from sightline.lvlm import LVLM


@dataclass(frozen=True, eq=False)
class HeadDivergence:
    """VHD of n prompts. L layers, H heads."""

    divergence: np.ndarray  # (n, L, H) float32

    @property
    def mean(self) -> np.ndarray:
        """(L, H): over the prompts."""
        return self.divergence.mean(0)

    def ranking(self) -> np.ndarray:
        """(L H, 2) layer, head; the most vision-aware first, ties in order."""
        order = np.argsort(-self.mean, axis=None, kind="stable")
        return np.stack(np.unravel_index(order, self.mean.shape), axis=-1)

    def weights(self) -> tuple[float, ...]:
        """Layers x heads numbers with mean 1 in every layer: for `DualStreamEmphasis(head_weights=...)`."""
        mean = self.mean.mean(1, keepdims=True)
        scaled = np.divide(self.mean, mean, out=np.ones_like(self.mean), where=mean > 0)
        return tuple(round(float(x), 4) for x in scaled.flatten())


class Divergence(System):
    """Sees the prompt with and without its pictures; changes nothing. `found`: {layer: (B, H)} after a forward."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}
        self.blind: dict[int, Tensor] = {}

    def streams(self) -> tuple[str, ...]:
        return ("text",)

    def attention(self, site: Site) -> Edit | None:
        if not site.prefill:
            return None
        places = last_prompt(site.tokens) - site.start
        start = int(places.min())
        return Edit(start=start, after=partial(self._see, site.layer, bool(site.stream), places))

    def _see(self, layer: int, blind: bool, places: Tensor, outputs: Tensor, first: int) -> None:
        now = outputs[torch.arange(len(places), device=places.device), places - first].clone()
        if blind:
            self.blind[layer] = now
        else:
            self.found[layer] = head_divergence(now, self.blind[layer])


def vision_heads(
    lvlm: LVLM, images: Sequence[Image.Image], questions: Sequence[str], *, batch: int = 8
) -> HeadDivergence:
    """VHD at the last position of every prompt: one picture and one question each, `batch` at a time.

    Raises:
        InputError: the lengths differ, or there are none.
    """
    found = []
    for a in range(0, max(len(questions), len(images), 1), batch):
        inputs = prompts(lvlm, images[a : a + batch], questions[a : a + batch])
        seer = Divergence()
        with attach(lvlm.model, seer, host=lvlm.host):
            prefill(lvlm, inputs)
        found.append(torch.stack([seer.found[i] for i in sorted(seer.found)], 1).float().cpu().numpy())  # (B, L, H)
    return HeadDivergence(np.concatenate(found))


class _Outputs(System):
    """Head outputs at the last `count` positions of a forward, {layer: (count, H, D)}; one row."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: dict[int, list[Tensor]] = {}

    def attention(self, site: Site) -> Edit:
        self.found[site.layer] = []
        return Edit(
            start=site.queries - self.count, after=lambda out, first: self.found[site.layer].append(out[0].clone())
        )


def token_divergence(
    lvlm: LVLM,
    image: Image.Image,
    question: str,
    answer: str | None = None,
    *,
    top: int | None = None,
    length: int = 64,
) -> tuple[list[str], np.ndarray]:
    """T-VHD of every token of an answer.

    Args:
        answer: what to look at; None: the model's own greedy answer of at most `length` tokens.
        top: heads per layer that count, the most divergent of each token; None: all.

    Returns:
        The answer's tokens as text, and (T,) float32.

    Raises:
        InputError: the answer is empty. ParameterError: `top` is out of range.
    """
    inputs = prompts(lvlm, [image], [question])
    tokenizer, prompt = lvlm.processor.tokenizer, inputs["input_ids"]
    ids = answered(lvlm, inputs, answer, length)
    heads = lvlm.model.config.get_text_config().num_attention_heads
    if top is not None and not 1 <= top <= heads:
        raise ParameterError(f"top={top!r} is out of range; choose top in [1, {heads}] heads")
    token = getattr(lvlm.model.config, lvlm.host.image_token)
    words = prompt[:, prompt[0] != token]
    with_picture = _outputs(lvlm, {k: v for k, v in inputs.items() if k != "input_ids"}, prompt, ids)
    without = _outputs(lvlm, {}, words, ids)
    divergence = torch.stack([head_divergence(a, b) for a, b in zip(with_picture, without, strict=True)])  # (L, T, H)
    kept = divergence if top is None else divergence.topk(top, dim=-1).values
    return [tokenizer.decode([i]) for i in ids], kept.sum((0, 2)).float().cpu().numpy()


def _outputs(lvlm: LVLM, given: Mapping[str, Any], prompt: Tensor, ids: Sequence[int]) -> list[Tensor]:
    """Head outputs (T, H, D) of every layer where each of `ids` is predicted, in one forward behind the prompt."""
    whole = torch.cat([prompt, torch.tensor([ids[:-1]], dtype=prompt.dtype, device=prompt.device)], 1)
    more = whole.shape[1] - prompt.shape[1]
    given = dict(given, input_ids=whole, attention_mask=torch.ones_like(whole))
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in given:
            given[name] = torch.nn.functional.pad(given[name], (0, more))
    seer = _Outputs(len(ids))
    with torch.no_grad(), attach(lvlm.model, seer, host=lvlm.host):
        lvlm.model(**given, use_cache=False)
    return [torch.cat(seer.found[i]) for i in sorted(seer.found)]

"""QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension.

AAAI 2026, arXiv 2503.08689. Official code: MAC-AutoML/QuoTA (no licence file).

Every frame gets a share of a fixed budget of visual tokens, by how likely it shows what the question asks about:

    objects  from a text-only answer in three steps (is detection needed, list, filtered list); none if it is not needed
    p_i      = P("A") of the first answer token to "Does the image contain any object of ...? A. yes, B. no"   frame i
    w_i      = (100 p_i)^2 / sum_j (100 p_j)^2                                                                 (T,)
    n_i      = int(budget w_i),  budget = enhance_tokens * enhance_total;  n_i = 0: the frame is dropped
    v1, v2   (h, w): h = w = int(sqrt(n_i)), one side longer where it fits; bilinear, or adaptive average
    v3       tokens int(linspace(0, n - 1, n_i));  v4 bipartite soft matching to n_i;  v5 the same along rows, then columns

In all but v1 weights are first cut at (tokens of a frame) / budget, in one pass from left to right that gives the excess on
(so that the sum may shrink a little, as in the official code).

Where: projected features before the decoder. `lvlm.ask(..., systems=[QuoTA()])` and `look` run all passes; attached by
itself without `probabilities`, every frame gets the same share. Without the budget, `enhance_total=0`, nothing changes.

Against the official code: (1) its list of objects is read with `eval`, and an unreadable one is a NameError; here it is
parsed as a literal, and none is none. (2) All p zero: equal shares instead of 0/0. (3) Attached, a frame is never made
larger than it was: v1's up-sampling of a dominant frame adds tokens without information (`assign` does it). (4) Frames
that are not square keep their aspect. (5) A frame keeps the separators it has on the host; the official code puts one behind
each row. The new tokens take the places (positions) of those nearest to them. (6) The prompt's wording is ours; the time
line is what the host writes. (7) v4: a frame is pooled 2 x 2 before, as in the official caller.

Cost: one text answer, which ends once its list is read, and T prefills of the scorer (batched, no cache). No attention maps.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.frames import Frame, frames_of, places
from sightline.engine.select import Keep, merge
from sightline.engine.system import Site, System
from sightline.errors import InputError, ParameterError

if TYPE_CHECKING:
    from sightline.engine.passes import Passes

STEPS = """{question}
Do not answer this question yet. Say in three steps which objects a detector should look for in the video.
Step 1: Must physical things be detected to answer? Write only yes or no.
Step 2: If yes, write all of them as a Python list of strings, and nothing else.
Step 3: Write the list of step 2 without what is no physical thing, or null if none is left.
# Example 1, question: How many red kites fly over the beach when the video ends? A. 0. B. 1. C. 2.
Step 1: yes
Step 2: ["red kites", "beach", "end"]
Step 3: ["red kites", "beach"]
# Example 2, question: What does the man beside the bus hold in his left hand? A. A cup. B. A book.
Step 1: yes
Step 2: ["man", "bus", "left hand", "left"]
Step 3: ["man", "bus", "left hand"]
# Example 3, question: In which year was this film made? A. 1999. B. 2009.
Step 1: no"""
OPTIONS = "A. yes, B. no\nAnswer with the option's letter directly."


def _steps(answer: str) -> tuple[str | None, str | None]:
    """What an answer to STEPS says in step 1 and in step 3, as far as it can be read."""
    text = answer.lower()
    needed, listed = re.search(r"step 1: (yes|no)", text), re.search(r"step 3: (\[[^\]]*\])", text)
    return needed and needed[1], listed and listed[1]


def decided(answer: str) -> bool:
    """Whether nothing that may still follow changes `objects_of` an answer."""
    needed, listed = _steps(answer)
    return needed == "no" or (needed == "yes" and listed is not None)


def objects_of(answer: str) -> list[str]:
    """The list of objects in an answer to STEPS; empty when none are needed or it cannot be read."""
    needed, listed = _steps(answer)
    if needed != "yes" or listed is None:
        return []
    try:
        found = ast.literal_eval(listed)
    except (ValueError, SyntaxError):
        return []
    return [name.strip() for name in found if isinstance(name, str) and name.strip()]


def frame_question(question: str, objects: Sequence[str]) -> str:
    """What the scorer is asked about every frame."""
    if objects:
        return f"Does the image contain any object of {', '.join(objects)}? {OPTIONS}"
    return f"{question}\nDoes the image contain sufficient information to answer the given question? {OPTIONS}"


def weigh(probabilities: Sequence[float], scale: tuple[float, float] = (100, 2)) -> np.ndarray:
    """(T,) float64: (scale_0 p)^scale_1; ones where all are zero."""
    weights = (np.asarray(probabilities, np.float64) * scale[0]) ** scale[1]
    return weights if weights.sum() > 0 else np.ones_like(weights)


def scale_weights(weights: np.ndarray, max_value: float) -> np.ndarray:
    """Cut at `max_value`, the excess given on in proportion, in a single pass: what the pass cuts again is lost."""
    weights, excess = weights.copy(), 0.0
    for i in np.flatnonzero(weights > max_value):
        excess += weights[i] - max_value
        weights[i] = max_value
    if excess > 0:
        total = weights.sum()
        for i in np.flatnonzero(weights < max_value):
            weights[i] += weights[i] / total * excess
            if weights[i] > max_value:
                excess += weights[i] - max_value
                weights[i] = max_value
    return weights


def shares(weights: Sequence[float], budget: int, size: int, version: str = "v1") -> list[int]:
    """n_i of every frame. weights: (T,) as `weigh` gives them; size: tokens a frame has."""
    weights = np.asarray(weights, np.float64)
    weights = weights / weights.sum(axis=0)
    if version != "v1" and budget > 0:
        weights = scale_weights(weights, size / budget)
    return [int(budget * w) for w in weights]


def sides(count: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of at most `count` tokens with the aspect of `shape`; for a square: int(sqrt), one side longer if it fits."""
    height, width = (max(1, int(math.sqrt(count * a / b))) for a, b in (shape, shape[::-1]))
    if height * width > count:  # very long shapes
        height, width = (1, count) if height == 1 else (count, 1)
    if (height + 1) * width <= count:
        height += 1
    elif height * (width + 1) <= count:
        width += 1
    return height, width


def soft_match(x: Tensor, count: int) -> Tensor:
    """(R, n, C) -> (R, count, C) by bipartite soft matching, in rounds of at most half, plain means in every round.

    Even tokens that stay come first (the most similar first), then the odd ones with what was merged into them.
    """
    while x.shape[1] > count:
        n = x.shape[1]
        gone, even, odd = min(n - count, n // 2), -(-n // 2), n // 2
        unit = x / x.norm(dim=-1, keepdim=True)
        best, to = (unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)).max(-1)  # (R, even)
        order = best.argsort(dim=-1, descending=True, stable=True)
        stay = torch.arange(even - gone, device=x.device).expand(len(x), -1)
        joined = even - gone + to.gather(1, order[:, :gone])
        target = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
        target[:, ::2] = torch.zeros_like(to).scatter(1, order, torch.cat([joined, stay], 1))
        target[:, 1::2] = even - gone + torch.arange(odd, device=x.device)
        x, _ = merge(x, target, even - gone + odd)
    return x


def resize(frame: Tensor, shape: tuple[int, int], count: int, version: str = "v1") -> Tensor:
    """A frame with a share of `count` tokens.

    Args:
        frame: (n, C) its tokens, row-major in `shape`.

    Returns:
        (h, w, C) in v1, v2 and v5; (count, C) in v3 and v4 (of which v4 never has more than n).
    """
    if version == "v3":
        return frame[torch.linspace(0, len(frame) - 1, count).long().to(frame.device)]
    if version == "v4":
        return soft_match(frame[None], count)[0]
    height, width = sides(count, shape)
    grid = frame.view(*shape, -1)
    if version == "v5":
        grid = soft_match(grid, width).transpose(0, 1)  # (w, H, C)
        return soft_match(grid, height).transpose(0, 1)
    planes = grid.permute(2, 0, 1)[None]  # (1, C, H, W)
    if version == "v1":
        planes = F.interpolate(planes, (height, width), mode="bilinear")
    else:
        planes = F.adaptive_avg_pool2d(planes, (height, width))
    return planes[0].permute(1, 2, 0)


def assign(
    frames: Tensor, weights: Sequence[float], budget: int, shape: tuple[int, int], version: str = "v1"
) -> list[Tensor]:
    """The frames with a share of the budget, in time. frames: (T, n, C); the form of each as in `resize`."""
    counts = shares(weights, budget, frames.shape[1], version)
    return [resize(frame, shape, n, version) for frame, n in zip(frames, counts, strict=True) if n > 0]


def pooled(frame: Tensor, shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """A frame (n, C) at half its rows and columns (rounded up), bilinear."""
    small = tuple(math.ceil(side / 2) for side in shape)
    planes = F.interpolate(frame.view(*shape, -1).permute(2, 0, 1)[None], small, mode="bilinear")
    return planes[0].flatten(1).T, small


@system(
    "quota",
    kind="prune",
    paper=Paper(
        "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
        "Luo, Yongdong and Chen, Wang and Zheng, Xiawu and Huang, Weizhong and Yin, Shukang and Lin, Haojia and "
        "Fu, Chaoyou and Huang, Jinfa and Ji, Jiayi and Luo, Jiebo and Ji, Rongrong",
        "AAAI",
        2026,
        "2503.08689",
        "MAC-AutoML/QuoTA",
    ),
    summary="shares a budget of visual tokens over a video's frames, by how likely each shows what is asked about",
    published=(
        ("six video benchmarks, LLaVA-Video-7B, same budget", "+3.2 % on average (abstract)"),
        ("VNBench", "+10.3 % (tables)"),
    ),
)
@dataclass(frozen=True)
class QuoTA(System):
    """Query-oriented token assignment."""

    enhance_tokens: int = param(196, "tokens of an average frame", low=1)
    enhance_total: int = param(64, "frames that the budget is meant for; 0: no budget, all tokens stay", low=0)
    enhance_version: Literal["v1", "v2", "v3", "v4", "v5"] = param(
        "v1", "how a frame is resized: v1 bilinear, v2 average, v3 even, v4, v5 merging"
    )
    weight_scale: tuple[float, ...] = param((100.0, 2.0), "factor on the probability, and power")
    max_frames_num: int = param(96, "frames to look at of a short video", low=1)
    additional_frames: int = param(64, "more frames per hour of video", low=0)
    scorer: str | None = param(None, "model that scores the frames, as for --model; none: the model that answers")
    probabilities: tuple[float, ...] | None = param(None, "per frame, given instead of asked for", low=0, high=1)

    def __post_init__(self) -> None:
        check_parameters(self)
        if len(self.weight_scale) != 2 or min(self.weight_scale) <= 0:
            raise ParameterError(
                f"QuoTA: weight_scale={self.weight_scale!r}: give two numbers above 0, factor and power"
            )

    @property
    def budget(self) -> int:
        return self.enhance_tokens * self.enhance_total

    def frames_for(self, seconds: float) -> int:
        """How many frames of a video of that length to look at."""
        return self.max_frames_num + int(seconds / 3600 * self.additional_frames)

    def idle(self) -> bool:
        return self.enhance_total == 0

    def plan(self, passes: Passes) -> System:
        if self.idle() or self.probabilities is not None or len(passes.frames) < 2:
            return self
        objects = objects_of(passes.ask(STEPS.format(question=passes.question), max_new_tokens=256, until=decided))
        question = frame_question(passes.question, objects)
        return replace(self, probabilities=passes.chances(question, "A", passes.frames, model=self.scorer))

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        keep, states = ~site.tokens.visual[:, site.start :], embeddings.clone()
        for row, frames in enumerate(frames_of(site)):
            counts = self._counts(frames)
            kept = site.tally["tokens_per_frame"] = [0] * len(frames)
            for k, (frame, count) in enumerate(zip(frames, counts, strict=True)):
                if count == 0:
                    continue
                tokens, shape = embeddings[row, frame.columns], frame.shape
                if self.enhance_version == "v4":
                    tokens, shape = pooled(tokens, shape)
                new = resize(tokens, shape, min(count, len(tokens)), self.enhance_version)
                columns = frame.columns[places(frame.shape, new.shape[:-1]).to(frame.columns.device)]
                states[row, columns] = new.reshape(len(columns), -1)
                keep[row, columns] = True
                keep[row, frame.separators] = True
                kept[k] = len(columns)
        return Keep(keep, states=states)

    def _counts(self, frames: list[Frame]) -> list[int]:
        """n_i of the frames of one row."""
        if not frames:
            return []
        chances = self.probabilities or (1.0,) * len(frames)
        if len(chances) % len(frames):
            raise InputError(f"quota has probabilities of {len(chances)} frames, the question has {len(frames)}")
        merged = len(chances) // len(frames)  # a group of neighbouring frames is as likely as the likeliest of them
        chances = [max(chances[k : k + merged]) for k in range(0, len(chances), merged)]
        rows, columns = max((f.shape for f in frames), key=math.prod)
        size = rows * columns if self.enhance_version != "v4" else -(-rows // 2) * -(-columns // 2)
        return shares(weigh(chances, self.weight_scale), self.budget, size, self.enhance_version)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        """Of the last question: how likely every frame shows what is asked about, and how many tokens it kept."""
        asked = {} if self.probabilities is None else {"probabilities": list(self.probabilities)}
        return asked | dict(tally)  # tokens without separators

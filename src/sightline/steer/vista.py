"""The Hidden Life of Tokens: Reducing Hallucination of LVLMs via Visual Information Steering (VISTA).

ICML 2025, arXiv 2502.03628. Official code: LzVv123456/VISTA (MIT). Two parts that work alone, too:

Visual steering vector: what the picture adds to the last position's state, put into every layer again, so that it does
not fade while the answer grows. h+_l, h-_l (D,): output of decoder layer l at the prompt's last position, with the
picture and without. For every output x (D,) of a feed-forward part, in fp32:

    v_l = h+_l - h-_l                      u = v / ||v||
    g   = 1 + max(0, cos(x, -v))           more where x points away from the vector; 1 in the "simple" form
    y   = lam g u                          mean over vectors when there are several
    x'  = ||x|| (x/||x|| + y) / ||x/||x|| + y||                                     the norm of x is kept

Self-logits augmentation: layers a few below the last know more of the picture. With H_l the output of layer l:

    logits' = alpha mean_{l in [s, e]} head(H_l) + (1 - alpha) logits               no final norm before head, as released

Where: all layers, all positions, prompt and answer; the scores of every next token. Rows without a picture stay as they are.

Against the official code: (1) its rank-1 PCA over one difference adds 1.0 at layer 0, dimension 0 (the arbitrary first
component of a zero matrix): `compat=True` does so. (2) One vector per sample of a batch. (3) The picture's placeholders
are left out of the negative prompt; a host's own markers around them stay. (4) The last layer's state in the window is
the host's normed one, whose scores are the logits: same numbers, one product less. (5) Only the last position's scores.

`steer_one` is the same turn in closed form: with n = ||x||, c = cos(x, u), a = lam g, a vector of length 1 and so
||x/n + a u||^2 = 1 + 2 a c + a^2,

    x' = (x + n a u) / sqrt(1 + 2 a c + a^2)

which reads the states four times instead of fourteen. The head is linear, so the mean of the window's scores is the score of
the mean of its states: one product for the window, whatever its length.

Cost: one run of the prompt without cache and one of its text alone, once; then O(D) per position and layer, and one head
product per token. `steer_prompt=False` steers only the answer and spares the first of the two runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.streams import last_prompt, last_real, rounding
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import ParameterError

EPS = 1e-12  # a smaller length counts as 0
TINY = 1e-14  # a smaller square is the rounding of states that the vector cancels


def steer(x: Tensor, vectors: Sequence[Tensor] | Tensor, lam: Sequence[float], *, simple: bool = False) -> Tensor:
    """Turn states towards steering vectors, keeping their norms.

    Args:
        x: (B, S, D). vectors: n tensors (D,) or (B, D). lam: n strengths, of any sign.
        simple: the first vector only, without the gate g.

    Returns:
        (B, S, D) in the dtype of x; a vector of zero changes nothing but rounding.
    """
    states = x.float()
    unit, y = F.normalize(states, dim=-1), 0.0
    pairs = list(zip(vectors, lam, strict=True))[: 1 if simple else None]
    for vector, strength in pairs:
        u = F.normalize(vector.float(), dim=-1)
        u = u if u.ndim == 1 else u[:, None]  # (D,) or (B, 1, D)
        gate = 1.0 if simple else 1 + (-(unit * u).sum(-1, keepdim=True)).clamp(min=0)
        y = y + strength * gate * u
    turned = F.normalize(unit + y / len(pairs), dim=-1)
    return (turned * states.norm(dim=-1, keepdim=True)).to(x.dtype)


def steer_one(x: Tensor, unit: Tensor, lam: float, *, simple: bool = False) -> Tensor:
    """`steer` by one vector of length 1 per row, in closed form; rows whose vector is 0 stay as they are, bit for bit.

    Args:
        x: (B, S, D). unit: (B, D) fp32, of length 1 or 0. lam: strength, of any sign.
    """
    states = x.float()
    length = states.norm(dim=-1, keepdim=True)  # (B, S, 1)
    cos = (states @ unit[..., None]) / length.clamp(min=EPS)
    push = lam * (1 + (-cos).clamp(min=0)) if not simple else torch.full_like(cos, lam)
    push = push * (unit != 0).any(-1)[:, None, None]
    scale = (1 + push * (2 * cos + push)).clamp(min=TINY).sqrt().reciprocal()
    return torch.addcmul(states * scale, length * push * scale, unit[:, None]).to(x.dtype)


def direction(positive: Tensor, negative: Tensor, *, rank: int = 1, compat: bool = False) -> Tensor:
    """The steering vectors of P pairs of prompts: mean difference plus its first principal directions.

    Args:
        positive, negative: (P, L, D) layer outputs at the last position, with and without the picture.
        rank: principal directions that are added when there are several pairs; signs as in the official code.
        compat: with one pair, add 1.0 at [0, 0] as the official decomposition of a zero matrix does.

    Returns:
        (L, D) fp32.
    """
    difference = (positive.float() - negative.float()).flatten(1)  # (P, L D)
    mean = difference.mean(0)
    if len(difference) > 1:
        left, _, right = torch.linalg.svd(difference - mean, full_matrices=False)
        largest = left.abs().argmax(0)
        signs = left[largest, torch.arange(left.shape[1], device=left.device)].sign()
        mean = mean + (right * signs[:, None])[:rank].sum(0)
    elif compat:
        mean = mean.clone()
        mean[0] += 1.0
    return mean.view(positive.shape[1:])


def augment(logits: Tensor, window: Tensor, alpha: float) -> Tensor:
    """Self-logits augmentation: logits (..., V) and those of W earlier layers (W, ..., V) -> (..., V)."""
    return alpha * window.mean(0) + (1 - alpha) * logits


def default_window(layers: int) -> tuple[int, int]:
    """Layers 25 to 30 of 32, in proportion, never the last."""
    end = max(0, min(round(30 * layers / 32), layers - 2))
    return min(round(25 * layers / 32), end), end


@system(
    "vista",
    kind="steer",
    paper=Paper(
        title="The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual "
        "Information Steering",
        authors="Li, Zhuowei and Shi, Haizhou and Gao, Yunhe and Liu, Di and Wang, Zhenting and Chen, Yuxiao and "
        "Liu, Ting and Zhao, Long and Wang, Hao and Metaxas, Dimitris N.",
        venue="ICML",
        year=2025,
        arxiv="2502.03628",
        code="LzVv123456/VISTA",
        licence="MIT",
    ),
    summary="adds what the picture changed in the hidden states to every layer, and mixes late layers' logits in",
)
@dataclass(frozen=True)
class VISTA(System):
    """Visual steering vector and self-logits augmentation. No training; tune `lam` to the model."""

    lam: float = param(
        0.1, "strength of the vector (LLaVA-1.5: 0.17 captions, 0.01 yes/no); may be negative", low=-100, high=100
    )
    layers: tuple[int, ...] | None = param(
        None, "a/b: only layers a..b-1; a/b/c/d: vectors of layers c..d-1 into layers a..b-1; none: all", low=0
    )
    simple: bool = param(False, "without the gate that pushes more where a state points away")
    logits_layers: tuple[int, ...] | None = param(None, "s/e: window of layers, inclusive; none: 25/30 of 32", low=0)
    logits_alpha: float = param(0.3, "share of the window's logits; 0 leaves them out", low=0, high=1)
    apply_final_norm: bool = param(False, "norm the window's states before the head (the released code does not)")
    steer_prompt: bool = param(True, "steer the prompt, too (one more run of it); false: only the answer")
    compat: bool = param(False, "add the 1.0 that the official code adds at layer 0, dimension 0")

    def __post_init__(self) -> None:
        check_parameters(self)
        if self.layers is not None and len(self.layers) not in (2, 4):
            raise ParameterError(f"VISTA: layers={self.layers!r}: give two or four numbers, for example 0/32")
        if self.logits_layers is not None and (
            len(self.logits_layers) != 2 or self.logits_layers[0] > self.logits_layers[1]
        ):
            raise ParameterError(
                f"VISTA: logits_layers={self.logits_layers!r}: give first and last layer, for example 25/30"
            )

    def idle(self) -> bool:
        return self.lam == 0 and self.logits_alpha == 0

    def streams(self) -> tuple[str, ...]:
        if self.lam == 0:
            return ()
        return ("plain", "text") if self.steer_prompt else ("text",)

    def prepare(self, shape: Shape) -> tuple[dict[int, int], tuple[int, ...]]:
        """{layer: layer whose vector it gets}, and the layers of the window."""
        a, b, *source = (0, shape.layers) if self.layers is None else self.layers
        c, d = source or (a, b)
        if not 0 <= a < b <= shape.layers or d > shape.layers or d - c != b - a:
            raise ParameterError(f"VISTA: layers={self.layers} is out of range: this model has layers 0/{shape.layers}")
        first, last = self.logits_layers or default_window(shape.layers)
        if last >= shape.layers:
            raise ParameterError(f"VISTA: logits_layers={self.logits_layers}: the last layer is {shape.layers - 1}")
        return dict(zip(range(a, b), range(c, d), strict=True)), tuple(range(first, last + 1))

    def output(self, site: Site, hidden: Tensor) -> None:
        """Keep layer outputs: of the prompt's last position for the vectors, of the newest for the logits."""
        rows = torch.arange(len(hidden), device=hidden.device)
        plain = not site.stream and site.step == 0 and not self.steer_prompt
        if self.lam and (site.stream or plain):
            name = site.stream or "plain"
            site.state[name, site.layer] = hidden[rows, last_prompt(site.tokens) - site.start].float()
            site.state["rounding"] = rounding(hidden.dtype)
        if not site.stream and self.logits_alpha and site.layer in site.setup[1]:
            last = last_real(site.tokens) - site.start if site.prefill else -1
            site.state["window", site.layer] = hidden[rows, last]

    def mlp(self, site: Site, output: Tensor) -> Tensor | None:
        source = site.setup[0].get(site.layer)
        if site.stream or not self.lam or source is None or ("text", source) not in site.state:
            return None
        answer = not self.steer_prompt and site.prefill
        if answer and site.step == 0:
            return None
        turned = steer_one(output, self._unit(site, source), self.lam, simple=self.simple)
        if not answer:
            return turned
        made = site.tokens.role[:, site.start :] == int(
            Role.GENERATED
        )  # without a cache the prompt comes again as well
        return torch.where(made[..., None], turned, output)

    def _unit(self, site: Site, source: int) -> Tensor:
        """(B, D) vector of a layer at length 1; 0 in rows that had no picture when the sequence began. Made once."""
        state = site.state
        if ("unit", source) not in state:
            has = state.setdefault("has", site.tokens.visual.any(1))
            seeing = state["plain", source]
            vector = seeing - state["text", source]
            real = vector.norm(dim=-1) > state["rounding"] * seeing.norm(dim=-1)
            vector = vector * real[:, None]  # where the picture is out of sight, the difference is rounding
            if self.compat and source == 0:
                vector[:, 0] += 1.0
            site.tally.setdefault("norms", {}).setdefault(source, []).append(vector.norm(dim=-1))
            state["unit", source] = F.normalize(vector * has[:, None], dim=-1)
        return state["unit", source]

    def logits(self, site: Site, logits: Tensor) -> Tensor | None:
        if not self.logits_alpha or not site.tokens.has_image:
            return None
        window = site.setup[1]
        layers = [layer for layer in window if layer < site.layers - 1]
        mean = logits  # of the last layer, when the window holds it
        if layers:
            states = torch.stack([site.state["window", layer] for layer in layers])  # (W, B, D)
            mean = site.head(states, norm=self.apply_final_norm, mean=True).to(logits.dtype)
            mean = torch.lerp(mean, logits, (len(window) - len(layers)) / len(window))
        new = augment(logits, mean[None], self.logits_alpha)
        return torch.where(site.tokens.visual.any(1)[:, None], new, logits)

    def report(self, tally: dict[Any, Any], setup: Any) -> dict[str, Any]:
        norms = {k: torch.cat(v) for k, v in sorted(tally.get("norms", {}).items())}
        return {
            "prompts": max((len(v) for v in norms.values()), default=0),
            "vector_norm": [round(float(v.mean()), 4) for v in norms.values()],  # of the layers, in order
            "window": list(setup[1]),
        }

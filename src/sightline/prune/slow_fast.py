"""Slow-Fast Architecture for Video Multi-Modal Large Language Models.

arXiv 2504.01328 (2025). Official code: SHI-Labs/Slow-Fast-Video-Multimodal-LLM (Apache-2.0; weights CC BY-NC 4.0).

Few "fast" tokens of a video go into the sequence, all its "slow" tokens stay outside and are read by the text:

    frames  (T, h, w, D), averaged over space by `pooling_stride` when T > 1
    slow    all of them, (n_v, D)
    fast    every sampling_stride-th frame, mean over temporal_stride frames, spatial mean; at least min_fast_frames
    in layers 0, 8, 16, ...: o (B, n, H d_h) the layer's attention before its output projection, q its rotated queries
    [K, V]  = W_kv norm(slow) + b         norm: the layer's own input norm; W_kv rows in the order (H_kv, 2, d_h)
    c       = softmax(q K^T / sqrt(d_h) + mask) V      no positions on slow keys
    gamma   = tanh(w_g . o + b_g) tanh(alpha)          a scalar per token; alpha starts at 0
    o[text] += gamma c                                 zero for a sample without a video

Variants: "masksystem": text before the first visual token does not read; "vanilla": all tokens read, alpha without tanh.

Where: before the decoder (fast), and inside hybrid layers at prefill and decode. The keys and values of slow tokens are kept
with the sequence. Without `weights` the branch starts from the layer's own key and value projections and alpha = 0: the
answer is then that of the host on the fast tokens. Train it with `sightline.learn.slow_fast`.

Against the official code: (1) it computes K and V again in every decoding step, and then multiplies c by zero, because
its test for a video looks at the current block only: in its inference, generated tokens never read, although answers did
in training. Here they read; `answers_read=False` does as the official code. (2) Its initialisation from the language model
writes the rows in the order (2, H_kv, d_h) and so mixes heads; here they are interleaved as they are read. (3) Fast tokens
take the places (positions) of the first frame of their group and what a host writes between frames stays.

Cost per hybrid layer: n_v D 2 H_kv d_h once, and n_text n_v H d_h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, check_parameters, param, system
from sightline.engine.attention import Edit
from sightline.engine.frames import Frame, frames_of, places
from sightline.engine.select import Keep
from sightline.engine.system import Shape, Site, System
from sightline.engine.tokens import Role
from sightline.errors import ParameterError
from sightline.prune.parts.slow_branch import SlowBranch, load_branch

if TYPE_CHECKING:
    from collections.abc import Callable

READERS = ("text-only-vanilla", "text-only-vanilla-masksystem", "vanilla")


def sample_fast_frames(total: int, stride: int, least: int) -> list[int]:
    """Evenly spaced frames: total // stride of them, `least` at least; all when there are fewer than that."""
    if total < least:
        return list(range(total))
    count = max(total // stride, least)
    return [min(int(k * (total / count)), total - 1) for k in range(count)]


def average(frames: Tensor, shape: tuple[int, int], stride: int) -> tuple[Tensor, tuple[int, int]]:
    """Spatial means of stride x stride tokens: (T, n, C) -> (T, n', C) and the new (rows, columns); a rest is dropped."""
    if stride == 1 or min(shape) < stride:
        return frames, shape
    planes = F.avg_pool2d(frames.transpose(1, 2).unflatten(2, shape), stride)
    return planes.flatten(2).transpose(1, 2), tuple(planes.shape[-2:])


def fast_frames(
    frames: Tensor, *, sampling_stride: int, temporal_stride: int, min_fast_frames: int
) -> tuple[Tensor, list[int]]:
    """Frames sampled and averaged over time.

    Args:
        frames: (T, n, C) with T > 1.

    Returns:
        (F, n, C), and the first source frame of each.
    """
    total = len(frames)
    chosen = sample_fast_frames(total, sampling_stride, min_fast_frames) if sampling_stride > 1 else list(range(total))
    picked = frames[chosen]
    if temporal_stride == 1:
        return picked, chosen
    count = len(chosen) // temporal_stride
    if count >= min_fast_frames:
        means = picked[: count * temporal_stride].unflatten(0, (count, temporal_stride)).mean(1)
        return means, chosen[::temporal_stride][:count]
    count = min(len(chosen), min_fast_frames)
    means = F.adaptive_avg_pool1d(picked.flatten(1).T[None], count)[0].T.unflatten(1, picked.shape[1:])
    return means, [chosen[k * len(chosen) // count] for k in range(count)]


def context(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """c: query (B, H, n, d_h), keys and values (B, H_kv, n_v, d_h), mask (B, n_v) bool -> (B, n, H d_h).

    A row of the batch without slow tokens gives zero.
    """
    some = mask.any(1)[:, None]
    found = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=(mask | ~some)[:, None, None], enable_gqa=query.shape[1] != keys.shape[1]
    )
    return (found * some[..., None, None]).transpose(1, 2).flatten(2)


def reading_rows(token_type: Tensor, implementation: str) -> Tensor:
    """(B, n) bool: tokens that read. token_type (B, n): 1 asked and system text, 2 answer text, 3 visual, 4 padding."""
    if implementation == "vanilla":
        return torch.ones_like(token_type, dtype=torch.bool)
    text = token_type <= 2
    if "masksystem" in implementation:
        seen = (token_type == 3).cumsum(1) > 0
        text = text & (seen | ~seen[:, -1:])
    return text


def read_slow(
    output: Tensor,
    query: Tensor,
    slow: Tensor,
    mask: Tensor,
    token_type: Tensor,
    branch: SlowBranch,
    implementation: str,
) -> Tensor:
    """A hybrid layer's addition as a whole: the readable truth.

    Args:
        output: (B, n, H d_h) before the output projection. query: (B, n, H, d_h), rotated.
        slow: (B, n_v, D) slow tokens after the layer's input norm. mask: (B, n_v) bool.
        token_type: (B, n), as in `reading_rows`. branch: the layer's parameters.
    """
    found = context(query.transpose(1, 2), *branch.keys_values(slow), mask)
    video = (token_type == 3).any(1)[:, None, None]
    change = branch.gate(output, tanh=implementation != "vanilla") * found * video
    return output + torch.where(reading_rows(token_type, implementation)[..., None], change, 0.0)


@dataclass(frozen=True, eq=False)
class Setup:
    """What one attachment works with."""

    branch: nn.ModuleDict  # layer -> SlowBranch
    norm: Callable[[int, Tensor], Tensor]


@system(
    "slow-fast",
    kind="prune",
    paper=Paper(
        "Slow-Fast Architecture for Video Multi-Modal Large Language Models",
        "Shi, Min and Wang, Shihao and Chen, Chieh-Yun and Jain, Jitesh and Wang, Kai and Xiong, Junjun and Liu, Guilin "
        "and Yu, Zhiding and Shi, Humphrey",
        "arXiv",
        2025,
        "2504.01328",
        "SHI-Labs/Slow-Fast-Video-Multimodal-LLM",
        "Apache-2.0",
    ),
    summary="few tokens of a video in the sequence, all of them read by the text through gated cross-attention",
    published=(
        ("VideoMME / MLVU / MVBench, 64 frames", "60.2 / 67.3 / 68.9"),
        ("VideoMME / MLVU / MVBench, 96 frames", "60.3 / 68.1 / 68.6"),
    ),
)
@dataclass(frozen=True)
class SlowFast(System):
    """Slow-fast video tokens."""

    sampling_stride: int = param(1, "take every so many-th frame for the fast tokens", low=1)
    temporal_stride: int = param(4, "then mean over so many frames", low=1)
    spatial_stride: int = param(1, "then mean over so many rows and columns", low=1)
    pooling_stride: int = param(2, "mean over rows and columns of all frames of a video, before", low=1)
    min_fast_frames: int = param(16, "fewest fast frames", low=1)
    every_n_layers: int = param(8, "hybrid layers: 0, n, 2 n, ...", low=1)
    implementation: str = param("text-only-vanilla", "who reads: text-only-vanilla, ...-masksystem, vanilla")
    answers_read: bool = param(
        True, "generated tokens read, as answers do in training; the official inference does not"
    )
    weights: str | None = param(None, "safetensors file of the branch; none: a new one, which adds nothing yet")

    def __post_init__(self) -> None:
        check_parameters(self)
        if self.implementation not in READERS:
            raise ParameterError(
                f"SlowFast: implementation={self.implementation!r}: choose one of {', '.join(READERS)}"
            )

    def idle(self) -> bool:
        strides = (self.sampling_stride, self.temporal_stride, self.spatial_stride, self.pooling_stride)
        return self.weights is None and strides == (1, 1, 1, 1)

    def prepare(self, shape: Shape) -> Setup:
        branch = nn.ModuleDict()
        for layer in range(0, shape.layers, self.every_n_layers):
            key, value = shape.key_value(layer)
            dim = key.weight.shape[0] // shape.heads_kv
            with torch.random.fork_rng(devices=[]):  # the same gates every time
                torch.manual_seed(layer)
                part = SlowBranch(shape.hidden_size, shape.heads, shape.heads_kv, dim).to(key.weight)
            part.start_from(key, value)
            branch[str(layer)] = part
        if self.weights is not None:
            load_branch(branch, self.weights)
        return Setup(branch, shape.input_norm)

    def visual_tokens(self, site: Site, embeddings: Tensor) -> Keep:
        keep, states = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device), embeddings.clone()
        slow = []
        for row, frames in enumerate(frames_of(site)):
            slow.append(self._shorten(embeddings[row], frames, keep[row], states[row]))
        for layer in range(0, site.layers, self.every_n_layers):
            site.state.pop(("kv", layer), None)
        site.state["slow"] = nn.utils.rnn.pad_sequence(slow, batch_first=True)  # (B, n_v, D)
        lengths = torch.tensor([len(s) for s in slow], device=embeddings.device)
        site.state["mask"] = torch.arange(int(lengths.max()), device=embeddings.device) < lengths[:, None]
        site.tally["slow"], site.tally["fast"] = (
            lengths.tolist(),
            (keep & site.tokens.visual[:, site.start :]).sum(1).tolist(),
        )
        return Keep(keep, states=states)

    def _shorten(self, embeddings: Tensor, frames: Sequence[Frame], keep: Tensor, states: Tensor) -> Tensor:
        """Write the fast tokens of one row into `states`, leave the others out of `keep`; its slow tokens (n_v, D)."""
        if not frames:
            return embeddings[:0]
        for f in frames:
            keep[f.columns] = False
        if len({f.shape for f in frames}) > 1:  # several pictures, no video: each by itself
            return torch.cat([self._place(embeddings[f.columns][None], f.shape, [f], keep, states) for f in frames])
        grid, shape = torch.stack([embeddings[f.columns] for f in frames]), frames[0].shape  # (T, n, D)
        return self._place(grid, shape, frames, keep, states)

    def _place(
        self, grid: Tensor, shape: tuple[int, int], frames: Sequence[Frame], keep: Tensor, states: Tensor
    ) -> Tensor:
        fast, sources = grid, [0]
        if len(frames) > 1:
            grid, shape = average(grid, shape, self.pooling_stride)
            fast, sources = fast_frames(
                grid,
                sampling_stride=self.sampling_stride,
                temporal_stride=self.temporal_stride,
                min_fast_frames=self.min_fast_frames,
            )
        fast, small = average(fast, shape, self.spatial_stride)
        for tokens, source in zip(fast, sources, strict=True):
            columns = frames[source].columns[places(frames[source].shape, small).to(keep.device)]
            keep[columns], states[columns] = True, tokens
        return grid.flatten(0, 1)

    def attention(self, site: Site) -> Edit | None:
        if site.layer % self.every_n_layers or "slow" not in site.state:
            return None
        role = site.tokens.role[:, site.start :]
        read = (role != int(Role.PAD)) & (role != int(Role.IMAGE))
        if not self.answers_read:
            read = read & (role != int(Role.GENERATED))
        if "masksystem" in self.implementation:
            read = read & ((role == int(Role.AFTER)) | (role == int(Role.GENERATED)))
        if self.implementation == "vanilla":
            read = torch.ones_like(read) if self.answers_read else role != int(Role.GENERATED)
        branch = site.setup.branch[str(site.layer)]
        if ("kv", site.layer) not in site.state:
            site.state["kv", site.layer] = branch.keys_values(site.setup.norm(site.layer, site.state["slow"]))
        keys, values = site.state["kv", site.layer]
        query, mask, tanh = site.call.query, site.state["mask"], self.implementation != "vanilla"

        def add(output: Tensor, first: int) -> Tensor:  # (B, R, H, d_h)
            flat = output.flatten(2)
            found = context(query[:, :, first : first + output.shape[1]], keys, values, mask)
            return (flat + branch.gate(flat, tanh) * found).view_as(output)

        return Edit(rows=read, after=add)

    def report(self, tally: dict[Any, Any], setup: Setup) -> dict[str, Any]:
        return {"fast_tokens": tally["fast"], "slow_tokens": tally["slow"]} if "fast" in tally else {}

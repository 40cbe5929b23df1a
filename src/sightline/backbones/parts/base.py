"""The base of every network here: timm's interface over a generator of feature maps, and the block that all of them stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sightline.errors import ParameterError
from sightline.mix.parts.local import convolved, depthwise

Module = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)) on (B, H, W, C); without attention only the second line.

    attn, mlp: modules (B, H, W, C) -> same. norm: class or function of the channels.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if attn is not None:
            self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DepthwiseMlp(nn.Module):
    """fc1, depthwise 3 x 3 convolution, GELU, fc2, on (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": depthwise(hidden, 3)})
        nn.init.normal_(self.dwconv["dwconv"].weight, 0, (2 / 9) ** 0.5)
        nn.init.zeros_(self.dwconv["dwconv"].bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = convolved(self.dwconv["dwconv"], self.fc1(x))
        return self.fc2(self.act(x))


class Embed(nn.Module):
    """The convolution `proj` between stages, then `norm`: (B, C, H, W) -> (B, H', W', C')."""

    def __init__(self, proj: nn.Conv2d, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = proj
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1))


class Backbone(nn.Module):
    """A classifier with timm's interface. Families define `steps` (or `walk`), build a last `norm` and call `finish_init`.

    widths: channels of the maps that `walk` yields; reductions: their strides on the picture.
    """

    output_fmt = "NHWC"
    pools = ("avg", "")

    def __init__(
        self, widths: Sequence[int], reductions: Sequence[int], *, num_classes: int, drop_rate: float, global_pool: str
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._set_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = widths[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": width, "reduction": step, "module": f"stages.{i}"}
            for i, (width, step) in enumerate(zip(widths, reductions, strict=True))
        ]
        self._register_load_state_dict_pre_hook(self._rename)

    def _set_pool(self, name: str) -> None:
        if name not in self.pools:
            raise ParameterError(f"global_pool={name!r}: choose one of {self.pools} ('' keeps the whole map)")
        self.global_pool = name

    def steps(self) -> Iterator[tuple[Module, Module]]:
        """Every stage: what makes its map of the picture or the map before, (B, C, H, W) -> (B, H', W', C'), and its blocks."""
        raise NotImplementedError

    def walk(self, x: Tensor) -> Iterator[Any]:
        """The state after each stage: a map (B, H, W, C), unless the family keeps more (see `map_of`)."""
        for embed, blocks in self.steps():
            x = blocks(embed(x))
            yield x
            x = x.movedim(-1, 1)

    def finish(self, state: Any) -> Tensor:
        """The last state normalised: what `forward_features` returns."""
        return self.norm(state)

    def map_of(self, state: Any) -> Tensor:
        """The map (B, H, W, C) in a state of `walk`."""
        return state

    def renamed(self, key: str) -> str | None:
        """Our name of a published checkpoint's key; None: that entry is computed, not loaded."""
        return key

    def _rename(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Rewrites a published state dict as it is loaded."""
        for key in [key for key in state if key.startswith(prefix)]:
            ours = self.renamed(key[len(prefix) :])
            if ours is None:
                del state[key]
            elif prefix + ours != key:
                state[prefix + ours] = state.pop(key)

    def finish_init(self, num_classes: int) -> None:
        """Build the head and draw all linear weights, the last line of a family's `__init__`."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init)

    def forward_features(self, x: Tensor) -> Tensor:
        state = None
        for state in self.walk(x):  # noqa: B007 (the last one is used)
            pass
        return self.finish(state)

    def pooled(self, x: Tensor) -> Tensor:
        """`forward_features` output to one vector (B, C)."""
        return x.mean((1, 2)) if self.global_pool else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pooled(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` (0: none)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        weight = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(device=weight.device, dtype=weight.dtype).apply(_init)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after the stages of `indices`, as timm returns them; `norm` is not offered: norms differ by stage."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ParameterError(f"output_fmt={output_fmt!r}: choose NCHW or NHWC")
        if norm:
            raise ParameterError("norm=True: these networks normalise the last stage only; take forward_features")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        found, state = [], None
        for i, state in enumerate(self.walk(x)):
            if i in wanted:
                found.append(self.map_of(state))
            if i == last and (stop_early or intermediates_only):
                break
        if output_fmt == "NCHW":
            found = [one.movedim(-1, 1) for one in found]
        return found if intermediates_only else (self.finish(state), found)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone."""
        keep = ("pos_embed", "cls_token", "_bias", "bias_table", "temperature", "query_embedding", "gamma")
        return {name for name, _ in self.named_parameters() if any(word in name for word in keep)}


def drop_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth that grows linearly from 0 to `rate` over all blocks, by stage."""
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def mlp(dim: int, ratio: float) -> Mlp:
    """fc1, GELU, fc2."""
    return Mlp(dim, int(dim * ratio))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

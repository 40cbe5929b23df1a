"""MoH: Multi-Head Attention as Mixture-of-Head Attention: the vision backbones, on TransNeXt.

ICML 2025, arXiv 2410.11842. Official code: SkyworkAI/MoH (Apache-2.0). The gates are `sightline.mix.moh.head_gates`, the host's
attention is `parts.foveal`.

    patches     7x7 s4 conv, LN; between stages 3x3 s2 conv, LN; LN after every stage       LN eps 1e-6
    block       x += MoH(LN(x));  x += GLU(LN(x))        GLU: fc1 -> a, b;  fc2(GELU(dwconv3x3(a)) b), width 2/3 of the ratio
    stages 1-3  near tokens and the map pooled by 8, 4, 2; stage 4: all tokens
    head        mean over positions, linear

Differences from the official code: any input (its relative places are of `img_size`, as its `pretrain_size`); ties of the picked
heads go to the lower head; the balance losses are collected by `balance_losses` instead of a list in a class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from sightline.backbones.parts.base import Backbone, Block, Embed, Module, drop_rates
from sightline.backbones.parts.foveal import Cosine, Foveal
from sightline.backbones.variants import Variant, register
from sightline.mix.moh import balance_loss, head_gates
from sightline.mix.parts.local import convolved, depthwise

NORM = partial(nn.LayerNorm, eps=1e-6)


def gated(cls: type[Cosine]) -> type[Cosine]:
    """The class with MoH's routers: `shared` heads always on, `routed` heads picked by each token."""

    class Gated(cls):
        def __init__(self, dim: int, heads: int, shared: int, routed: int, **kwargs: int) -> None:
            super().__init__(dim, heads, **kwargs)
            self.routed = routed
            widths = {"wg": heads - shared if routed else 0, "wg_0": 2 if routed and shared else 0}
            widths["wg_1"] = shared if shared > 1 else 0
            for name, width in widths.items():
                setattr(self, name, nn.Linear(dim, width, bias=False) if width else None)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(1, 2)
            routed, balance, shared = (None if w is None else w(tokens) for w in (self.wg, self.wg_0, self.wg_1))
            return super().forward(x, head_gates(routed, balance, shared, self.routed))

    Gated.__name__ = Gated.__qualname__ = f"Gated{cls.__name__}"
    return Gated


GatedCosine, GatedFoveal = gated(Cosine), gated(Foveal)


class GLU(nn.Module):
    """Gated MLP whose gate is convolved: (B, H, W, C) -> same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.ModuleDict({"dwconv": depthwise(hidden, 3)})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(convolved(self.dwconv["dwconv"], gate)) * x)


class MoHTransNeXt(Backbone):
    """See the module's head. shared, routed: heads by stage."""

    def __init__(
        self,
        shared: Sequence[int],
        routed: Sequence[int],
        depths: Sequence[int] = (5, 5, 22, 5),
        widths: Sequence[int] = (72, 144, 288, 576),
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(widths, (4, 8, 16, 32), num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)
        before = in_chans
        for i, (dim, rates) in enumerate(zip(widths, drop_rates(drop_path_rate, depths), strict=True)):
            kernel, step, ratio, reduction = (3, 2, 4 if i > 1 else 8, (8, 4, 2, 1)[i])
            kernel, step = (kernel, step) if i else (7, 4)
            conv = nn.Conv2d(before, dim, kernel, stride=step, padding=kernel // 2)
            setattr(self, f"patch_embed{i + 1}", Embed(conv, nn.LayerNorm(dim)))
            rule = {"shared": shared[i], "routed": routed[i], "side": img_size // (4 * 2**i)}
            make = partial(GatedFoveal, reduction=reduction) if reduction > 1 else GatedCosine
            blocks = (Block(dim, make(dim, dim // 24, **rule), GLU(dim, 2 * ratio * dim // 3), NORM, r) for r in rates)
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
            setattr(self, f"norm{i + 1}", NORM(dim))
            before = dim
        self.norm = nn.Identity()
        self.finish_init(num_classes)

    def steps(self) -> Iterator[tuple[Module, Module]]:
        for i in range(1, 5):
            blocks, norm = getattr(self, f"block{i}"), getattr(self, f"norm{i}")
            yield getattr(self, f"patch_embed{i}"), lambda x, blocks=blocks, norm=norm: norm(blocks(x))


@contextmanager
def balance_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the balance loss of every router of the forwards inside; training adds 0.01 times their mean."""
    found: list[Tensor] = []
    hooks = [
        module.wg.register_forward_hook(
            lambda _, __, logits, picks=module.routed: found.append(balance_loss(logits, picks))
        )
        for module in model.modules()
        if isinstance(module, (GatedCosine, GatedFoveal)) and module.wg is not None
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


_BASE = {"depths": (5, 5, 23, 5), "widths": (96, 192, 384, 768)}
register(
    __name__,
    MoHTransNeXt,
    [
        Variant(
            "moh_transnext_small_80",
            "moh",
            {"shared": (3, 6, 3, 8), "routed": (0, 0, 6, 12)},
            parameters=49_910_548,
            top1=84.7,
        ),
        Variant(
            "moh_transnext_small_75", "moh", {"shared": (3, 6, 3, 4), "routed": (0, 0, 6, 12)}, parameters=49_910_548
        ),
        Variant(
            "moh_transnext_base_75",
            "moh",
            _BASE | {"shared": (4, 8, 4, 5), "routed": (0, 0, 8, 16)},
            parameters=90_020_632,
            top1=84.9,
        ),
        Variant(
            "moh_transnext_base_50",
            "moh",
            _BASE | {"shared": (2, 2, 2, 4), "routed": (2, 4, 6, 8)},
            parameters=90_023_512,
            top1=84.7,
        ),
    ],
    first_conv="patch_embed1.proj",
)

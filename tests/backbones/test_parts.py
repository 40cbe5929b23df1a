"""The attentions that only backbones have, against readable loops: foveal attention, stripes; MoH's balance losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sightline.backbones.moh_vit import GatedCosine, GatedFoveal, balance_losses
from sightline.backbones.parts.cswin import Stripes
from sightline.backbones.parts.deit import PlainAttention
from sightline.backbones.parts.foveal import Foveal
from sightline.backbones.parts.positions import at_size
from sightline.mix.moh import MoH
from tests.mix.numbers import error, randn, seeded


def naive_foveal(module: Foveal, x: torch.Tensor) -> torch.Tensor:
    """One token after the other: (B, heads, N, D)."""
    batch, height, width, dim = x.shape
    heads, depth = module.heads, dim // module.heads
    cells = height // module.reduction, width // module.reduction
    pooled = F.gelu(module.sr(x.movedim(-1, 1)))
    pooled = module.norm(F.adaptive_avg_pool2d(pooled, cells).movedim(1, -1)).reshape(batch, -1, dim)
    k_pool, v_pool = (t.view(batch, -1, heads, depth) for t in module.kv(pooled).chunk(2, -1))
    k, v = (t.view(batch, height, width, heads, depth) for t in module.kv(x).chunk(2, -1))
    q = F.normalize(module.q(x).view(batch, height, width, heads, depth), dim=-1)
    bias = module.bias((height, width), cells, x)
    out = x.new_zeros(batch, heads, height * width, depth)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, height, width))).tolist():
        near = [(i + di, j + dj, 3 * (di + 1) + dj + 1) for di in (-1, 0, 1) for dj in (-1, 0, 1)]
        near = [(a, c, place) for a, c, place in near if 0 <= a < height and 0 <= c < width]
        count = torch.tensor(float(len(near) + cells[0] * cells[1]))
        query = (q[b, i, j, h] + module.query_embedding[h, 0]) * F.softplus(module.temperature[h, 0, 0]) * count.log()
        scores = [query @ F.normalize(k[b, a, c, h], dim=0) + module.relative_pos_bias_local[h, p] for a, c, p in near]
        far = F.normalize(k_pool[b, :, h], dim=-1) @ query + bias[h, i * width + j]
        weights = torch.cat([torch.stack(scores), far]).softmax(0)
        learned = q[b, i, j, h] @ module.learnable_tokens[h] + module.learnable_bias[h, 0]
        total = weights[len(near) :] @ v_pool[b, :, h]
        for (a, c, place), weight in zip(near, weights, strict=False):
            total = total + (weight + learned[place]) * v[b, a, c, h]
        out[b, h, i * width + j] = total
    return out


def test_foveal_attention_token_by_token() -> None:
    module, x = seeded(Foveal(8, 2, side=6, reduction=2).double(), 0), randn(2, 6, 4, 8, seed=1, dtype=torch.float64)
    with torch.no_grad():
        assert error(module.mix(x), naive_foveal(module, x)) <= 1e-6


def test_gates_weigh_heads() -> None:
    x = randn(2, 6, 6, 24, seed=1)
    for cls, more in ((GatedFoveal, {"reduction": 2}), (GatedCosine, {})):
        module = seeded(cls(24, 4, 1, 2, side=6, **more), 0)
        reference = MoH(24, 4, shared=1, routed=2)
        for name in ("wg", "wg_0"):
            getattr(reference, name).load_state_dict(getattr(module, name).state_dict())
        gates = reference.gates(x.flatten(1, 2))
        assert ((gates > 0).sum(-1) == 3).all()
        with torch.no_grad():
            heads = module.mix(x) * gates.transpose(1, 2)[..., None]
            wanted = module.proj(heads.transpose(1, 2).flatten(2)).view_as(x)
            assert error(module(x), wanted) <= 1e-6


def test_balance_losses_are_collected_and_hooks_removed() -> None:
    model = nn.Sequential(GatedCosine(24, 4, 1, 2, side=4), GatedFoveal(24, 4, 4, 0, side=4, reduction=2))
    for module in model:
        nn.init.zeros_(getattr(module, "wg", None).weight) if module.wg is not None else None
    with balance_losses(model) as losses:
        model(randn(1, 4, 4, 24, seed=0))
    assert len(losses) == 1  # the second has no routed heads
    assert torch.allclose(losses[0], torch.tensor(2.0))  # uniform: the number of picks
    model(randn(1, 4, 4, 24, seed=0))
    assert len(losses) == 1


def naive_stripes(module: Stripes, x: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Every branch as full attention under a mask, and the convolution stripe by stripe."""
    batch, height, width, dim = x.shape
    part, parts = dim // len(sizes), []
    q, k, v = module.qkv(x).chunk(3, -1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for n, (h, w) in enumerate(sizes):
        stripe = (rows // h * width + columns // w).flatten()
        mask = stripe[:, None] == stripe
        mine = slice(n * part, n * part + part)
        heads = [t[..., mine].flatten(1, 2).unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).reshape(batch, height, width, part)
        for i in range(0, height, h):
            for j in range(0, width, w):
                cell = v[:, i : i + h, j : j + w, mine].movedim(-1, 1)
                out[:, i : i + h, j : j + w] += module.get_v[n](cell).movedim(1, -1)
        parts.append(out)
    return module.proj(torch.cat(parts, -1))


def test_stripes_are_masked_attention() -> None:
    x = randn(2, 6, 4, 8, seed=1)
    with torch.no_grad():
        cross = seeded(Stripes(8, 4, split=2, branches=2), 0)
        assert error(cross(x), naive_stripes(cross, x, [(6, 2), (2, 4)])) <= 1e-5
        whole = seeded(Stripes(8, 4, split=7, branches=1), 0)
        assert error(whole(x), naive_stripes(whole, x, [(6, 4)])) <= 1e-5
        wide = seeded(Stripes(8, 4, split=5, branches=2), 0)  # 5 divides neither side: 4 columns, 3 rows
        assert error(wide(x), naive_stripes(wide, x, [(6, 4), (3, 4)])) <= 1e-5


def test_plain_attention_takes_the_cls_token_first() -> None:
    module = seeded(PlainAttention(8, 2, qkv_bias=True), 0)
    x, cls = randn(2, 3, 4, 8, seed=1), randn(2, 1, 8, seed=2)
    out, new = module(x, cls)
    assert out.shape == x.shape
    assert new.shape == cls.shape
    flipped, same = module(x.flip(1), cls)  # no positions: the map's order does not matter
    assert error(flipped.flip(1), out) <= 1e-5
    assert error(same, new) <= 1e-5


def test_position_embeddings_are_resized() -> None:
    embedding = randn(1, 12, 5, seed=0)
    assert torch.equal(at_size(embedding, (3, 4), (3, 4)).flatten(1, 2), embedding)
    assert at_size(embedding, (3, 4), (6, 5)).shape == (1, 6, 5, 5)
    constant = torch.ones(1, 12, 5)
    assert error(at_size(constant, (3, 4), (7, 2)), torch.ones(1, 7, 2, 5)) <= 1e-6

"""DEEM: Diffusion Models Serve as the Eyes of Large Language Models for Image Perception.

ICLR 2025, arXiv 2405.15232. Official code: RainBowLuoCS/DEEM (Apache-2.0).

The tokens E (B, 1 + g^2, D) that an image encoder gives a language model also condition a frozen diffusion model, and the
denoising loss of the same picture flows back into the encoder: what the language model reads must be enough to draw the
picture again. m (B, 1, H, W) is the region of interest, ones for the whole picture.

    x    = LN(W E + b) + p,   patches x m,   y = LN(x),   q = Resampler(y)                    (B, Q, C)
    c    = W_i q                                              condition, instead of a text's  (B, Q, C_d)
    z    = scale VAE(2 image - 1),   z_t = sqrt(a_t) z + sqrt(1 - a_t) e,   t' = round(0.6 (t - 500) + 500),   t ~ U{0..999}
    err  = (UNet(z_t', t', c) - target)^2,   target = e, or sqrt(a) e - sqrt(1 - a) z          (B, 4, h, w)
    L    = mean(err m' |1| / (|m'| + 1e-8)),   m' = [bilinear(m -> h w) > 0];        total = L_text + 5 L

p are sine-cosine positions, zero for the class token. t' keeps to the middle of the noise, [200, 799]. m' of ones: the plain
diffusion loss; empty: 0. With region tokens (the paper's stage 3), the mean under m of every feature map, to which p was added
at its size, and an embedding of m, 112 x 112, stand before y.

Differences: a_t is read from the scheduler's `alphas_cumprod`, so that any scheduler does; the middle is half of its steps.
The multi-scale condition of the UNet (MMFS, deformable cross-attention to feature maps, which the UNet's code must be changed
for) is left out: the gradient reaches the encoder through the tokens alone. Test-time adaptation: `parts.adapting`.

Cost: one UNet forward, its backward to the condition, one VAE encoding per picture; nothing at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.catalog import Paper, check_parameters, param, system
from sightline.errors import InputError, ModelError
from sightline.train.parts.resampler import Resampler

TINY = 1e-8  # beside the size of a region
SHAPE = 112  # side of the mask that region tokens embed


def feedback_timesteps(steps: Tensor, spread: float = 0.6, total: int = 1000) -> Tensor:
    """Time steps of `total` drawn towards the middle: 0 -> 200, 500 -> 500, 999 -> 799. Same shape, int64."""
    middle = total / 2
    return torch.round((steps - middle) * spread + middle).long()


def region_of(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(B, 1, H, W) of any size and numbers -> bool (B, 1, h, w): bilinear, then > 0."""
    mask = mask.float()
    if tuple(mask.shape[-2:]) != tuple(size):
        mask = F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=False)
    return mask > 0


def extract_region(maps: Tensor, mask: Tensor) -> Tensor:
    """(B, C, h, w) with zeros outside the region."""
    return maps * region_of(mask, maps.shape[-2:])


def pool_region(maps: Tensor, mask: Tensor) -> Tensor:
    """(B, C) mean of (B, C, h, w) over the region; 0 where it is empty."""
    region = region_of(mask, maps.shape[-2:])
    return (maps * region).sum((-2, -1)) / (region.sum((-2, -1)) + TINY)


def region_loss(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the error (B, C, h, w) over regions, every picture weighing the same; 0 for an empty region."""
    if mask is None:
        return error.mean()
    region = region_of(mask, error.shape[-2:])  # (B, 1, h, w)
    weight = region[0, 0].numel() / (region.sum((2, 3), keepdim=True) + TINY)
    return (error * region * weight).mean()


def add_noise(latents: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """z_t of (B, C, h, w) latents; `kept` (B,) is a_t, the share of variance that is still picture."""
    kept = kept.to(latents).view(-1, 1, 1, 1)
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise


def target_of(kind: str, latents: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """What the UNet should say: the noise ("epsilon") or the velocity ("v_prediction"). ModelError for other kinds."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return add_noise(noise, -latents, kept)
    raise ModelError(f"prediction_type={kind!r} is not known: choose a model of epsilon or v_prediction")


def sincos_positions(width: int, grid: int) -> Tensor:
    """(1 + grid^2, width): zeros for the class token; of a patch (row, column), sines and cosines of row, then of column."""
    quarter = width // 4
    speeds = 10000 ** (-torch.arange(quarter) / quarter)
    angles = torch.arange(grid)[:, None] * speeds  # (g, quarter)
    line = torch.cat([angles.sin(), angles.cos()], -1)
    patches = torch.cat([line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)], -1)
    return F.pad(patches.flatten(0, 1), (0, 0, 1, 0))


def resized_positions(positions: Tensor, size: Sequence[int]) -> Tensor:
    """(g^2, D) of a square grid -> (D, h, w), bicubic where the size is another."""
    side = round(len(positions) ** 0.5)
    grid = positions.T.unflatten(-1, (side, side))
    if (side, side) == tuple(size):
        return grid
    return F.interpolate(grid.float()[None], size=tuple(size), mode="bicubic", align_corners=False)[0].to(grid.dtype)


class RegionTokens(nn.Module):
    """Stage 3: one token per feature map (its mean under the mask) and one for the shape of the mask.

    (maps of (B, width, h, w), mask (B, 1, H, W)) -> (B, maps + 1, width)
    """

    def __init__(self, width: int, hidden: int = 1024) -> None:
        super().__init__()
        self.pooled = nn.Linear(width, width)
        self.shape = nn.Sequential(
            nn.Linear(SHAPE * SHAPE, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, maps: Sequence[Tensor], mask: Tensor) -> Tensor:
        shape = F.interpolate(mask.to(maps[0].dtype), size=SHAPE, mode="bilinear", align_corners=False)
        return torch.stack([*(self.pooled(pool_region(x, mask)) for x in maps), self.shape(shape.flatten(1))], 1)


class VisualTokens(nn.Module):
    """From an encoder's tokens to the few that condition a diffusion model (and, in DEEM, that the language model reads).

    Args:
        width: D, of the encoder's tokens, a multiple of 4. grid: patches per side. resampler: reads tokens of width D.
        regions: with region tokens before the others; `forward` then needs mask and feature maps.
    """

    def __init__(self, width: int, grid: int, resampler: nn.Module, regions: bool = False) -> None:
        super().__init__()
        if width % 4:
            raise InputError(f"width={width} of the encoder's tokens is no multiple of 4, which the positions need")
        self.grid, self.resampler = grid, resampler
        self.project, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        self.regions = RegionTokens(width) if regions else None

    def forward(self, tokens: Tensor, mask: Tensor | None = None, maps: Sequence[Tensor] = ()) -> Tensor:
        """(B, 1 + grid^2, D), mask (B, 1, H, W), maps of (B, D, h, w) -> (B, Q, C).

        Raises:
            InputError: another number of tokens, or region tokens without mask and maps.
        """
        if tokens.shape[1] != 1 + self.grid**2:
            raise InputError(f"{tokens.shape[1]} tokens given: a class token and {self.grid} x {self.grid} are needed")
        if self.regions is not None and (mask is None or not maps):
            raise InputError("region tokens need a mask and the encoder's feature maps: give both")
        x = self.norm(self.project(tokens)) + self.positions.to(tokens.dtype)
        if mask is not None:
            patches = region_of(mask, (self.grid, self.grid)).flatten(2).transpose(1, 2)  # (B, g^2, 1)
            x = torch.cat([x[:, :1], x[:, 1:] * patches], 1)
        x = self.post_norm(x)
        if self.regions is not None:
            patches = self.positions[1:]
            placed = [y + resized_positions(patches, y.shape[-2:]).to(y.dtype) for y in maps]
            x = torch.cat([self.regions(placed, mask), x], 1)
        return self.resampler(x)


def small_linear(width: int, out: int, std: float = 1e-3) -> nn.Linear:
    """DEEM's projections: weights of `std`, no bias at first."""
    layer = nn.Linear(width, out)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class DiffusionFeedbackLoss(nn.Module):
    """The denoising loss of pictures, conditioned on their own visual tokens, by a frozen diffusion model.

    Args:
        unet: called as `unet(z, t, condition).sample`, with `config.cross_attention_dim`, as diffusers' UNet2DConditionModel.
        vae: with `encode(x).latent_dist.sample()` and `config.scaling_factor`, as AutoencoderKL.
        scheduler: with `alphas_cumprod` (T,) and `config.prediction_type`, epsilon or v_prediction.
        condition_projection: (B, Q, C) visual tokens -> (B, Q, cross_attention_dim); trained.
        spread: how far from the middle time steps may be. vae_batch: pictures encoded at once.

    UNet and VAE are frozen, in evaluation mode for good. For large ones call `unet.enable_gradient_checkpointing()` before.

    Raises:
        ModelError: the scheduler has no such field, or another prediction type; or the condition's width does not fit.
    """

    def __init__(self, unet: nn.Module, vae: nn.Module, scheduler: Any, condition_projection: nn.Module, *,
                 spread: float = 0.6, vae_batch: int = 32) -> None:  # fmt: skip
        super().__init__()
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(
                f"{type(scheduler).__name__} has no alphas_cumprod: choose a variance-preserving scheduler"
            )
        self.kind = scheduler.config.prediction_type
        target_of(self.kind, *torch.zeros(3, 1, 1, 1, 1))
        given, needed = getattr(condition_projection, "out_features", None), unet.config.cross_attention_dim
        if given not in (None, needed):
            raise ModelError(f"condition_projection gives {given} numbers a token, the UNet reads {needed}: change it")
        self.unet, self.vae, self.condition_projection = unet, vae, condition_projection
        self.spread, self.vae_batch = spread, vae_batch
        self.register_buffer("kept", scheduler.alphas_cumprod.detach().clone().float(), persistent=False)
        for frozen in (unet, vae):
            frozen.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DiffusionFeedbackLoss:
        """Only the projection changes its mode."""
        self.training = mode
        self.condition_projection.train(mode)
        return self

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> scaled latents (B, 4, h, w), drawn from the VAE's distribution."""
        parameter = next(self.vae.parameters())
        parts = (2 * images.to(parameter) - 1).split(self.vae_batch)
        return self.vae.config.scaling_factor * torch.cat([self.vae.encode(x).latent_dist.sample() for x in parts])

    def error(self, images: Tensor, tokens: Tensor, *, timesteps: Tensor | None = None, noise: Tensor | None = None,
              latents: Tensor | None = None) -> Tensor:  # fmt: skip
        """(B, 4, h, w) squared error of the UNet, fp32.

        Args:
            images: (B, 3, S, S) in [0, 1]; not looked at when latents are given. tokens: (B, Q, C), visual tokens.
            timesteps: (B,) in [0, T), before they are drawn to the middle. noise: like the latents. Drawn when absent.
        """
        z = (self.latents(images) if latents is None else latents).float()
        noise = torch.randn_like(z) if noise is None else noise
        total = len(self.kept)
        drawn = torch.randint(0, total, (len(z),), device=z.device) if timesteps is None else timesteps
        steps = feedback_timesteps(drawn, self.spread, total)
        kept = self.kept[steps]
        dtype = next(self.unet.parameters()).dtype
        condition = self.condition_projection(tokens).to(dtype)
        said = self.unet(add_noise(z, noise, kept).to(dtype), steps, condition).sample
        return F.mse_loss(said.float(), target_of(self.kind, z, noise, kept).float(), reduction="none")

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor | None = None, **drawn: Tensor) -> Tensor:
        """The loss, a scalar. mask: (B, 1, H, W), None for whole pictures. drawn: see `error`."""
        return region_loss(self.error(images, tokens, **drawn), mask)


@system(
    "deem",
    kind="train",
    paper=Paper(
        title="DEEM: Diffusion Models Serve as the Eyes of Large Language Models for Image Perception",
        authors="Luo, Run and Li, Yunshui and Chen, Longze and He, Wanwei and Lin, Ting-En and Liu, Ziqiang and Zhang, Lei "
        "and Song, Zikai and Alinejad-Rokny, Hamid and Xia, Xiaobo and Liu, Tongliang and Hui, Binyuan and Yang, Min",
        venue="ICLR",
        year=2025,
        arxiv="2405.15232",
        code="RainBowLuoCS/DEEM",
        licence="Apache-2.0",
    ),
    summary="a frozen diffusion model's denoising loss tunes the image encoder",
    needs=("cls",),
    published=(
        ("RobustVQA-A / -R / -V, accuracy, against their baseline (paper)", "53.2 / 56.1 / 54.7 -> 56.9 / 68.6 / 63.1"),
        ("POPE random / popular / adversarial, accuracy (paper)", "50.6 / 52.0 / 51.9 -> 69.9 / 70.3 / 68.9"),
    ),
)
@dataclass(frozen=True)
class DEEM:
    """The settings of the training; `sightline train deem` runs it."""

    weight: float = param(5.0, "weight of the feedback loss beside the language model's", low=0, high=1000)
    text_weight: float = param(1.0, "weight of the language model's loss", low=0, high=1000)
    spread: float = param(0.6, "share of the noise levels around the middle that is used", low=0, high=1)
    queries: int = param(77, "tokens that condition the diffusion model", low=1, high=4096)
    hidden: int = param(768, "width of the resampler", low=4, high=8192)
    depth: int = param(12, "layers of the resampler", low=1, high=128)
    heads: int = param(12, "heads of the resampler", low=1, high=128)

    def __post_init__(self) -> None:
        check_parameters(self)

    def tokens(self, width: int, grid: int, regions: bool = False) -> VisualTokens:
        """The module that reads an encoder of this width and grid."""
        resampler = Resampler(self.queries, self.hidden, width, depth=self.depth, heads=self.heads)
        return VisualTokens(width, grid, resampler, regions)

    def feedback(self, unet: nn.Module, vae: nn.Module, scheduler: Any) -> DiffusionFeedbackLoss:
        """The loss for the tokens of `tokens`, with a fresh projection."""
        projection = small_linear(self.hidden, unet.config.cross_attention_dim)
        return DiffusionFeedbackLoss(unet, vae, scheduler, projection, spread=self.spread)

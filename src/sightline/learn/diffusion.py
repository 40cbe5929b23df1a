"""Latent diffusion models for trainings that need one: released ones by name, or a tiny one trained on the generated world.

Tiny is a VAE (56 x 56 pixels to 4 x 14 x 14) and a UNet of about a million weights, in diffusers' own layout, made in minutes
of one core. In the place of a text, `SceneWords` turn what a scene holds into its condition: a token for the place and one per
object (kind, colour, box); no token is the zero vector, and a tenth of the pictures is drawn from zeros alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline import scenes
from sightline.errors import MissingExtraError, ModelError
from sightline.learn.data import scene_of, stream
from sightline.learn.loop import Trainer, named
from sightline.learn.recipe import Plan
from sightline.learn.tower import collate

SIDE, CONDITION, OBJECTS, UNCONDITIONAL = 56, 64, 7, 0.1
PLANS = {
    "vae": Plan(300, 8, 2e-3, weight_decay=0.0, warmup=20),
    "unet": Plan(700, 16, 2e-3, weight_decay=0.01, warmup=50),
}
KL = 1e-6  # Stable Diffusion's weight of the VAE's prior
PARTS = ("vae", "unet", "scheduler")
KINDS, COLOURS, CONTEXTS = list(scenes.KINDS), list(scenes.COLOURS), list(scenes.CONTEXTS)


@dataclass(frozen=True)
class Diffusion:
    """A latent diffusion model. `side`: of the pictures it draws, pixels."""

    unet: nn.Module
    vae: nn.Module
    scheduler: Any

    @property
    def side(self) -> int:
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device) -> Diffusion:
        self.unet.to(device)
        self.vae.to(device)
        return self


def diffusers() -> Any:
    """The library. MissingExtraError says how to get it."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("a diffusion model needs diffusers: pip install 'sightline[diffusers]'") from error
    return diffusers


def load(name: str | Path, dtype: torch.dtype = torch.float32) -> Diffusion:
    """UNet, VAE and scheduler of a folder or Hub id in diffusers' layout (Stable Diffusion 1.5, 2.1, or `tiny`'s).

    Raises:
        MissingExtraError: diffusers is missing. ModelError: it cannot be loaded.
    """
    library = diffusers()
    try:
        unet = library.UNet2DConditionModel.from_pretrained(
            name, subfolder="unet", torch_dtype=dtype, use_safetensors=True
        )
        vae = library.AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=dtype, use_safetensors=True)
        scheduler = library.DDPMScheduler.from_pretrained(name, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a diffusion model from {str(name)!r} ({str(error).splitlines()[0]}): give a folder or id with "
            f"{', '.join(PARTS)}"
        ) from error
    return Diffusion(unet, vae, scheduler)


def build(seed: int = 0, prediction_type: str = "epsilon") -> Diffusion:
    """The untrained tiny model, the same for the same seed."""
    library = diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = library.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32), norm_num_groups=8, sample_size=SIDE,
        )  # fmt: skip
        unet = library.UNet2DConditionModel(
            sample_size=SIDE // 4, down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2, block_out_channels=(32, 64), layers_per_block=1,
            cross_attention_dim=CONDITION, attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
    scheduler = library.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )  # Stable Diffusion's noise
    return Diffusion(unet, vae, scheduler)


class SceneWords(nn.Module):
    """What a scene holds as a condition: place (B,), kinds and colours (B, N), -1 none, boxes (B, N, 4) in [0, 1] -> (B, 1 + N, C)."""

    def __init__(self, width: int = CONDITION) -> None:
        super().__init__()
        self.place, self.kind = nn.Embedding(len(CONTEXTS), width), nn.Embedding(len(KINDS), width)
        self.colour, self.box = nn.Embedding(len(COLOURS), width), nn.Linear(16, width)

    def forward(self, place: Tensor, kind: Tensor, colour: Tensor, box: Tensor) -> Tensor:
        waves = torch.cat([f(torch.pi * k * box) for k in (1, 2) for f in (torch.sin, torch.cos)], -1)  # (B, N, 16)
        things = self.kind(kind.clamp(min=0)) + self.colour(colour.clamp(min=0)) + self.box(waves)
        return torch.cat([self.place(place)[:, None], things * (kind >= 0)[..., None]], 1)


def sample(index: int, seed: int) -> dict[str, np.ndarray]:
    """Pixels (S, S, 3) uint8 of a training scene, and what it holds, largest things first."""
    scene, rng = scene_of("diffusion", index, seed, SIDE)
    things = sorted(scene.objects, key=lambda thing: -thing.area)[:OBJECTS]
    kind, colour, box = np.full(OBJECTS, -1), np.full(OBJECTS, -1), np.zeros((OBJECTS, 4), np.float32)
    for k, thing in enumerate(things):
        kind[k], colour[k] = KINDS.index(thing.kind), COLOURS.index(thing.colour)
        box[k] = np.array(thing.box) / scene.size
    shown = np.float32(rng.random() >= UNCONDITIONAL)
    return {"pixels": np.asarray(scene.image), "place": np.array(CONTEXTS.index(scene.context)), "kind": kind,
            "colour": colour, "box": box, "shown": np.array(shown)}  # fmt: skip


def images_of(pixels: Tensor, side: int) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, side, side) in [0, 1]."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True).clamp(0, 1)


def tiny(out: Path, *, seed: int = 0, device: torch.device | str = "cpu", workers: int = 0,
         plans: dict[str, Plan] = PLANS) -> Diffusion:  # fmt: skip
    """The tiny model of the run in `out`: trained (an unfinished training goes on), or loaded when it is done.

    Leaves `out/vae`, `out/unet`, `out/scheduler` for `load`.
    """
    out = Path(out)
    if (out / "scheduler").is_dir():
        return load(out).to(device)
    made, make = build(seed).to(device), partial(sample, seed=seed)
    torch.manual_seed(seed)  # noise of both parts; a resumed run goes on with what its checkpoint holds
    vae = Trainer("vae.run", named("", made.vae), plans["vae"], out)
    vae.run(stream(make, collate, vae.plan, workers), partial(_vae_loss, vae=made.vae))
    made.vae.requires_grad_(False)
    made.vae.register_to_config(scaling_factor=_scale(made.vae, seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        words = SceneWords().to(device)
    unet = Trainer("unet.run", {**named("unet.", made.unet), **named("words.", words)}, plans["unet"], out)
    unet.run(stream(make, collate, unet.plan, workers), partial(_unet_loss, model=made, words=words))
    for name in PARTS:
        getattr(made, name).save_pretrained(out / name)
    return made


def _vae_loss(batch: dict[str, Tensor], vae: nn.Module) -> tuple[Tensor, dict]:
    x = 2 * images_of(batch["pixels"], SIDE).to(vae.device) - 1
    found = vae.encode(x).latent_dist
    error = F.l1_loss(vae.decode(found.sample()).sample, x)
    return error + KL * found.kl().mean(), {"error": error.detach()}


@torch.no_grad()
def _scale(vae: nn.Module, seed: int) -> float:
    """What makes latents of unit variance."""
    pixels = torch.from_numpy(np.stack([sample(k, seed)["pixels"] for k in range(64)]))
    z = vae.encode(2 * images_of(pixels, SIDE).to(vae.device) - 1).latent_dist.mean
    return float(1 / z.std())


def _unet_loss(batch: dict[str, Tensor], model: Diffusion, words: SceneWords) -> tuple[Tensor, dict]:
    """The plain denoising loss, conditioned on what the scene holds; and the same picture's gain by that."""
    from sightline.train.deem import add_noise

    device = model.unet.device
    batch = {key: value.to(device) for key, value in batch.items()}
    with torch.no_grad():
        z = model.vae.encode(2 * images_of(batch["pixels"], SIDE) - 1).latent_dist.sample()
        z = z * model.vae.config.scaling_factor
    noise, steps = torch.randn_like(z), torch.randint(0, len(model.scheduler.alphas_cumprod), (len(z),), device=device)
    condition = words(*(batch[key] for key in ("place", "kind", "colour", "box"))) * batch["shown"].view(-1, 1, 1)
    noisy = add_noise(z, noise, model.scheduler.alphas_cumprod.to(device)[steps])
    return F.mse_loss(model.unet(noisy, steps, condition).sample, noise), {}

"""Train the tiny image-text matcher on the generated world: which kind stands in which patch, by the exact masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sightline.matching import PATCH, SIDE, TINY, TinyMatcher, pixels_of
from sightline.scenes import KINDS, draw

LEAST = 0.3  # share of a patch that a kind must cover to be what stands there


def example(seed: int) -> tuple[Tensor, Tensor]:
    """A drawn scene: pixels (3, 64, 64), and what stands in every patch (16, 16): 0 background, else 1 + kind."""
    scene = draw(seed)
    covered = np.zeros((len(KINDS), *scene.image.size[::-1]), np.float32)
    for thing in scene.objects:
        covered[list(KINDS).index(thing.kind)] += thing.mask
    shares = F.adaptive_avg_pool2d(torch.from_numpy(covered), SIDE // PATCH)
    share, kind = shares.max(0)
    return pixels_of(scene.image), torch.where(share >= LEAST, kind + 1, 0)


def train(
    out: str | Path = TINY,
    *,
    scenes: int = 2000,
    epochs: int = 14,
    batch: int = 32,
    seed: int = 0,
    console: Console | None = None,
) -> float:
    """Train and save; returns the accuracy of "is this kind there?" on scenes that were not trained on.

    Args:
        out: where the weights go (fp16 safetensors).
        scenes, epochs, batch: size of the training.
        seed: of weights, order and scenes.
    """
    from safetensors.torch import save_file

    console = console or Console(stderr=True)
    torch.manual_seed(seed)
    model = TinyMatcher(len(KINDS))
    drawn = [example(s) for s in track(range(10**6, 10**6 + scenes), "scenes", console=console, transient=True)]
    pixels, kinds = (torch.stack(part) for part in zip(*drawn, strict=True))
    steps = epochs * (scenes // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
    weight = torch.ones(1 + len(KINDS))
    weight[0] = 0.2  # most patches show none
    for _ in track(range(epochs), "epochs", console=console, transient=True):
        for rows in torch.randperm(scenes)[: scenes // batch * batch].split(batch):
            x, y = pixels[rows], kinds[rows]
            if torch.rand(()) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            loss = F.cross_entropy(model(x), y, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        console.print(f"loss {loss.item():.3f}", style="dim")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, str(out))
    return accuracy(model.eval(), range(2 * 10**6, 2 * 10**6 + 200))


@torch.no_grad()
def accuracy(model: TinyMatcher, seeds: range) -> float:
    """Mean over kinds that are there and kinds that are not of how often "is it there?" is answered rightly."""
    right: dict[bool, list[float]] = {True: [], False: []}
    for s in seeds:
        pixels, kinds = example(s)
        found = model(pixels[None]).softmax(1)[0, 1:].flatten(1).amax(1) > 0.5
        there = torch.isin(torch.arange(1, 1 + len(KINDS)), kinds)
        for truth in (True, False):
            right[truth] += (found == there)[there == truth].float().tolist()
    return sum(float(np.mean(values)) for values in right.values()) / 2


if __name__ == "__main__":
    print(f"accuracy {train():.3f}")

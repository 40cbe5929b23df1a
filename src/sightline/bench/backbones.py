"""`sightline bench backbones`: parameters, operations and, when wanted, latency of every published variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sightline.bench.measure import timed
from sightline.errors import ParameterError


def run(
    names: Sequence[str] | None = None,
    *,
    time: bool = False,
    batch: int = 1,
    repeats: int = 5,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row per variant: counted and published parameters and multiply-accumulates; `time`: images per second.

    Raises:
        UnknownNameError, ParameterError: before any work.
    """
    from sightline import backbones
    from sightline.backbones import counting

    if batch < 1 or repeats < 1:
        raise ParameterError(f"batch={batch!r}, repeats={repeats!r}: choose 1 or more")
    chosen = [backbones.variant(name) for name in names] if names else list(backbones.VARIANTS.values())
    rows = []
    for one in chosen:
        shapes = backbones.create(one.name, device="meta")
        row = {
            "name": one.name,
            "system": one.system,
            "size": one.size,
            "parameters": counting.parameters(shapes),
            "published_parameters": one.parameters or (one.millions and round(one.millions * 1e6)),
            "macs": counting.macs(shapes, one.size),
            "published_macs": one.macs and round(one.macs * 1e9),
            "top1": one.top1,
        }
        if time:
            model = backbones.create(one.name).to(device).eval()
            x = torch.randn(batch, 3, one.size, one.size, device=device)
            with torch.inference_mode():
                seconds, _ = timed(lambda model=model, x=x: model(x), x.device, repeats, 5.0)
            row["images_per_second"] = batch / seconds
        rows.append(row)
        progress(describe(row))
    return rows


def describe(row: dict[str, Any]) -> str:
    speed = f", {row['images_per_second']:.1f} images/s" if "images_per_second" in row else ""
    return f"{row['name']}: {row['parameters'] / 1e6:.2f} M, {row['macs'] / 1e9:.2f} GMAC at {row['size']}{speed}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    timed_ = any("images_per_second" in row for row in rows)
    head = ["name", "operator", "size", "parameters", "published", "GMAC", "published", "top-1 (paper)"]
    head += ["images/s"] if timed_ else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        published = row["published_parameters"], row["published_macs"]
        cells = [
            row["name"],
            row["system"],
            str(row["size"]),
            f"{row['parameters']:,}",
            f"{published[0]:,}" if published[0] else "–",
            f"{row['macs'] / 1e9:.3f}",
            f"{published[1] / 1e9:g}" if published[1] else "–",
            f"{row['top1']:g}" if row["top1"] else "–",
        ]
        cells += [f"{row['images_per_second']:.1f}"] if timed_ else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

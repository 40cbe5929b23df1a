"""Do massive activations and attention sinks exist in a LLaVA? Measured, never planted.

phi(x) = max_d |x_d| / sqrt(mean_k x_k^2 + 1e-6) on the hidden states that enter every decoder layer, as in VAR (Kang et
al., ICLR 2025, arXiv 2503.03321), whose threshold 20 at width 4096 scales with sqrt(D), the most phi can be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sightline import scenes

QUESTION = "Please describe this image in detail."


def phi(hidden: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (...), in [1, sqrt(D)]."""
    hidden = hidden.float()
    return hidden.abs().amax(-1) / (hidden.pow(2).mean(-1) + 1e-6).sqrt()


def threshold(width: int) -> float:
    """VAR's 20 at width 4096, scaled to another width: 20 / 64 * sqrt(width)."""
    return 20 / 64 * math.sqrt(width)


def measure(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: int = 32,
            split: str = "val") -> dict:  # fmt: skip
    """Per layer input: phi of BOS, picture and text; massive dimensions; attention that text rows give to each.

    Also how often a visual token is over the threshold, how much attention such tokens get compared with an equal
    share of the picture's mass, and the share of them that lies on background. Eager attention while it runs.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        rows = [_one(model, processor, scenes.draw(seed)) for seed in scenes.seeds(split, pictures)]
    finally:
        model.set_attn_implementation(before)
    width, layers = model.config.text_config.hidden_size, model.config.text_config.num_hidden_layers
    dims = [Counter(row["dim"][layer] for row in rows).most_common(1)[0] for layer in range(layers)]
    result = {
        "pictures": pictures,
        "width": width,
        "limit": math.sqrt(width),
        "threshold": threshold(width),
        "layers": [],
    }
    for layer in range(layers):
        result["layers"].append({
            "bos_dim": dims[layer][0], "bos_dim_share": round(dims[layer][1] / pictures, 3),
            **{key: _mean([row[key][layer] for row in rows]) for key in _KEYS},
        })  # fmt: skip
    return result


_KEYS = ("phi_bos", "phi_image", "phi_image_max", "phi_text", "sinks", "sinks_on_background", "mass_bos", "mass_image",
         "mass_sinks", "mass_top4")  # fmt: skip


def _mean(values: list[float]) -> float | None:
    """Mean of what is a number; None if nothing is (no visual token over the threshold has no place either)."""
    known = [value for value in values if not math.isnan(value)]
    return round(float(np.mean(known)), 4) if known else None


def _one(model, processor, scene: scenes.Scene) -> dict[str, list[float]]:
    dialogue = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt").to(model.device, model.dtype)
    with torch.inference_mode():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    image = (inputs["input_ids"][0] == processor.image_token_id).cpu()
    after = torch.arange(len(image)) > int(image.nonzero().max())
    grid = int(image.sum()) ** 0.5
    owned = np.zeros((scene.size, scene.size), bool)
    for thing in scene.objects:
        owned |= thing.mask
    cell = scene.size // int(grid)
    background = torch.from_numpy(owned.reshape(int(grid), cell, int(grid), cell).mean((1, 3)) < 0.05).flatten()
    row: dict[str, list[float]] = {key: [] for key in (*_KEYS, "dim")}
    for hidden, attention in zip(out.hidden_states[:-1], out.attentions, strict=True):
        values = phi(hidden[0]).cpu()
        received = attention[0].float().mean(0)[after.to(attention.device)].mean(0).cpu()  # (K,) from text rows
        seen, high = received[image], values[image] > threshold(hidden.shape[-1])
        row["dim"].append(int(hidden[0, 0].abs().argmax()))
        row["phi_bos"].append(float(values[0]))
        row["phi_image"].append(float(values[image].mean()))
        row["phi_image_max"].append(float(values[image].max()))
        row["phi_text"].append(float(values[after].mean()))
        row["sinks"].append(float(high.sum()))
        row["sinks_on_background"].append(float(background[high].float().mean()) if high.any() else float("nan"))
        row["mass_bos"].append(float(received[0]))
        row["mass_image"].append(float(seen.sum()))
        row["mass_sinks"].append(float(seen[high].sum()))
        row["mass_top4"].append(float(seen.topk(4).values.sum()))
    return row


def draw(measured: dict):
    """phi and attention mass over layers: a matplotlib Figure with two panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers: Sequence[dict] = measured["layers"]
    x = range(len(layers))
    lines = {"phi_bos": "BOS", "phi_image_max": "largest visual token", "phi_image": "visual tokens, mean",
             "phi_text": "text, mean"}  # fmt: skip
    for key, label in lines.items():
        left.plot(x, [row[key] for row in layers], marker="o", markersize=3, label=label)
    left.axhline(measured["threshold"], color="0.4", linestyle="--", linewidth=1)
    left.text(0, measured["threshold"], " VAR threshold", va="bottom", fontsize=8, color="0.3")
    left.axhline(measured["limit"], color="0.7", linewidth=1)
    left.text(0, measured["limit"], " most possible, √D", va="top", fontsize=8, color="0.5")
    left.set_ylabel("φ entering the layer")
    masses = {"mass_bos": "BOS", "mass_image": "all visual tokens", "mass_top4": "top 4 visual tokens",
              "mass_sinks": "visual tokens over the threshold"}  # fmt: skip
    for key, label in masses.items():
        right.plot(x, [row[key] for row in layers], marker="o", markersize=3, label=label)
    right.set_ylabel("attention mass from text")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("decoder layer")
        axes.legend(fontsize=7, frameon=False)
    return figure

"""A question about a film of 32 frames, plain and with fewer visual tokens: tokens, seconds and answer of each.

    python examples/video_question.py

The film is drawn by the generated world. The model is a tiny random LLaVA with the bundled processor: what it answers
means nothing, how many tokens it reads and how long it takes is real. For real answers load a video model instead, for
example `sl.load("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")`.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import torch
from transformers import LlavaForConditionalGeneration

import sightline as sl
from sightline import scenes

FRAMES, QUESTION = 32, "Which way does the plate move, left or right?"
SYSTEMS = {
    "none": [],
    "quota": [sl.prune.QuoTA(enhance_tokens=49, enhance_total=FRAMES)],
    "slow-fast": [sl.prune.SlowFast(temporal_stride=4)],
}


def random_model(seed: int = 0) -> sl.loading.LVLM:
    """The bundled model's processor and shape with random weights, and room for 32 frames."""
    bundled = sl.load("tiny")
    config = copy.deepcopy(bundled.model.config)
    config.text_config.max_position_embeddings = 8192
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).to(bundled.device).eval()
    model.generation_config = bundled.model.generation_config
    return replace(bundled, model=model, name="random")


def ask(lvlm: sl.loading.LVLM, clip: sl.Clip, systems: list) -> dict:
    """Tokens that enter the decoder, seconds from the frames to the answer, and the answer."""
    entered: list[int] = []
    decoder = lvlm.model.model.language_model
    hook = decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    begin = time.perf_counter()
    answer = lvlm.ask(clip, QUESTION, systems=systems, max_new_tokens=8)
    seconds = time.perf_counter() - begin
    hook.remove()
    prompt = [n for n in entered if n > 1][-1]  # the last prompt: quota asks others before
    return {"tokens": prompt, "seconds": seconds, "answer": answer}


def main(frames: int = FRAMES) -> dict[str, dict]:
    film = scenes.film(0, frames=frames)
    clip = sl.Clip(film.frames, tuple(0.25 * k for k in range(frames)), film.name)
    lvlm = random_model()
    rows = {}
    for name, systems in SYSTEMS.items():
        rows[name] = ask(lvlm, clip, systems)
        print("{:10s} {tokens:6d} tokens {seconds:7.2f} s   {answer!r}".format(name, **rows[name]))
    return rows


if __name__ == "__main__":
    main()

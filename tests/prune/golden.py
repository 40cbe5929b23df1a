"""Golden cases of whole tiny LLaMAs: the official weights in a LLaVA of this library's hosts, its embeddings injected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sightline.engine.sequences import made_cache
from sightline.engine.system import System
from tests.engine.toys import toy
from tests.goldens import GOLDEN
from tests.tiny_parts import tower_config

IMAGE, TEXT = 9, 3


def cases(slug: str, like: str = "*") -> list[Path]:
    return sorted((GOLDEN / slug).glob(f"case_{like}.npz"))


def load(path: Path) -> dict[str, Any]:
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(path).items()}


def llama(case: dict[str, Any], heads: int) -> Any:
    """A LLaVA whose language model has the case's weights (names `w.layers...`, `w.norm.weight`)."""
    weights = {k[2:]: v for k, v in case.items() if k.startswith("w.") and ("layers." in k or "norm." in k)}
    weights = {k: v for k, v in weights.items() if "gates" not in k}
    dim = weights["layers.0.self_attn.q_proj.weight"].shape[1]
    config = tf.LlavaConfig(
        vision_config=tower_config(tf.CLIPVisionConfig, 16),
        text_config=tf.LlamaConfig(
            vocab_size=11,
            hidden_size=dim,
            intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
            num_hidden_layers=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("layers.")),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rms_norm_eps=case.get("rms_eps", 1e-6),
            rope_parameters={"rope_type": "default", "rope_theta": case.get("rope_theta", 10000.0)},
            max_position_embeddings=2048,
            pad_token_id=0,
        ),
        image_token_index=IMAGE,
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    missing = model.model.language_model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"embed_tokens.weight"}
    assert not missing.unexpected_keys
    return model


def inputs(case: dict[str, Any]) -> tuple[dict[str, Any], System]:
    """Inputs with the case's image span, and a system that puts the case's embeddings in."""
    embeddings = case["inputs_embeds"]
    ids = torch.full(embeddings.shape[:2], TEXT)
    ids[:, case["image_start"] : case["image_start"] + case["image_tokens"]] = IMAGE
    features = torch.zeros(case["image_tokens"], embeddings.shape[2])
    given = {"input_ids": ids, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features])}}
    return given, toy(visual_tokens=lambda site, value: embeddings, name="inject")


def states(model: Any, given: dict[str, Any]) -> tuple[Tensor, Any]:
    """(B, N, D) states after the final norm, and the cache."""
    found = []
    hook = model.model.language_model.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        output = model(**given, use_cache=True)
    hook.remove()
    return found[0].last_hidden_state, made_cache(output)

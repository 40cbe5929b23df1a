"""Image-text matchers: how well a text suits a picture, and which patches say so.

"tiny" is bundled (models/tiny-matcher) and knows the kinds of the generated world; every other name is a BLIP retrieval
checkpoint of transformers, read by Grad-CAM at one of its cross-attentions.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline.errors import ModelError, ParameterError

if TYPE_CHECKING:
    from PIL.Image import Image

TINY = Path(__file__).parent / "models" / "tiny-matcher" / "model.safetensors"
SIDE = 64  # pixels that the tiny matcher sees
PATCH = 4


class TinyMatcher(nn.Module):
    """A small convolutional network over the kinds of the generated world.

    (B, 3, 64, 64) -> (B, 1 + kinds, 16, 16) logits: which kind stands in a patch; 0 is background.
    """

    def __init__(self, kinds: int, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.GELU(),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width),
                nn.Conv2d(width, width, 5, padding=2, groups=width),
                nn.Conv2d(width, 2 * width, 1),
                nn.GELU(),
                nn.Conv2d(2 * width, width, 1),
            )
            for _ in range(depth)
        )
        self.head = nn.Conv2d(width, 1 + kinds, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    @torch.no_grad()
    def look(self, picture: Image, text: str) -> tuple[float, np.ndarray]:
        """Similarity in [0, 1] of the picture and the kinds that the text names, and their map (16, 16).

        A text that names no kind suits every picture and every patch alike (similarity 0, constant map).
        """
        from sightline.scenes import KINDS, mentions

        kinds = [1 + list(KINDS).index(kind) for kind in mentions(text)]
        if not kinds:
            return 0.0, np.ones((SIDE // PATCH, SIDE // PATCH), np.float32)
        pixels = pixels_of(picture)[None].to(self.head.weight.device)
        chances = self(pixels).softmax(1)[0, kinds]  # (kinds named, 16, 16)
        return float(chances.amax((1, 2)).mean()), chances.amax(0).cpu().numpy()


def pixels_of(picture: Image) -> Tensor:
    """(3, 64, 64) in [-1, 1]."""
    small = picture.convert("RGB").resize((SIDE, SIDE))
    return torch.from_numpy(np.asarray(small, np.float32).transpose(2, 0, 1) / 127.5 - 1)


class BLIPMatcher:
    """BLIP's image-text matching by transformers: similarity of its two encoders, Grad-CAM of its match score."""

    def __init__(self, model: Any, processor: Any, block: int) -> None:
        blocks = len(model.text_encoder.encoder.layer)
        if not 0 <= block < blocks:
            raise ParameterError(
                f"block={block} is out of range: this matcher has {blocks} blocks; choose 0..{blocks - 1}"
            )
        self.model, self.processor, self.block = model.eval(), processor, block

    def look(self, picture: Image, text: str) -> tuple[float, np.ndarray]:
        """Similarity in [-1, 1] of picture and text, and their Grad-CAM (h, w)."""
        from sightline.decode.agla import gradcam

        model = self.model
        words = self.processor.tokenizer(text, return_tensors="pt").to(model.device)
        pixels = self.processor.image_processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(model.device, next(model.parameters()).dtype)
        ids, mask = words["input_ids"], words["attention_mask"]
        with torch.no_grad():
            itc = float(model(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score)
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            output[1].retain_grad()
            seen.append(output[1])

        hook = model.text_encoder.encoder.layer[self.block].crossattention.self.register_forward_hook(keep)
        try:
            with torch.enable_grad(), torch.inference_mode(False):
                pixels, ids, mask = (x.clone().requires_grad_(x.is_floating_point()) for x in (pixels, ids, mask))
                score = model(ids, pixels, attention_mask=mask, use_itm_head=True).itm_score
                torch.autograd.backward(score[:, 1].sum(), inputs=[pixels, seen[0]])
        finally:
            hook.remove()
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        with torch.no_grad():
            cam = gradcam(seen[0], seen[0].grad, mask, (side, side))
        return itc, cam[0].float().cpu().numpy()


@lru_cache(maxsize=2)
def load_matcher(name: str, block: int = 6, device: torch.device | str = "cpu") -> TinyMatcher | BLIPMatcher:
    """A matcher by name; the last two stay loaded. Its `look(picture, text)` gives similarity and map.

    Raises:
        ModelError: the checkpoint cannot be loaded.
        ParameterError: it has no such block.
    """
    if name == "tiny":
        from safetensors.torch import load_file

        from sightline.scenes import KINDS

        model = TinyMatcher(len(KINDS))
        model.load_state_dict({k: v.float() for k, v in load_file(TINY).items()})
        return model.eval().to(device)
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    try:
        model = BlipForImageTextRetrieval.from_pretrained(name).to(device)
        processor = BlipProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"matcher {name!r} cannot be loaded as a BLIP retrieval model ({str(error).splitlines()[0]}): choose tiny, or a "
            "checkpoint such as Salesforce/blip-itm-large-coco"
        ) from error
    return BLIPMatcher(model, processor, block)

"""What the tiny hosts are made of: tokenizers trained in memory, pictures, configurations, seeded weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any

import torch
import transformers as tf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sightline.engine.prompts import note

CORPUS = (
    "Is there a dog in the image? Yes, there is a cat. No, there is not a cup.",
    "How many red cups are on the table? There are two red cups and one blue ball.",
    "Describe the picture. What colour is the small square? USER: ASSISTANT: The square is green.",
)
BASE_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


@lru_cache
def tokenizer_json(specials: tuple[str, ...]) -> str:
    """A byte-level BPE of about 350 entries; every text can be written and read back."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(specials) + len(alphabet) + 80
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(named: dict[str, str], others: tuple[str, ...] = ()) -> tf.PreTrainedTokenizerFast:
    """A fast tokenizer; `named` become attributes: {"image_token": "<image>"} gives `.image_token` and its `_id`."""
    specials = tuple(dict.fromkeys((*BASE_TOKENS, *named.values(), *others)))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(specials)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(others),
        model_specific_special_tokens=named,
        padding_side="left",
    )


def chat_template(image: str, video: str = "") -> str:
    """A minimal chat template that writes `image` for every picture and `video` for every video."""
    return (
        "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}"
        + image
        + "{% elif c['type'] == 'video' %}"
        + video
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A picture with coloured boxes on grey noise; the same for the same arguments."""
    rng = random.Random(seed * 7919 + width * 31 + height)
    image = Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = rng.randrange(width), rng.randrange(height)
        colour = tuple(rng.randrange(256) for _ in range(3))
        draw.rectangle((x, y, x + width // 3, y + height // 3), fill=colour)
    return image


@dataclass
class TinyHost:
    """A tiny vision-language model with its processor."""

    name: str
    model: Any
    processor: Any
    placeholder: str = "<image>"  # what a prompt holds for one picture
    nested: bool = False  # the processor wants one list of pictures per row
    generate_kwargs: dict[str, Any] = field(default_factory=dict)

    def inputs(
        self, questions: list[str], images: list[list[Image.Image]] | None = None, padding_side: str = "left"
    ) -> tf.BatchFeature:
        """Model inputs for a batch: each question may have 0, 1, 2, ... pictures."""
        rows = images if images is not None else [[] for _ in questions]
        prompts = [f"USER: {self.placeholder * len(r)}{q} ASSISTANT:" for q, r in zip(questions, rows, strict=True)]
        flat = [image for row in rows for image in row]
        pictures = (rows if self.nested else flat) if flat else None
        self.processor.tokenizer.padding_side = padding_side
        made = self.processor(
            images=pictures,
            text=prompts,
            return_tensors="pt",
            text_kwargs={"padding": True, "padding_side": padding_side},
        )
        note(made, rows, questions, processor=self.processor, again=lambda p, q: self.inputs(q, p))
        return made


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """Run a factory under a fixed seed, leaving the caller's random state alone."""

    @wraps(make)
    def build(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*args, **kwargs)

    return build


def randomize(model: torch.nn.Module, seed: int, embedding_std: float = 1.0) -> None:
    """Draw all matrices again with gain one: N(0, 1/fan_in); token embeddings N(0, embedding_std)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        transposed = name.endswith("mm_input_projection_weight")  # Gemma3 stores (in, out), and starts with zeros
        fan_in = p.shape[0] if transposed else p[0].numel()
        std = embedding_std if name.endswith("embed_tokens.weight") else fan_in**-0.5
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def finish(name: str, model: Any, processor: Any, embedding_std: float = 1.0, **kwargs: Any) -> TinyHost:
    """Seed the weights, set eval mode and a greedy generation config without specials and without an end."""
    randomize(model, 0, embedding_std)
    tokenizer = processor.tokenizer
    config = model.generation_config
    config.update(do_sample=False, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    config.eos_token_id = None
    config.suppress_tokens = sorted(tokenizer.all_special_ids)
    return TinyHost(name, model.eval(), processor, **kwargs)


def text_config(cls: type, tokenizer: Any, layers: int = 4, **kwargs: Any) -> Any:
    """A decoder of 4 heads over 2 key-value heads, width 32."""
    defaults = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return cls(**(defaults | kwargs))


def tower_config(cls: type, image: int, patch: int = 8, layers: int = 2, **kwargs: Any) -> Any:
    """A vision tower of 4 heads, width 32."""
    defaults = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
    )
    return cls(**(defaults | kwargs))

"""Fresh parts of a tiny LLaVA: tokenizer, processor, configuration and randomly initialised model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sightline.learn.recipe import Shape

THETA = 1e6  # of the rotary positions: more of a head's dimensions can compare contents over a few hundred tokens
WORDS = 0.1  # standard deviation of fresh word embeddings
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT:{% generation %} "
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join | trim }}"
    "{% endif %}</s>{% endgeneration %}"
    "{% else %}{{ 'USER: ' if message['role'] == 'user' else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join | trim }}"
    "{% endif %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(corpus: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens: any text encodes, and common words of `corpus` are one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=4,
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
    )


def processor(text: PreTrainedTokenizerFast, shape: Shape) -> LlavaProcessor:
    """The processor that turns pictures and prompts into the model's inputs, with a Vicuna-like chat template."""
    side = shape.image
    pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        pictures,
        text,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def config(shape: Shape, text: PreTrainedTokenizerFast) -> LlavaConfig:
    """CLIP tower with CLS, two-layer GELU projector from the last but one layer, Llama decoder with tied embeddings."""
    tower = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    decoder = LlamaConfig(
        vocab_size=len(text),
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=text.convert_tokens_to_ids(IMAGE),
        image_seq_length=shape.grid**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def waves(grid: int, width: int) -> torch.Tensor:
    """(grid^2, width) sines and cosines of rows and columns: positions a tower can tell apart from its first step.

    CLIP's own start (noise of 0.02) is lost beside the patches, and a small tower then takes long to find neighbours.
    """
    quarter = width // 4
    angles = torch.arange(grid)[:, None] * (grid * 2) ** (-torch.arange(quarter) / quarter)  # (G, W / 4)
    line = torch.cat([angles.sin(), angles.cos()], -1)  # (G, W / 2)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, 4 * quarter)


def match(query: nn.Linear, key: nn.Linear, heads: int, generator: torch.Generator) -> None:
    """Mimetic start of queries and keys (Trockman & Kolter, ICML 2023, arXiv 2305.09828), in place.

    Trained towers have query-key products near the identity: look at what is like you and near you. Starting there
    lets a small tower learn from few pictures.
    """
    width, size = query.in_features, query.out_features // heads
    for head in range(heads):
        noise = torch.randn(width, width, generator=generator) / width**0.5
        u, s, v = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(width))
        rows = slice(head * size, (head + 1) * size)
        query.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
        key.weight[rows] = v[:size] * s[:size, None].sqrt()


def contrast(value: nn.Linear, output: nn.Linear, generator: torch.Generator) -> None:
    """Mimetic start of a tower's values and output (same paper), in place: their product near minus the identity."""
    width = value.in_features
    noise = torch.randn(width, width, generator=generator) / width**0.5
    u, s, v = torch.linalg.svd(0.4 * noise - 0.4 * torch.eye(width))
    value.weight.copy_(v * s[:, None].sqrt())
    output.weight.copy_(u * s.sqrt())


def rotations(width: int) -> list[torch.Tensor]:
    """Three fixed rotations (D, D) of the word space: visual tokens speak of kinds, of places and of marks in these.

    In a rotated copy a word and the patches it names have different keys, so that a word can look for its patches
    without finding itself.
    """
    generator = torch.Generator().manual_seed(5)
    return [torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(3)]


def read(query: nn.Linear, key: nn.Linear, heads: int, generator: torch.Generator) -> None:
    """Start half of a decoder layer's heads as readers, in place: a word looks at the patches named by it.

    q = R x and k = R M x with a random R (mimetic, as above) and M the first of `rotations`, in those rotary dimensions
    that turn by less than half a round in a picture.
    """
    width, size = query.in_features, query.out_features // heads
    speed = THETA ** (-torch.arange(size // 2) / (size // 2))  # radians per position, of each pair of dimensions
    slow = (speed < 0.01).repeat(2)[:, None]
    kinds = rotations(width)[0]
    for head in range(heads // 2):
        content = torch.randn(size, width, generator=generator) * (0.5 / size) ** 0.5 * slow
        rows = slice(head * size, (head + 1) * size)
        query.weight[rows], key.weight[rows] = content, content @ kinds


def model(shape: Shape, text: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A randomly initialised model, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlavaForConditionalGeneration(config(shape, text))
    positions = made.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = 0.3 * waves(shape.grid, shape.vision_width)
        generator = torch.Generator().manual_seed(seed)
        for layer in made.model.vision_tower.encoder.layers:
            match(layer.self_attn.q_proj, layer.self_attn.k_proj, shape.vision_heads, generator)
            contrast(layer.self_attn.v_proj, layer.self_attn.out_proj, generator)
        made.get_input_embeddings().weight.normal_(std=WORDS, generator=generator)
        for layer in made.model.language_model.layers:
            read(layer.self_attn.q_proj, layer.self_attn.k_proj, shape.heads, generator)
        made.model.multi_modal_projector.linear_2.weight.mul_(0.02)  # a tower's features are large: start small
    made.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False,
        max_new_tokens=160,
    )  # fmt: skip
    return made

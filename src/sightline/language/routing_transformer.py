"""Efficient Content-Based Sparse Attention with Routing Transformers: the causal language model, for transformers.

TACL 2021, arXiv 2003.05997. Official code: google-research (Apache-2.0, TensorFlow 1). The operator is
`sightline.mix.routing_transformer`; no checkpoint is known whose keys could be kept.

    x = E[ids] + P;   every layer: x += W_o [local heads | routing heads](LN(x));  x += MLP(LN(x))          logits = E^T LN(x)
    local heads      the last `local_window` tokens                                layers below `routing_from`: all heads
    routing heads    the tokens of their clusters, as far as they are earlier; with `shared`, k = q / |q| for these heads
    loss             cross-entropy + beta mean |x^ - mu_nearest|^2, averaged over the layers; centroids move in training

Caching: there is none. Who is in a cluster is decided over the whole text, so that one more token can change what earlier
ones attended to; `generate` reads the text again for every token (at most `max_position_embeddings`), and asking for a cache
raises. For the same reason a score inside a longer text is not that of the text cut there, unless every cluster holds all
tokens (`window` >= length): the leak of the published method. Padding is refused: give texts of one length.

Differences from the official code: as in `mix.routing_transformer`; absolute learned positions; heads of a layer in one projection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from sightline.errors import InputError, ParameterError
from sightline.mix.gna import neighborhood_attention
from sightline.mix.routing_transformer import clustered_attention, commitment, k_means, members, new_means


class RoutingTransformerConfig(PretrainedConfig):
    """Sizes of a Routing Transformer.

    Args:
        routing_heads: of every layer from `routing_from` on (None: half of the heads, the last ones).
        clusters, window: centroids per head and members of a cluster. local_window: tokens that local heads see, their own too.
        shared: queries of routing heads are their keys too, so that every token of a cluster finds others.
        memories: learned keys and values per cluster; at least one where rows could be empty (not shared).
        commitment, decay: beta of the loss and lambda of the centroids.
    """

    model_type = "routing_transformer"
    keys_to_ignore_at_inference = ("aux_loss",)

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 4096,
        routing_heads: int | None = None,
        routing_from: int = 0,
        clusters: int = 16,
        window: int = 256,
        local_window: int = 256,
        shared: bool = True,
        memories: int = 0,
        commitment: float = 1e-4,
        decay: float = 0.999,
        initializer_range: float = 0.02,
        use_cache: bool = False,
        tie_word_embeddings: bool = True,
        **options: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.routing_heads = num_attention_heads // 2 if routing_heads is None else routing_heads
        self.routing_from, self.clusters, self.window, self.local_window = routing_from, clusters, window, local_window
        self.shared, self.memories = shared, memories
        self.commitment, self.decay, self.initializer_range = commitment, decay, initializer_range
        _check(self)
        super().__init__(use_cache=use_cache, tie_word_embeddings=tie_word_embeddings, **options)


def _check(config: RoutingTransformerConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ParameterError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads={config.num_attention_heads}"
        )
    if not 0 <= config.routing_heads <= config.num_attention_heads:
        raise ParameterError(f"routing_heads={config.routing_heads}: choose 0 to {config.num_attention_heads}")
    if config.clusters < 1 or config.window < 1 or config.local_window < 2:
        raise ParameterError(
            f"clusters={config.clusters}, window={config.window}, local_window={config.local_window}: "
            "choose at least 1, 1 and 2"
        )
    if not config.shared and config.memories < 1:
        raise ParameterError(f"memories={config.memories}: choose at least 1 where shared=False, rows could be empty")
    if not 0 <= config.decay <= 1:
        raise ParameterError(f"decay={config.decay}: choose a number in [0, 1]")


class RoutingAttention(nn.Module):
    """Local heads and routing heads side by side on (B, N, C)."""

    def __init__(self, config: RoutingTransformerConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.routing = config.routing_heads if layer >= config.routing_from else 0
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        if self.routing:
            self.register_buffer("means", torch.empty(self.routing, config.clusters, self.head_dim))
        if self.routing and config.memories:
            shape = self.routing, config.clusters, config.memories, self.head_dim
            self.mem_key, self.mem_value = (nn.Parameter(torch.empty(shape)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> the same, and the commitment loss of its routing heads."""
        local, routed = self._project(x)
        parts, loss = [], None
        if local:
            parts.append(self._local(*local))
        if routed:
            out, loss = self._routed(*routed)
            parts.append(out)
        return self.proj(torch.cat(parts, 2).flatten(2)), loss

    def _project(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """q, k, v (B, N, H', D) of the local and of the routing heads; () where there are none."""
        all_heads = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        cut = self.heads - self.routing
        local = tuple(t[:, :, :cut] for t in all_heads) if cut else ()
        if not self.routing:
            return local, ()
        q, k, v = (t[:, :, cut:] for t in all_heads)
        return local, (q, F.normalize(q, dim=-1) if self.config.shared else k, v)

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] > self.config.local_window:
            return neighborhood_attention(q, k, v, self.config.local_window, causal=True)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    def _routed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shared, window = self.config.shared, self.config.window
        q_index = members(q, self.means, window)
        k_index = q_index if shared else members(k, self.means, window)
        memory = (self.mem_key, self.mem_value) if self.config.memories else None
        out = clustered_attention(q, k, v, q_index, k_index, causal=True, shared=shared, memory=memory)
        tokens = self._routing_tokens(q, k)
        loss = commitment(tokens, self.means)
        if self.training:
            self.means.lerp_(new_means(tokens, self.means).to(self.means.dtype), 1 - self.config.decay)
        return out, loss

    def _routing_tokens(self, q: Tensor, k: Tensor) -> Tensor:
        return q if self.config.shared else torch.cat([q, k], 1)

    @torch.no_grad()
    def start(self, x: Tensor, generator: torch.Generator | None, steps: int = 10) -> None:
        """Centroids by k-means on the tokens of x, from some that `generator` draws."""
        q, k, _ = self._project(x)[1]
        self.means.copy_(k_means(self._routing_tokens(q, k), self.config.clusters, generator, steps))


class RoutingLayer(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: RoutingTransformerConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attn = RoutingAttention(config, layer)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, loss = self.attn(self.norm1(x))
        x = x + out
        return x + self.mlp(self.norm2(x)), loss


class RoutingTransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """See the module's head."""

    config_class = RoutingTransformerConfig
    _tied_weights_keys = {"lm_head.weight": "tokens.weight"}  # noqa: RUF012 (transformers reads it)
    _no_split_modules = ("RoutingLayer",)

    def __init__(self, config: RoutingTransformerConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(RoutingLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.use_cache = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RoutingAttention) and module.routing:
            nn.init.normal_(module.means)
            module.means.copy_(F.normalize(module.means, dim=-1))
            if module.config.memories:
                nn.init.normal_(module.mem_key)
                nn.init.normal_(module.mem_value)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        **options: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, N, V); with labels (B, N) the loss, commitment included; `aux_loss` is the commitment alone.

        Raises:
            InputError: padding, a cache, or a text longer than the positions.
        """
        if use_cache or options.get("past_key_values") is not None or options.get("cache") is not None:
            raise InputError(
                "a Routing Transformer has no cache: who is in a cluster depends on the whole text (use_cache=False)"
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise InputError("padding cannot go with clusters of fixed size: give texts of one length")
        x = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x, losses, states = self._embedded(x), [], [x]
        for layer in self.layers:
            states.append(x)
            x, loss = layer(x)
            losses += [] if loss is None else [loss]
        x = self.norm(x)
        logits = self.lm_head(x)
        aux = torch.stack(losses).mean() if losses else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            loss = loss if aux is None else loss + self.config.commitment * aux
        shown = (*states[1:], x) if output_hidden_states else None
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux, logits=logits, hidden_states=shown)

    def _embedded(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.config.max_position_embeddings:
            raise InputError(f"{x.shape[1]} tokens, the model knows {self.config.max_position_embeddings} positions")
        return x + self.places.weight[: x.shape[1]]

    @torch.no_grad()
    def start(self, input_ids: Tensor, generator: torch.Generator | None = None) -> None:
        """Set all centroids by k-means on texts (B, N), before training: layer by layer, each on what the ones before make."""
        x, training = self._embedded(self.tokens(input_ids)), self.training
        self.eval()
        for layer in self.layers:
            if layer.attn.routing:
                layer.attn.start(layer.norm1(x), generator)
            x, _ = layer(x)
        self.train(training)


AutoConfig.register(RoutingTransformerConfig.model_type, RoutingTransformerConfig)
AutoModelForCausalLM.register(RoutingTransformerConfig, RoutingTransformerForCausalLM)

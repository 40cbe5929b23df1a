"""FLOPs and cache bytes of a decoder's prefill by formula.

Per layer with n tokens, width d, H query and G key-value heads of width h, FFN width m (gated: three matrices):

    MACs(n) = 2 n d H h  +  2 n d G h  +  2 n^2 H h  +  3 n d m       q and o, k and v, QK' and PV, gate, up and down

With H h = d and G = H this is 4 n d^2 + 2 n^2 d + 3 n d m, which papers on token reduction call "FLOPs" (FastV's own form
has 2 n d m). True FLOPs are twice the MACs. Not counted: causal masking is not discounted; embedding, norms, rotary
positions, lm_head, tower and projector are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sightline.errors import ParameterError


@dataclass(frozen=True)
class Decoder:
    """The sizes that the formulas need."""

    layers: int
    hidden: int
    heads: int
    heads_kv: int
    head_dim: int
    ffn: int
    gated: bool = True

    @classmethod
    def of(cls, config: Any) -> Decoder:
        """From a transformers configuration (the text part of it)."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.intermediate_size,
        )

    def layer_macs(self, n: int) -> int:
        """Multiply-accumulates of one layer on n tokens."""
        if n < 0:
            raise ParameterError(f"n={n!r} tokens: give 0 or more")
        wide, narrow = self.heads * self.head_dim, self.heads_kv * self.head_dim
        matrices = 3 if self.gated else 2
        return 2 * n * self.hidden * (wide + narrow) + 2 * n * n * wide + matrices * n * self.hidden * self.ffn

    def prefill_macs(self, tokens: Sequence[int]) -> int:
        """Of all layers; `tokens` says how many enter each."""
        if len(tokens) != self.layers:
            raise ParameterError(f"{len(tokens)} token counts for {self.layers} layers: give one per layer")
        return sum(self.layer_macs(n) for n in tokens)

    def kv_bytes(self, tokens: Sequence[int], bytes_per_value: float) -> float:
        """Of keys and values; `tokens` says how many each layer keeps."""
        return 2 * sum(tokens) * self.heads_kv * self.head_dim * bytes_per_value

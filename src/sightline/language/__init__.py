"""Language models built on the mixers, registered in transformers. Importing this package registers them.

import sightline.language
model = AutoModelForCausalLM.from_config(RoutingTransformerConfig(vocab_size=32000))
"""

from __future__ import annotations

from sightline.language.routing_transformer import RoutingTransformerConfig, RoutingTransformerForCausalLM

__all__ = ["RoutingTransformerConfig", "RoutingTransformerForCausalLM"]

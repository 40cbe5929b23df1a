"""Systems that edit attention or hidden states while the model answers."""

from __future__ import annotations

from sightline.steer.var import VAR

__all__ = ["VAR"]

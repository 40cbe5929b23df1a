"""Training: the two-stage recipe of visual instruction tuning, and the bundled tiny LLaVA made with it."""

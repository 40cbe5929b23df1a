"""A system of your own in a few lines: look harder at the picture in every head, and watch the answer change.

python examples/add_a_system.py
"""

from dataclasses import dataclass

import torch

import sightline as sl
from sightline.engine.attention import Edit
from sightline.engine.system import Site, System


@dataclass(frozen=True)
class LookHarder(System):
    """Adds `strength` to the attention logits of all image tokens, for the text that follows them."""

    strength: float = 1.0

    def idle(self) -> bool:
        return self.strength == 0

    def attention(self, site: Site) -> Edit | None:
        start = max(site.tokens.first_after - site.start, 0)
        if start >= site.queries:
            return None
        bias = self.strength * site.tokens.visual.float()[:, None, None]  # (B, 1, 1, N)
        return Edit(start=start, bias=bias)


def main() -> None:
    """Ask the bundled model the example's question with growing strength."""
    from sightline.looking import example

    lvlm = sl.load("tiny")
    image, question = example()
    print(question)
    for strength in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        with sl.attach(lvlm.model, LookHarder(strength)):
            print(f"  strength {strength:3.1f}: {lvlm.ask(image, question)}")


if __name__ == "__main__":
    main()

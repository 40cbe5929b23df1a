"""How exact the engine is, family by family: p = 1 and restore bit for bit, VAR against whole maps.

python -m benchmarks.exactness
"""

from __future__ import annotations

import torch

import sightline as sl
from benchmarks.reference import naive_var
from sightline.steer.var import VAR
from tests.tiny_hosts import TINY, TinyHost, picture

ACTIVE = VAR(p=0.3, sink_dims=(3, 7), tau=2.0, summ=0.01, first_layer=0, skip_last_layer=False)
CASES = ("batch 1", "padded batch", "beams 3", "two images", "no image")


def generate(tiny: TinyHost, case: str) -> tuple[torch.Tensor, ...]:
    """Logits of every step of one case."""
    a, b = picture(seed=1), picture(width=40, height=60, seed=2)
    short, long = "What is this?", "A rather longer question about what is seen here?"
    questions, images = {
        "padded batch": ([short, long], [[a], [b]]),
        "two images": ([short], [[a, b]]),
        "no image": ([short], [[]]),
    }.get(case, ([short], [[a]]))
    options = {"num_beams": 3} if case == "beams 3" else {}
    with torch.no_grad():
        return tiny.model.generate(
            **tiny.inputs(questions, images), max_new_tokens=5, output_logits=True, return_dict_in_generate=True,
            **options, **tiny.generate_kwargs,
        ).logits  # fmt: skip


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def main() -> None:
    """Print one line per family and case."""
    worst = 0.0
    print(f"{'family':22s} {'case':14s} p=1 same  restored  VAR changed  VAR: max error against whole maps")
    for name, make in TINY.items():
        tiny = make()
        for case in CASES:
            plain = generate(tiny, case)
            with sl.attach(tiny.model, VAR(p=1.0, sink_dims=(3, 7), tau=2.0)):
                idle = generate(tiny, case)
            with sl.attach(tiny.model, ACTIVE):
                fast = generate(tiny, case)
            with naive_var(tiny.model, ACTIVE):
                slow = generate(tiny, case)
            after = generate(tiny, case)
            error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(fast, slow, strict=True))
            worst = max(worst, error)
            print(f"{name:22s} {case:14s} {equal(plain, idle)!s:9s} {equal(plain, after)!s:9s} "
                  f"{not equal(plain, fast)!s:12s} {error:.1e}")  # fmt: skip
    print(f"largest error, relative to the largest logit: {worst:.1e}")


if __name__ == "__main__":
    main()

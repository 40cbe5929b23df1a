"""The numbers of a tiny LLaVA: sizes of its parts and length of its training stages, with two presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from sightline.errors import ParameterError, UnknownNameError, nearest

STAGES = ("tower", "name", "read", "instruct", "settle")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `image` and `patch` in pixels; the image gives (image / patch)^2 visual tokens."""

    image: int = 112
    patch: int = 8
    vision_width: int = 192
    vision_layers: int = 5
    vision_heads: int = 6
    width: int = 256
    layers: int = 8
    heads: int = 8
    hidden: int = 640
    vocabulary: int = 768

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image // self.patch


@dataclass(frozen=True)
class Plan:
    """One stage: `steps` of `batch` samples at peak rate `lr`, linear warm-up of `warmup` steps, then cosine to 10 %.

    `muon`: the peak rate of Muon, which then trains the decoder layers' matrices (0: AdamW trains everything). `slow`: rate of word
    embeddings and of the parts named in `slow_parts`, relative to `lr`. `beta2`: AdamW's.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.1
    warmup: int = 100
    clip: float = 1.0
    muon: float = 0.0
    slow: float = 1.0
    slow_parts: tuple[str, ...] = ("projector.",)
    beta2: float = 0.95


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a tiny LLaVA.

    `patches`: visual tokens shown of each picture in the stage "read", whose first `simple` pictures are asked only for
    what is there and for colours. `turns`: questions per picture there and later. `text_every`: every so many batches of
    "settle" one is text without pictures (0: none).
    """

    shape: Shape = field(default_factory=Shape)
    tower: Plan = Plan(steps=2500, batch=16, lr=1e-3, weight_decay=0.05)
    name: Plan = Plan(steps=400, batch=16, lr=3e-3, weight_decay=0.0, warmup=20)
    read: Plan = Plan(steps=1500, batch=8, lr=1e-3, warmup=50, muon=0.01, slow=0.3)
    instruct: Plan = Plan(steps=1500, batch=8, lr=1e-3, warmup=50, muon=0.01, slow=0.3)
    settle: Plan = Plan(steps=5000, batch=4, lr=1e-3, slow=0.3)
    patches: int = 48
    simple: int = 2000
    turns: int = 12
    text_every: int = 2
    seed: int = 0

    def plan(self, stage: str) -> Plan:
        """The plan of one of STAGES."""
        if stage not in STAGES:
            raise UnknownNameError(f"no stage {stage!r}: {nearest(stage, list(STAGES))}")
        return getattr(self, stage)

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with every stage's steps (and warm-up) multiplied by `factor`, at least two steps each."""
        if not 0 < factor <= 1000:
            raise ParameterError(f"scale={factor!r} is out of range: choose a number in (0, 1000]")
        plans = {name: self.plan(name) for name in STAGES}
        return replace(self, **{
            name: replace(plan, steps=max(2, round(plan.steps * factor)), warmup=max(1, round(plan.warmup * factor)))
            for name, plan in plans.items()
        })  # fmt: skip

    def with_steps(self, stage: str, steps: int) -> Recipe:
        """The same recipe with `steps` steps in one stage."""
        if steps < 1:
            raise ParameterError(f"steps={steps!r} is out of range: choose a whole number from 1 on")
        plan = self.plan(stage)
        return replace(self, **{stage: replace(plan, steps=steps, warmup=min(plan.warmup, max(1, steps // 10)))})

    def as_dict(self) -> dict:
        """Plain nested dictionary, for the run's config.json."""
        return asdict(self)


TOY = Recipe(
    shape=Shape(image=56, patch=14, vision_width=16, vision_layers=2, vision_heads=2, width=32, layers=3, heads=2,
                hidden=48, vocabulary=400),
    tower=Plan(2, 2, 1e-3, warmup=1),
    name=Plan(2, 2, 1e-3, warmup=1),
    read=Plan(2, 2, 1e-3, warmup=1, muon=0.01),
    instruct=Plan(2, 2, 1e-3, warmup=1, muon=0.01),
    settle=Plan(4, 2, 1e-3, warmup=1),
    patches=6,
    simple=2,
    turns=2,
    text_every=2,
)  # fmt: skip
PRESETS = {"tiny": Recipe(), "toy": TOY}

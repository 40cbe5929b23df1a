"""POPE questions over scenes: Li et al., EMNLP 2023, arXiv 2305.10355, github.com/RUCAIBox/POPE.

Per picture, positives are present kinds; each is followed by one negative, never repeated and never present:
random = uniform over all kinds of the set; popular = the most frequent kinds of the set first; adversarial = the kinds
that co-occur most with that positive kind, first eligible, random where none is. Labels alternate yes, no.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sightline.errors import ParameterError, UnknownNameError, nearest
from sightline.scenes.kinds import KINDS
from sightline.scenes.naming import with_article
from sightline.scenes.scene import Scene

POPE_SPLITS = ("random", "popular", "adversarial")


def statistics(scenes: Sequence[Scene]) -> tuple[list[str], dict[str, list[str]]]:
    """Kinds by how many scenes have them, and for every kind the others by how many scenes have both. Ties by name."""
    frequency: Counter[str] = Counter()
    together: dict[str, Counter[str]] = {}
    for scene in scenes:
        present = sorted(scene.counts())
        frequency.update(present)
        for kind in present:
            together.setdefault(kind, Counter()).update(other for other in present if other != kind)

    def ranked(counter: Counter[str]) -> list[str]:
        return sorted(counter, key=lambda kind: (-counter[kind], kind))

    return ranked(frequency), {kind: ranked(counter) for kind, counter in together.items()}


def _negative(split: str, positive: str, barred: set[str], popular: list[str], together, rng) -> str:
    order = {"random": [], "popular": popular, "adversarial": together[positive]}[split]
    for kind in order:
        if kind not in barred:
            return kind
    free = [kind for kind in sorted(popular) if kind not in barred] or [kind for kind in KINDS if kind not in barred]
    return free[int(rng.integers(len(free)))]


def pope(
    scenes: Sequence[Scene], split: str = "random", per_image: int = 6, rng: np.random.Generator | None = None
) -> list[dict]:
    """POPE rows {"question_id", "image", "text", "label"} for the scenes with at least per_image / 2 kinds.

    `rng` chooses positives and random negatives (seed 0 if None). Raises ParameterError or UnknownNameError.
    """
    if split not in POPE_SPLITS:
        raise UnknownNameError(f"no POPE split {split!r}: {nearest(str(split), list(POPE_SPLITS))}")
    if per_image < 2 or per_image % 2 or per_image > 16:
        raise ParameterError(f"per_image={per_image!r} is out of range: choose an even number in [2, 16]")
    rng = rng if rng is not None else np.random.Generator(np.random.PCG64(0))
    popular, together = statistics(scenes)
    rows: list[dict] = []
    for scene in scenes:
        present = sorted(scene.counts())
        if len(present) < per_image // 2:
            continue
        barred = set(present)
        for k in rng.permutation(len(present))[: per_image // 2]:
            positive = present[int(k)]
            negative = _negative(split, positive, barred, popular, together, rng)
            barred.add(negative)
            for kind, label in ((positive, "yes"), (negative, "no")):
                text = f"Is there {with_article(kind)} in the image?"
                rows.append({"question_id": len(rows) + 1, "image": scene.file_name, "text": text, "label": label})
    return rows

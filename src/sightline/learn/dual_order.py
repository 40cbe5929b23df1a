"""Dual-order training (DOT): half of the records show the picture before the first question, half behind it.

An ablation of modality-mutual attention: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for
Multimodal LLMs", arXiv 2503.02597. With a causal mask visual tokens see the question only where it comes first; DOT trains
both orders and leaves the mask alone. Its code is not in the official repository (sony/aki), so what is not said there is chosen here:
the order of a record is drawn once, by seed and place in the file, and only the first question moves. Answers are asked for as always.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sightline.learn import conversation
from sightline.learn.conversation import Sample
from sightline.learn.instruct import Records, same_as_begun


class DualOrder(Records):
    """The samples of a LLaVA-format file of dialogues, about half of those with a picture text first."""

    def text_first(self, k: int) -> bool:
        """Whether the first question of record `k` comes before its picture."""
        return "image" in self.rows[k] and bool(np.random.default_rng((self.seed, k)).random() < 0.5)

    def sample(self, k: int) -> Sample:
        """Record `k` of the file, tokenised in its order."""
        if not self.text_first(k):
            return super().sample(k)
        ids, labels = conversation.encode(self.turns[k], self.processor, self.tokens, stage=2, text_first=True)
        return Sample(ids, labels, self._pixels(self.rows[k]["image"]))


def same_order(folder: Path, dual: bool) -> None:
    """Note with which orders a stage is trained; InputError when it was begun with others."""
    same_as_begun(Path(folder), "instruct", "order", "both orders" if dual else "picture first", "picture first")

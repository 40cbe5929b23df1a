"""Published trainings: their losses, modules and schedules, for any model of the right kind.

What a training needs besides (data, a loop that goes on after a kill, a command) stands in `sightline.learn`.
"""

from __future__ import annotations

from sightline.train.deem import DEEM, DiffusionFeedbackLoss, VisualTokens

__all__ = ["DEEM", "DiffusionFeedbackLoss", "VisualTokens"]

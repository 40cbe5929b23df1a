"""Arrays of the official codes, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.goldens import GOLDEN


def cases(slug: str, prefix: str = "case") -> pytest.MarkDecorator:
    """Parametrise a test by `path`, over the arrays of a system whose names begin with `prefix`; skip without them."""
    paths = sorted((GOLDEN / slug).glob(f"{prefix}*.npz"))
    if not paths:
        return pytest.mark.parametrize(
            "path", [pytest.param(None, marks=pytest.mark.skip("golden arrays are not here"))]
        )
    return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


def load(path: Path) -> dict[str, Any]:
    """Its arrays as tensors, its numbers as numbers."""
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(path).items()}

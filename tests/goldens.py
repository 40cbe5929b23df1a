"""Where the arrays computed by official codes are, if they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(os.environ.get("SIGHTLINE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))

"""The example of a question about a film: fewer tokens with quota and slow-fast."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "video_question.py"


@pytest.mark.parametrize("frames", [6, pytest.param(32, marks=pytest.mark.slow)])
def test_tokens(frames) -> None:
    spec = spec_from_file_location("video_question", EXAMPLE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.main(frames)
    text = rows["none"]["tokens"] - frames * 196
    assert 0 < text < 40 + frames
    assert rows["slow-fast"]["tokens"] == text + min(16, frames) * 49  # of 32 frames 16 fast ones, of 7 x 7 tokens
    assert text < rows["quota"]["tokens"] <= text + 32 * 49
    assert all(isinstance(row["answer"], str) and row["seconds"] > 0 for row in rows.values())

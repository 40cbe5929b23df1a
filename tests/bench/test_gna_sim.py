"""`bench gna-sim`: the bounds that the project's own documents state, files, bad requests."""

from __future__ import annotations

import json

import pytest

from sightline.bench import gna_sim
from sightline.errors import ParameterError


def test_published_bounds() -> None:
    one, flux, hopper, video = gna_sim.run()
    found = [(r["sweep"][0]["bound"], r["sweep"][0]["worst"], r["own"]["bound"]) for r in (one, flux, hopper, video)]
    wanted = [(14.32, 14.22, 16.0), (7.06, 6.10, 10.24), (7.52, 6.65, 10.24), (5.44, 3.60, 11.11)]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=0.01)
    assert one["best"]["stride"] == (256,)  # the smallest stride that is perfectly block-sparse
    assert flux["flop_bound"] == pytest.approx(10.24)
    share = flux["own"]
    assert share["end_to_end"] == pytest.approx(1 / (0.4 + 0.6 / share["bound"]))


def test_flattened_tiles_are_worse() -> None:
    problem = gna_sim.Problem("small", (32, 32), (8, 8), (4, 4), (4, 4), (4, 4))
    result = gna_sim.simulate(problem, 0.5)
    assert result["flat_stride_1"] < result["sweep"][0]["bound"] <= result["flop_bound"]
    assert gna_sim.simulate(gna_sim.PUBLISHED[1], 0.5)["flat_stride_1"] is None  # too large for the whole mask


def test_files(tmp_path) -> None:
    results = gna_sim.run(out=tmp_path / "sim")
    stored = json.loads((tmp_path / "sim/results.json").read_text())
    assert [r["name"] for r in stored] == [r["name"] for r in results]
    assert "16×8×8" in (tmp_path / "sim/table.md").read_text()
    assert (tmp_path / "sim/bounds.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "match"),
    [({"window": (40, 8)}, "40"), ({"q_tile": (0, 4)}, "q_tile"), ({"window": (8,)}, "window")],
)
def test_bad_problems(change, match) -> None:
    from dataclasses import replace

    problem = replace(gna_sim.Problem("small", (32, 32), (8, 8), (4, 4), (4, 4)), **change)
    with pytest.raises(ParameterError, match=match):
        gna_sim.run([problem])


def test_bad_share() -> None:
    with pytest.raises(ParameterError, match="share"):
        gna_sim.run(share=1.5)

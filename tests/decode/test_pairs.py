"""Pairs of systems with second streams: both act, in batches and with beams, on hosts that differ; what conflicts says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sightline as sl
from sightline.decode import LQCD, VDGD, VASparse
from sightline.errors import AttachError
from sightline.steer import VHR, VISTA, DualStreamEmphasis
from tests.engine.whole import generate
from tests.systems import CASES
from tests.tiny_hosts import picture

QUESTIONS, PICTURES = ["Is there a dog?", "How many red cups are on the table?"], [[picture()], [picture(80, 64, 1)]]
DSE, LEADING = CASES["dual-stream-emphasis"].active, CASES["lqcd"].active
PAIRS = {
    "var+vista": (CASES["var"].active, VISTA(lam=0.6)),
    "vhr+vdgd": (VHR(alpha=3.0), VDGD(alpha=0.3, description_tokens=4)),
    "dual-stream-emphasis+lqcd": (DSE, LEADING),
    "dual-stream-emphasis with guidance+lqcd": (replace(DSE, gamma=1.5, cfg_beta=0.0), LEADING),
}
HOSTS = [(pair, "llava") for pair in PAIRS] + [
    ("var+vista", "gemma3"),
    ("vhr+vdgd", "qwen2_5_vl"),
    ("dual-stream-emphasis+lqcd", "internvl"),
]


def inputs(host, rows=(0, 1)):
    return host.inputs([QUESTIONS[r] for r in rows], [PICTURES[r] for r in rows])


@pytest.mark.parametrize(("pair", "name"), HOSTS)
def test_pairs(pair, name, tiny) -> None:
    """With beams each row of a batch is what it is alone; and the pair is neither of the two."""
    host = tiny(name)
    first, second = PAIRS[pair]
    alone = []
    for system in (first, second):
        with sl.attach(host.model, system):
            alone.append(generate(host.model, inputs(host))[1][:, 0])
    with sl.attach(host.model, first, second) as attached:
        greedy = generate(host.model, inputs(host))[1][:, 0]
        ids, _ = generate(host.model, inputs(host), num_beams=3)
        for row in range(2):
            one, _ = generate(host.model, inputs(host, [row]), num_beams=3)
            assert torch.equal(ids[row, -5:], one[0, -5:])
    assert set(attached.report()) == {first.slug, second.slug}
    for found in alone:
        both = found.isfinite() & greedy.isfinite()
        assert not torch.equal(found.isfinite(), greedy.isfinite()) or (found - greedy)[both].abs().max() > 1e-4


@pytest.mark.parametrize("pair", [p for p in PAIRS if p != "vhr+vdgd"])
def test_pairs_without_a_cache(pair, tiny) -> None:
    host = tiny("llava")
    with sl.attach(host.model, *PAIRS[pair]):
        cached, anew = (generate(host.model, inputs(host), num_beams=2, use_cache=c) for c in (True, False))
    assert torch.equal(cached[0], anew[0])


def test_the_description_is_that_of_the_steered_model(tiny) -> None:
    """Beside VHR, VDGD's description is written with the same heads raised as the answer."""
    host = tiny("llava")
    vdgd = VDGD(alpha=0.3, description_tokens=6)
    texts = []
    for systems in ((vdgd,), (VHR(alpha=3.0), vdgd)):
        with sl.attach(host.model, *systems) as attached:
            generate(host.model, inputs(host))
        texts.append(attached.report()["vdgd"]["descriptions"])
    assert texts[0] != texts[1]


def test_conflicts_are_named(tiny) -> None:
    host = tiny("llava")
    for other in (LQCD(), VDGD(), replace(DSE, gamma=1.5)):
        with pytest.raises(AttachError, match="second prompt"):
            sl.attach(host.model, VASparse(), other)
    for systems in ((VASparse(), DSE), (VASparse(mode="release"), LQCD()), (DualStreamEmphasis(), VASparse())):
        with sl.attach(host.model, *systems):
            assert generate(host.model, inputs(host))[0].shape[0] == 2

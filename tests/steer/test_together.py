"""Pairs of steering systems: both act, in any company; what cannot go together says so."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import sightline as sl
from sightline.errors import AttachError, SightlineError
from tests.engine.numerics import assert_close
from tests.engine.whole import forward, generate
from tests.systems import CASES
from tests.tiny_hosts import picture

STEERING = ("var", "vhr", "vista", "dual-stream-emphasis", "cca", "aki-mma")
QUESTIONS = ["Is there a dog?", "How many red cups are on the table?"]
PICTURES = [picture(), picture(80, 64, 1)]


def batch(host):
    return host.inputs(QUESTIONS, [[p] for p in PICTURES])


@pytest.mark.parametrize("pair", list(combinations(STEERING, 2)), ids="+".join)
def test_pairs_run_and_both_act(pair, tiny):
    host = tiny("llava")
    systems = [CASES[slug].active for slug in pair]
    alone = []
    for system in systems:
        with sl.attach(host.model, system):
            alone.append(forward(host.model, batch(host)))
    with sl.attach(host.model, *systems) as attached:
        together = forward(host.model, batch(host))
        ids, steps = generate(host.model, batch(host))
        for row in range(2):
            one, mine = generate(host.model, host.inputs([QUESTIONS[row]], [[PICTURES[row]]]))
            assert torch.equal(ids[row, -5:], one[0, -5:])
            assert_close(f"row {row}", steps[row], mine[0], 5e-5)
    assert set(attached.report()) == set(pair)
    assert torch.isfinite(together).all()
    for found in alone:
        assert (found - together).abs().max() > 1e-4


def test_a_vector_of_the_model_as_it_was_trained(tiny):
    """Beside CCA, VISTA's plain run has CCA's positions and mask: the vector belongs to the model that answers."""
    host = tiny("llava")
    norms = []
    for systems in ([], [CASES["cca"].active], [CASES["var"].active]):
        with sl.attach(host.model, *systems, CASES["vista"].active) as attached:
            forward(host.model, batch(host))
        norms.append(attached.report()["vista"]["vector_norm"])
    assert norms[0] == norms[2]
    assert norms[0] != norms[1]


@pytest.mark.parametrize("slug", ["cca", "aki-mma"])
def test_masks_and_cuts_do_not_go_together(slug, tiny):
    from sightline.engine.select import Keep
    from tests.engine.toys import toy

    host = tiny("llava")

    def cut(site, hidden):
        if site.layer != 2:
            return None
        keep = ~site.tokens.visual
        keep[:, ::2] = True
        return Keep(keep)

    with sl.attach(host.model, CASES[slug].active, toy(cut=cut)):
        with pytest.raises(AttachError, match="cannot run together"):
            forward(host.model, batch(host))
        with pytest.raises(AttachError, match="cannot run together"):
            generate(host.model, batch(host))
    forward(host.model, batch(host))


def test_rings_need_all_visual_tokens(tiny):
    from sightline.engine.select import Keep
    from tests.engine.toys import toy

    host = tiny("llava")

    def visual_tokens(site, embeddings):
        keep = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        keep[:, 20] = False
        return Keep(keep)

    with (
        sl.attach(host.model, CASES["cca"].active, toy(visual_tokens=visual_tokens)),
        pytest.raises(SightlineError, match="drops visual tokens"),
    ):
        forward(host.model, batch(host))


@pytest.mark.parametrize("slug", ["vhr", "vista", "dual-stream-emphasis"])
def test_steering_shortened_prompts(slug, tiny):
    """Tokens that another system drops before or inside the decoder: finite, restored, and still acting."""
    from sightline.engine.select import Keep
    from tests.engine.toys import toy

    host = tiny("llava")

    def visual_tokens(site, embeddings):
        keep = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        keep[:, 12:24:2] = False
        return Keep(keep)

    def cut(site, hidden):
        keep = torch.ones(hidden.shape[:2], dtype=torch.bool)
        keep[:, 10:14] = False
        return Keep(keep) if site.layer == 2 else None

    front, inside = toy(visual_tokens=visual_tokens), toy(cut=cut)
    type(front).early = True
    for pruner in (front, inside):
        for order in (0, 1):
            systems = [CASES[slug].active, pruner][:: -1 if order else 1]
            with sl.attach(host.model, pruner):
                plain = generate(host.model, batch(host))[1]
            with sl.attach(host.model, *systems):
                if slug == "dual-stream-emphasis" and order and hasattr(pruner, "early"):
                    with pytest.raises(SightlineError, match="name dual-stream-emphasis first"):
                        generate(host.model, batch(host))
                    continue
                steps = generate(host.model, batch(host))[1]
            assert torch.isfinite(steps).all()
            assert (steps - plain).abs().max() > 1e-3

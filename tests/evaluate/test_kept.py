"""Quality against kept tokens: what is measured, which rows are compared, and what the figure shows."""

from __future__ import annotations

import numpy as np
import pytest

from sightline.decode.damro import DAMRO
from sightline.evaluate import cost, kept, pope, world
from sightline.evaluate.results import Row
from sightline.evaluate.stats import holm, mcnemar
from sightline.prune import VTCCLS, PyramidDrop, Random, ZipVL
from sightline.steer.var import VAR
from tests.evaluate.conftest import SIZE
from tests.evaluate.test_comparing import go, short


def row(label, correct, task="t"):
    answers = ["Yes" if right else "No" for right in correct]
    scored = pope.score(answers, ["yes"] * len(correct))
    return Row(task, label, len(correct), scored, scored.tally.intervals(draws=50), 1.0)


def right(count, of=60):
    return [k < count for k in range(of)]


@pytest.fixture(scope="module")
def task():
    return world.build("pope:random", n=6, size=SIZE)[0]


@pytest.mark.parametrize(
    ("systems", "expected"),
    [
        ((), 1.0),
        ((VTCCLS(7),), 7 / 36),
        ((Random(0.3),), 10 / 36),
        ((VTCCLS(7), DAMRO(topk=4)), 7 / 36),  # the second stream's prompt does not count
        ((PyramidDrop(layer_list=(1, 2), image_token_ratio_list=(0.5, 0.25)),), (36 + 18 + 9 + 9) / 4 / 36),
    ],
)
def test_the_share_is_counted(lvlm, task, systems, expected):
    model = lvlm()
    assert model.model.config.text_config.num_hidden_layers == 4
    assert cost.visual_share(model, systems, task, questions=2) == pytest.approx(expected, abs=1e-9)


def test_a_share_may_be_stated(lvlm, task):
    """ZipVL's layers work on all tokens; its attention sees some."""
    assert cost.visual_share(lvlm(), (ZipVL(tau=1.0, cache_mode="keep"),), task, questions=1) == 1
    assert 0 < cost.visual_share(lvlm(), (ZipVL(tau=0.5, recent=4, random=4),), task, questions=1) < 1


COST = {"none": {"visual_share": 1.0}, "random:ratio=0.5": {"visual_share": 0.5}, "random:ratio=0.1": {"visual_share": 0.1},
        "vtc-cls:keep=20": {"visual_share": 0.52}, "vtc-cls:keep=4": {"visual_share": 0.1},
        "hired": {"visual_share": 0.3}, "var+fopru": {"visual_share": 0.12}, "var": {"visual_share": 1.0}}  # fmt: skip
RIGHT = {"none": 58, "random:ratio=0.5": 30, "random:ratio=0.1": 20, "vtc-cls:keep=20": 50, "vtc-cls:keep=4": 22,
         "hired": 40, "var+fopru": 5, "var": 58}  # fmt: skip


@pytest.fixture
def rows():
    return [row(label, right(count)) for label, count in RIGHT.items()]


def test_rows_are_compared_with_the_random_row_that_keeps_as_many(rows):
    found = {b.row.label: b for b in kept.against_chance(rows, COST, draws=50)}
    assert set(found) == {"vtc-cls:keep=20", "vtc-cls:keep=4", "hired", "var+fopru"}
    assert {k: b.chance and b.chance.label for k, b in found.items()} == {
        "vtc-cls:keep=20": "random:ratio=0.5", "vtc-cls:keep=4": "random:ratio=0.1", "hired": None,
        "var+fopru": "random:ratio=0.1"}  # fmt: skip
    words = {k: b.found["verdict"] for k, b in found.items() if b.found}
    assert words == {"vtc-cls:keep=20": "better", "vtc-cls:keep=4": "noise", "var+fopru": "worse"}
    raw = [mcnemar(right(a), right(b)).p for a, b in ((30, 50), (20, 22), (20, 5))]
    assert [found[k].found["p_holm"] for k in words] == pytest.approx(holm(raw))
    f1 = [pope.score(["Yes" if r else "No" for r in right(n)], ["yes"] * 60)["f1"] for n in (30, 50)]
    assert found["vtc-cls:keep=20"].found["difference"] == pytest.approx(f1[1] - f1[0])


def test_tasks_are_tested_apart(rows):
    other = [row(label, right(RIGHT[label]), "u") for label in ("none", "vtc-cls:keep=4")]
    found = kept.against_chance([*rows, *other], COST, draws=50)
    assert [(b.row.task, b.chance) for b in found][-1] == ("u", None)
    assert found[1].found == kept.against_chance(rows, COST, draws=50)[1].found


def test_the_table_and_its_sentence(rows):
    text = kept.markdown(kept.against_chance(rows, COST, draws=50), COST)
    assert "| t | vtc-cls:keep=20 | 52.0 | f1 |" in text
    assert "| t | hired | 30.0 | f1 |" in text
    assert "no random row keeps as many" in text
    assert text.rstrip().endswith(
        "t, 3 comparisons: vtc-cls (at 52 %) beats random dropping; var+fopru (at 12 %) falls behind random dropping; "
        "all else is noise."
    )


def test_the_figure_has_a_line_per_reducer(rows):
    sheet = kept.picture(rows, COST)
    panel = sheet.axes[0]
    assert [t.get_text() for t in sheet.legends[0].get_texts()] == ["none", "random", "vtc-cls", "hired", "var+fopru"]
    drawn = {c.get_label(): c.lines[0].get_xydata() for c in panel.containers}
    assert np.allclose(drawn["vtc-cls"][:, 0], [52, 10], atol=1.5)  # set apart from each other a little
    assert np.allclose(drawn["vtc-cls"][:, 1], [100 * r.scored["f1"] for r in rows[3:5]])
    assert panel.get_xlim()[0] > panel.get_xlim()[1]  # the plain model stands left
    assert kept.lines([row("var", right(3)), row("none", right(3))], COST) == {}


def test_a_run_writes_them(lvlm, relation, console, tmp_path):
    systems = [[VTCCLS(24)], [Random(0.5)], [VAR(p=0.1)]]
    go(lvlm(), [short(relation)], systems, tmp_path, console, cost=True, rounds=1)
    assert (tmp_path / "kept.png").stat().st_size > 5000
    text = (tmp_path / "kept.md").read_text()
    assert text.count("\n| scenes_relation |") == 1
    assert "against random" in text

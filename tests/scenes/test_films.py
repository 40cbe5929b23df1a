"""Films of the generated world: the same from the same seed, and true frame by frame."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence
from typer.testing import CliRunner

from sightline import scenes
from sightline.errors import ParameterError, UnknownNameError
from sightline.scenes import export
from sightline.scenes.asking_films import FILM_ASKERS
from sightline.scenes.commands import app
from sightline.scenes.moving import BESIDE, PASSED

SEEDS = range(14)


@pytest.fixture(scope="module")
def films() -> list[scenes.Film]:
    return [scenes.film(seed, frames=16, size=84) for seed in SEEDS]


def test_the_same_seed_gives_the_same_film():
    first, again, other = (scenes.film(seed, frames=6, size=56) for seed in (5, 5, 6))
    assert first.truth() == again.truth() != other.truth()
    for one, two in zip(first.frames, again.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_fewer_frames_look_at_the_same_film():
    """u = i / (T - 1): frames 0, 2, 4, ... of 9 are the 5 frames of the coarser film."""
    fine, coarse = scenes.film(3, frames=9, size=56), scenes.film(3, frames=5, size=56)
    assert [t.kind for t in fine.tracks] == [t.kind for t in coarse.tracks]
    for k, frame in enumerate(coarse.frames):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(fine.frames[2 * k]))


def test_masks_boxes_and_shares_agree(films):
    for film in films:
        masks = np.stack([t.masks for t in film.tracks]) if film.tracks else np.zeros((0, 16, 84, 84), bool)
        assert (masks.sum(0) <= 1).all(), "a pixel has two owners"
        for track in film.tracks:
            assert track.masks.shape == (16, 84, 84)
            for mask, box, share in zip(track.masks, track.boxes, track.shares, strict=True):
                assert (box is None) == (share == 0) == (not mask.any())
                if box:
                    ys, xs = np.nonzero(mask)
                    assert box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_pixels_change_only_where_things_do(films):
    """The place and its light stand still: what differs between two frames lies near a thing that moved, came or went."""
    for film in films:
        for a, b in ((0, 15), (4, 9)):
            first, second = (np.asarray(film.frames[k], int) for k in (a, b))
            changed = np.abs(first - second).max(2) > 12
            near = np.zeros_like(changed)
            for track in film.tracks:
                if track.boxes[a] != track.boxes[b] or track.direction or not np.array_equal(*track.masks[[a, b]]):
                    for box in (track.boxes[a], track.boxes[b]):
                        if box:  # shadows reach a little further than their things
                            w, h = box[2] - box[0], box[3] - box[1]
                            x, y = max(0, int(box[0] - 0.3 * w - 4)), max(0, int(box[1] - 4))
                            near[y : int(box[3] + 0.3 * h + 6), x : int(box[2] + 0.3 * w + 4)] = True
            assert (changed & ~near).mean() < 0.004


def test_paths_do_what_they_are_called(films):
    seen = set()
    for film in films:
        for track in film.tracks:
            seen.add(track.path)
            assert track.settled
            start, end = track.in_view(0), track.in_view(15)
            expected = {"enters": (False, True), "appears": (False, True), "leaves": (True, False),
                        "vanishes": (True, False)}.get(track.path, (True, True))  # fmt: skip
            assert (start, end) == expected or track.path in ("still", "moves")
            x = [(b[0] + b[2]) / 2 for b in track.boxes if b]
            y = [(b[1] + b[3]) / 2 for b in track.boxes if b]
            if track.direction in ("left", "right"):
                assert (x[-1] - x[0]) * (1 if track.direction == "right" else -1) > 0
            elif track.direction:
                assert (y[-1] - y[0]) * (1 if track.direction == "down" else -1) > 0
    assert {"still", "moves", "enters", "leaves", "appears", "vanishes"} <= seen


def test_events_follow_from_what_is_seen():
    found = set()
    for seed in range(60):
        film = scenes.film(seed, frames=12, size=56)
        for event in film.events:
            found.add(event.what)
            track = film.tracks[event.track]
            if event.what in ("enters", "appears"):
                assert track.in_view(event.frame)
                assert not any(track.in_view(k) for k in range(event.frame))
            elif event.what in ("leaves", "vanishes"):
                assert track.in_view(event.frame - 1)
                assert not any(track.in_view(k) for k in range(event.frame, 12))
            elif event.what == "passes behind":
                assert event.track > event.other, "tracks are from front to back"
                assert track.direction
                assert film.covers[event.track, event.other] >= PASSED
                assert track.shares[event.frame] <= 1 - PASSED + 1e-6
        assert [e.frame for e in film.events] == sorted(e.frame for e in film.events)
    assert {"enters", "appears", "leaves", "vanishes", "passes behind"} <= found


def test_a_frame_is_a_scene(films):
    film = films[2]
    for k in (0, 7, 15):
        scene = film.scene(k)
        assert scene.image is film.frames[k]
        assert [o.kind for o in scene.objects] == [t.kind for t in film.tracks if t.boxes[k]]
        assert all(np.array_equal(o.mask, m) for o, m in zip(
            scene.objects, [t.masks[k] for t in film.tracks if t.boxes[k]], strict=True))  # fmt: skip


def _check(film, q):
    """The truth of a question, worked out again from boxes and shares alone."""
    a = film.tracks[q.about[0]] if q.about else None
    b = film.tracks[q.about[1]] if len(q.about) > 1 else None
    last = len(film) - 1
    if q.kind == "count":
        mine = [t for t in film.tracks if t.kind == a.kind]
        if "whole" in q.text:
            return str(len(mine))
        return str(sum(t.shares[0 if "start" in q.text else last] >= 0.5 for t in mine))
    if q.kind == "presence":
        return "yes" if a.shares[last if "still" in q.text else 0] >= 0.5 else "no"
    if q.kind == "motion" and "Which way" in q.text:
        first, end = (box for box in (a.boxes[a.first], a.boxes[a.last]))
        dx, dy = end[0] + end[2] - first[0] - first[2], end[1] + end[3] - first[1] - first[3]
        if "up or down" in q.text:
            return "down" if dy > 0 else "up"
        return "right" if dx > 0 else "left"
    if q.kind == "motion":
        return "yes" if a.direction else "no"
    if q.kind == "passing":
        return "yes" if film.covers[q.about] >= PASSED else "no" if film.covers[q.about] <= BESIDE else "?"
    coming = "into view" in q.text
    early = (a.first < b.first) if coming else (a.last < b.last)
    if q.text.startswith("Does"):
        return "yes" if early else "no"
    first = a if early else b
    return first.kind if q.truth == first.kind else f"{first.colour} {first.kind}"


def test_answers_are_true():
    seen = {kind: set() for kind in FILM_ASKERS}
    vocabulary = set(scenes.words(films=True))
    for seed in range(70):
        film = scenes.film(seed, frames=12, size=56)
        for q in scenes.film_questions(film, np.random.default_rng(seed), 8):
            seen[q.kind].add(q.truth)
            assert q.truth == _check(film, q), q
            assert all(0 <= k < 12 for k in q.frames)
            assert q.frames
            words = q.text.replace("?", "").replace(",", "").split() + q.answer.rstrip(".").split()
            assert vocabulary.issuperset(words), set(words) - vocabulary
    assert {"yes", "no"} <= seen["order"] & seen["passing"] & seen["presence"] & seen["motion"]
    assert {"left", "right"} <= seen["motion"]
    assert {"0", "1", "2"} <= seen["count"]


@pytest.mark.parametrize("arguments", [{"frames": 1}, {"frames": 2.5}, {"size": 10}, {"objects": (5, 2)}])
def test_bad_arguments(arguments):
    with pytest.raises(ParameterError):
        scenes.film(0, **arguments)
    with pytest.raises(UnknownNameError, match="kitchen"):
        scenes.film(0, context="kitchn")


def test_export_and_again(tmp_path):
    def content():
        return {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    export.films(range(3), tmp_path, size=56, frames=6)
    first = content()
    export.films(range(3), tmp_path, size=56, frames=6)
    assert content() == first
    rows = json.loads((tmp_path / "conversations.json").read_text())
    film = scenes.film(1, size=56, frames=6)
    assert rows[1]["video"] == film.name
    assert rows[1]["conversations"][0]["value"].startswith("<video>\n")
    assert len(rows[1]["moments"]) == len(rows[1]["conversations"]) // 2
    truth = json.loads((tmp_path / f"{film.name}.json").read_text())
    flat = np.repeat(np.arange(len(c := truth["tracks"][0]["masks"][2]["counts"])) % 2, c)
    np.testing.assert_array_equal(flat.reshape(56, 56, order="F").astype(bool), film.tracks[0].masks[2])
    for k, frame in enumerate(film.frames):
        with Image.open(tmp_path / film.name / f"frame_{k:03d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(frame))
    with Image.open(tmp_path / f"{film.name}.gif") as pages:
        shown = [page.info["duration"] for page in ImageSequence.Iterator(pages)]
    assert len(shown) <= 6  # frames that are the same are one, shown longer
    assert abs(sum(shown) - 4000) < 100


def test_commands(tmp_path):
    run = CliRunner().invoke(app, ["draw", "6", "--video", "--frames", "8", "--size", "56", "-o", str(tmp_path)])
    assert run.exit_code == 0
    assert "frame" in run.output
    assert len(list((tmp_path / "film_000000000006").glob("*.png"))) == 8
    page = tmp_path / "page.png"
    run = CliRunner().invoke(app, ["sheet", "--video", "--n", "2", "--frames", "8", "--size", "56", "-o", str(page)])
    assert run.exit_code == 0
    with Image.open(page) as picture:
        assert picture.size == (8 * 60 + 4, 2 * 60 + 4)

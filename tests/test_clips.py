"""Clips: reading, sampling, and what is refused; asking and looking at them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import sightline as sl
from sightline import hosts, scenes
from sightline.clips import Clip, is_clip, open_clip
from sightline.errors import InputError, ParameterError
from sightline.lvlm import LVLM
from sightline.report.figures import _unseen
from tests.tiny_hosts import TINY, picture

FRAMES = [picture(48, 40, k) for k in range(5)]


def save_gif(path, durations=(100, 300, 100, 100, 200)):
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], duration=list(durations))
    return path


def test_an_animation_keeps_its_times(tmp_path) -> None:
    clip = open_clip(save_gif(tmp_path / "film.gif"))
    assert len(clip) == 5
    assert clip.size == (48, 40)
    assert np.allclose(clip.times, [0, 0.1, 0.4, 0.5, 0.6])
    assert clip.name == "film.gif"


def test_a_folder_is_read_in_natural_order(tmp_path) -> None:
    for name, frame in (("f10.png", FRAMES[2]), ("f2.png", FRAMES[1]), ("f1.png", FRAMES[0])):
        frame.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    clip = open_clip(tmp_path)
    for frame, wanted in zip(clip.frames, FRAMES, strict=False):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(wanted))
    assert len(clip) == 3


def test_what_is_a_clip(tmp_path) -> None:
    FRAMES[0].save(tmp_path / "one.png")
    assert is_clip(tmp_path)
    assert is_clip(save_gif(tmp_path / "film.gif"))
    assert is_clip(Clip(tuple(FRAMES), (0, 1, 2, 3, 4)))
    for other in (tmp_path / "one.png", f"{tmp_path / 'film.gif'}#2", tmp_path / "none.gif", FRAMES, FRAMES[0], None):
        assert not is_clip(other)


def test_sampling() -> None:
    clip = open_clip(FRAMES, frames=None)
    assert clip.sample(5) is clip
    assert clip.sample(3).times == (0, 2, 4)
    assert clip.sample(1).times == (0,)
    assert clip.rate == 1
    with pytest.raises(ParameterError):
        clip.sample(0)


@pytest.mark.parametrize("make", [lambda: Clip((), ()), lambda: Clip(tuple(FRAMES), (0, 1)),
                                  lambda: Clip(tuple(FRAMES[:2]), (1, 1)),
                                  lambda: Clip((FRAMES[0], picture(8, 8)), (0, 1))])  # fmt: skip
def test_what_is_no_clip(make, tmp_path) -> None:
    with pytest.raises(InputError):
        make()
    with pytest.raises(InputError, match="without pictures"):
        open_clip(tmp_path)


def lvlm_of(name: str) -> LVLM:
    tiny = TINY[name]()
    return LVLM(tiny.model, tiny.processor, hosts.find(tiny.model), name)


def test_a_clip_is_its_frames_where_the_host_has_no_videos(tmp_path) -> None:
    lvlm = lvlm_of("llava")
    clip = open_clip(FRAMES)
    assert lvlm.ask(clip, "What moves?", max_new_tokens=6) == lvlm.ask([FRAMES], ["What moves?"], max_new_tokens=6)[0]
    path = save_gif(tmp_path / "film.gif")
    assert isinstance(lvlm.ask(path, "What moves?", max_new_tokens=2), str)
    batch = lvlm.ask([clip, clip], ["What moves?", "Is it red?"], max_new_tokens=6)
    assert batch[0] == lvlm.ask(clip, "What moves?", max_new_tokens=6)
    with pytest.raises(InputError, match="frames in one batch"):
        lvlm_of("qwen2_vl").inputs([clip, clip.sample(2)], "What?")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_look_shows_a_video_on_one_page(name, tmp_path) -> None:
    film = scenes.film(3, frames=6, size=64)
    lvlm = lvlm_of(name)
    seen = sl.look(Clip(film.frames, tuple(range(6))), "What moves?", model=lvlm, max_new_tokens=3)
    shown = 6 if name == "llava" else 3  # Qwen merges frames two by two
    assert len(seen.layout.grids) == shown
    assert seen.runs[0].rows.shape[-1] == len(seen.layout)
    assert seen.image.size == seen.layout.size
    for k in range(shown):  # every frame's tokens lie on that frame's place of the page
        boxes = seen.layout.boxes[seen.layout.crop == k]
        x, y = boxes[:, 0].min(), boxes[:, 1].min()
        cut = seen.image.crop((round(x), round(y), round(boxes[:, 2].max()), round(boxes[:, 3].max())))
        wanted = film.frames[k * (6 // shown)]
        assert abs(np.asarray(cut, float) - np.asarray(wanted.crop((0, 0, *cut.size)), float)).mean() < 1
    files = seen.save(tmp_path / "out")
    assert files["report"].is_file()


def test_look_at_a_video_with_fewer_tokens(tmp_path) -> None:
    """What quota drops is shown as dropped, on the host's own path for videos too."""
    film = scenes.film(3, frames=6, size=64)
    quota = sl.prune.QuoTA(enhance_tokens=3, enhance_total=3)
    seen = sl.look(Clip(film.frames, tuple(range(6))), "What moves?", model=lvlm_of("qwen2_5_vl"), systems=[quota],
                   max_new_tokens=2)  # fmt: skip
    assert seen.runs[1].label == "quota:enhance_tokens=3,enhance_total=3"  # as asked for, without what it found out
    assert len(seen.runs[1].notes["quota"]["probabilities"]) == 6
    assert seen.runs[1].rows.shape[-1] == len(seen.layout)
    (stage,) = seen.runs[1].stages
    assert 0 < stage.kept.sum() <= 9
    assert np.array_equal(_unseen(seen, stage.kept), np.flatnonzero(~stage.kept))  # in the first frame, too
    seen.save(tmp_path / "out")


def test_command(tmp_path, monkeypatch, capsys) -> None:
    from sightline import cli

    save_gif(tmp_path / "film.gif")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["look", "film.gif", "What moves?", "--max-new-tokens", "2"]) == 0
    assert (tmp_path / "look-film" / "report.html").is_file()
    assert Image.open(tmp_path / "film.gif").n_frames == 5


def test_frames_of_the_command(tmp_path, monkeypatch, capsys) -> None:
    """--frames chooses among a video's frames; what is no video, or no number of frames, is refused."""
    from sightline import cli

    save_gif(tmp_path / "film.gif")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["look", "film.gif", "What moves?", "--frames", "2", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"]["visual_tokens"] == 2 * 196
    for source, frames, said in (("film.gif#2", "2", "is one picture"), ("film.gif", "0", "from 1 up")):
        assert cli.main(["look", source, "What moves?", "--frames", frames]) == 2
        assert said in capsys.readouterr().err

"""A layout has as many tokens as its picture has placeholders, whatever the size; wrong sizes are noticed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import hosts
from sightline.errors import HostError, InputError
from tests.hosts.squares import grey
from tests.tiny_hosts import TINY, TINY_VITS, TinyHost, picture

sides = st.integers(9, 260)


@lru_cache
def tiny(name: str) -> TinyHost:
    return TINY[name]()


@pytest.mark.parametrize("name", list(TINY))
@settings(max_examples=25, deadline=None)
@given(size=st.tuples(sides, sides), other=st.tuples(sides, sides))
def test_as_many_tokens_as_placeholders(name: str, size: tuple[int, int], other: tuple[int, int]) -> None:
    host = tiny(name)
    inputs = host.inputs(["a", "b"], [[grey(size)], [grey(other)]])
    found = hosts.layouts(host.model, host.processor, inputs, [size, other])
    token = getattr(host.model.config, hosts.find(host.model).image_token)
    for row, layout in enumerate(found):
        assert len(layout) == int((inputs["input_ids"][row] == token).sum())
        inside(layout)


def inside(layout: hosts.geometry.Layout) -> None:
    """Laws of every layout: cells within grids, patches within patch grids, each patch once, boxes not empty."""
    real = layout.crop >= 0
    assert np.isnan(layout.boxes[~real]).all()
    boxes = layout.boxes[real]
    assert (boxes[:, 2] > boxes[:, 0]).all()
    assert (boxes[:, 3] > boxes[:, 1]).all()
    assert (layout.cell[real] < np.array(layout.grids)[layout.crop[real]]).all()
    assert (layout.cell[~real] == -1).all()
    for crop, (rows, columns) in enumerate(layout.patch_grids):
        taken = [p for t in np.flatnonzero(layout.crop == crop) for p in layout.patches[t]]
        assert all(0 <= p < rows * columns for p in taken)
        if (rows, columns) == layout.patch_grids[layout.base]:  # not tiles put together and shrunk
            assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("name", list(TINY))
def test_wrong_sizes_are_noticed(name: str) -> None:
    host = tiny(name)
    inputs = host.inputs(["a"], [[picture(100, 70)]])
    with pytest.raises(InputError, match="sizes"):
        hosts.layouts(host.model, host.processor, inputs, [(100, 70), (100, 70)])


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("llava", "gemma3")])
def test_swapped_size_is_noticed(name: str) -> None:
    """LLaVA-1.5 and Gemma 3 give the same inputs for any size; the others tell."""
    host = tiny(name)
    inputs = host.inputs(["a"], [[picture(140, 40)]])
    with pytest.raises(InputError, match="on the processor"):
        hosts.layouts(host.model, host.processor, inputs, [(40, 60)])


@pytest.mark.parametrize("name", list(TINY))
def test_inputs_must_be_tensors(name: str) -> None:
    host = tiny(name)
    prompt, images = [f"{host.placeholder} what?"], [[picture(100, 40)]]
    inputs = host.processor(images=images if host.nested else images[0], text=prompt)
    with pytest.raises(InputError, match="return_tensors"):
        hosts.layouts(host.model, host.processor, {k: list(v) for k, v in inputs.items()}, [(100, 40)])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_sizes_noted_by_the_processor_are_compared(name: str) -> None:
    """A size that gives as many tokens is noticed too."""
    host = tiny(name)
    inputs = host.inputs(["a"], [[picture(140, 40)]])
    with pytest.raises(InputError, match=r"not those of the inputs, \[\(140, 40\)\]"):
        hosts.layouts(host.model, host.processor, inputs, [(141, 40)])


def test_placeholders_are_counted() -> None:
    host = tiny("llava")
    inputs = host.inputs(["a"], [[picture(64, 48)]])
    with pytest.raises(InputError, match="36 image tokens"):
        hosts.layouts(host.model, host.processor, inputs, [])
    place = (inputs["input_ids"] == host.model.config.image_token_id).nonzero()[0]
    inputs["input_ids"][tuple(place)] = 9
    with pytest.raises(InputError, match=r"35 image tokens.*give 36"):
        hosts.layouts(host.model, host.processor, inputs, [(64, 48)])


@pytest.mark.parametrize("name", list(TINY))
def test_no_picture_no_layout(name: str) -> None:
    host = tiny(name)
    assert hosts.layouts(host.model, host.processor, host.inputs(["a"]), []) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("internvl", {"crop_to_patches": False}),
        ("idefics3", {"do_image_splitting": False}),
        ("gemma3", {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 24}),
    ],
)
def test_tiling_said_in_the_call_is_seen(name: str, said: dict) -> None:
    """The main switch of tiling may be given in the call: the number of views tells."""
    host = TINY[name]()
    host.processor.images_kwargs = dict(host.processor.images_kwargs)
    if name == "gemma3":
        host.processor.images_kwargs["pan_and_scan_min_crop_size"] = 24
    prompt = f"{host.placeholder} what?"
    inputs = host.processor(images=[[picture(100, 40)]], text=[prompt], return_tensors="pt", images_kwargs=said)
    (layout,) = hosts.layouts(host.model, host.processor, inputs, [(100, 40)])
    assert len(layout.grids) == {"gemma3": 1 + 3}.get(name, 1)


@pytest.mark.parametrize("name", list(TINY_VITS))
def test_vit_count_is_checked(name: str) -> None:
    vit = TINY_VITS[name]()
    with pytest.raises(InputError, match="sizes"):
        hosts.layouts(vit.model, vit.processor, vit.inputs([picture(), picture()]), [(64, 48)])


def test_host_without_geometry() -> None:
    host = TINY["llava"]()
    bare = hosts.Host("bare", ("LlavaForConditionalGeneration",))
    with pytest.raises(HostError, match="geometry"):
        hosts.layouts(host.model, host.processor, host.inputs(["a"], [[picture()]]), [(64, 48)], host=bare)

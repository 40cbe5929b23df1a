"""Resizing and centre crops of transformers and timm, read back from the pixels they make."""

from __future__ import annotations

import numpy as np
import pytest
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sightline.errors import HostError
from sightline.hosts.canvas import Canvas
from sightline.hosts.idefics3 import _longest
from sightline.hosts.plain import preprocessed, resized
from sightline.hosts.timm_vit import _after

sides = st.integers(12, 90)


def coordinates(size: tuple[int, int]) -> Image.Image:
    """A picture whose red is the column and whose green is the row, both plus 100."""
    y, x = np.indices((size[1], size[0]))
    return Image.fromarray(np.stack([x + 100, y + 100, 0 * x], axis=-1).astype(np.uint8))


def agree(canvas: Canvas, pixels: np.ndarray, size: tuple[int, int]) -> None:
    """Every processed pixel (H, W, 3) holds the coordinates that the canvas says; 0 in the padding."""
    assert pixels.shape[:2] == (canvas.height, canvas.width)
    x = canvas.bx + canvas.ax * (np.arange(canvas.width) + 0.5)
    y = canvas.by + canvas.ay * (np.arange(canvas.height) + 0.5)
    real = ((y > 0) & (y < size[1]))[:, None] & ((x > 0) & (x < size[0]))[None, :]
    assert ((pixels[..., 0] > 50) == real).all()
    inner = ((y > 3) & (y < size[1] - 3))[:, None] & ((x > 3) & (x < size[0] - 3))[None, :]  # resampling ends
    wanted = np.broadcast_to(np.stack(np.meshgrid(x, y), axis=-1) - 0.5 + 100, (*pixels.shape[:2], 2))
    off = np.abs(pixels[..., :2] - wanted)[inner]
    assert off.max(initial=0) < 0.75 + 0.5 * max(canvas.ax, canvas.ay)


RAW = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("kind", [tf.CLIPImageProcessor, tf.CLIPImageProcessorPil])
@settings(max_examples=40, deadline=None)
@given(size=st.tuples(sides, sides), shortest=sides, crop=st.tuples(sides, sides))
def test_shortest_edge_and_centre_crop(kind: type, size: tuple[int, int], shortest: int, crop: tuple[int, int]) -> None:
    """Also where the crop is larger than the resized picture: both back ends pad, with the odd pixel on other sides."""
    processor = kind(size={"shortest_edge": shortest}, crop_size={"width": crop[0], "height": crop[1]}, **RAW)
    pixels = processor(images=[coordinates(size)], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    agree(preprocessed(processor, size), pixels.astype(float), size)


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(sides, sides), pad=st.booleans(), shortest=sides)
def test_llava_pads_to_a_square_first(size: tuple[int, int], pad: bool, shortest: int) -> None:
    processor = tf.LlavaImageProcessor(
        do_pad=pad, image_mean=[0, 0, 0], size={"shortest_edge": shortest}, crop_size={"height": 30, "width": 30}, **RAW
    )
    pixels = processor(images=[coordinates(size)], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    canvas = preprocessed(processor, size, square=True)
    x = canvas.bx + canvas.ax * (np.arange(canvas.width) + 0.5)
    y = canvas.by + canvas.ay * (np.arange(canvas.height) + 0.5)
    blur = 1 + 2 * max(canvas.ax, canvas.ay, 1)  # the padding's edge is resampled too
    deep = ((y > blur) & (y < size[1] - blur))[:, None] & ((x > blur) & (x < size[0] - blur))[None, :]
    far = ((y < -blur) | (y > size[1] + blur))[:, None] | ((x < -blur) | (x > size[0] + blur))[None, :]
    assert (pixels[deep][:, 0] > 90).all()
    assert (pixels[far] < 10).all()


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(sides, sides),
    target=st.tuples(sides, sides),
    mode=st.sampled_from(["center", "squash", "border"]),
    share=st.sampled_from([0.8, 0.875, 1.0]),
    square=st.booleans(),
)
def test_evaluation_transforms_of_timm(
    size: tuple[int, int], target: tuple[int, int], mode: str, share: float, square: bool
) -> None:
    from timm.data.transforms_factory import transforms_imagenet_eval

    wanted = (target[0], target[0]) if square else target
    steps = transforms_imagenet_eval(wanted, crop_pct=share, crop_mode=mode, mean=(0, 0, 0), normalize=False).transforms
    canvas, image = Canvas(*size), coordinates(size)
    for step in steps:
        canvas, image = _after(canvas, step), step(image)
    agree(canvas, np.asarray(image).transpose(1, 2, 0).astype(float), size)


@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), longest=st.integers(20, 6000))
def test_longest_edge_of_idefics(size: tuple[int, int], longest: int) -> None:
    import torch
    from transformers.models.idefics3.image_processing_idefics3 import get_resize_output_image_size

    height, width = get_resize_output_image_size(torch.empty(3, size[1], size[0]), longest)
    assert _longest(size, {"longest_edge": longest}) == (width, height)


def test_unknown_steps_and_sizes_are_refused() -> None:
    from torchvision import transforms

    with pytest.raises(HostError, match="RandomCrop"):
        _after(Canvas(9, 9), transforms.RandomCrop(4))
    with pytest.raises(HostError, match="longest_edge"):
        resized(Canvas(9, 9), {"longest_edge": 4})

"""Every picture a person may have is read right, or refused with one line that names it."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from sightline import images
from sightline.errors import InputError
from sightline.images import open_image

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
pixels = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=24).map(lambda s: (*s, 3)))


def encode(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def same(image: Image.Image, expected: np.ndarray, atol: int = 0) -> bool:
    return image.mode == "RGB" and np.allclose(np.asarray(image).astype(int), expected.astype(int), rtol=0, atol=atol)


def grey(levels: list[int]) -> np.ndarray:
    """A 2-row picture of these 8-bit levels."""
    return np.repeat(np.array([levels, levels])[..., None], 3, axis=-1)


@given(pixels)
def test_lossless_files_arrays_and_images_agree(array):
    image = Image.fromarray(array)
    assert same(open_image(array), array)
    assert same(open_image(image), array)
    for fmt in ("PNG", "BMP", "TIFF", "PPM"):
        assert same(open_image(encode(image, fmt)), array), fmt
    assert same(open_image(encode(image, "WEBP", lossless=True)), array)


@given(pixels)
def test_reading_twice_changes_nothing(array):
    once = open_image(array)
    assert np.array_equal(np.asarray(open_image(once)), np.asarray(once))


@given(pixels, st.integers(1, 8))
def test_exif_rotation_is_applied(array, orientation):
    """The camera stores the turned picture and the turn; what is read is the upright one."""
    stored = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = open_image(encode(image, "PNG", exif=exif))
    assert same(read, array)
    assert 0x0112 not in read.getexif()


@given(hnp.arrays(np.uint16, (3, 5)))
def test_16_bit_is_scaled_by_its_range(values):
    expected = np.repeat(np.rint(values / 257.0)[..., None], 3, axis=-1)
    image = Image.fromarray(values)
    assert same(open_image(values), expected)
    assert same(open_image(image), expected)
    assert same(open_image(encode(image, "PNG")), expected)
    assert same(open_image(encode(image, "TIFF")), expected)
    assert same(open_image(Image.fromarray(values.astype(np.int32))), expected)


def test_16_bit_is_not_clipped():
    values = np.array([[0, 257, 32768, 65535]] * 2, dtype=np.uint16)
    assert same(open_image(values), grey([0, 1, 128, 255]))
    assert same(open_image(Image.fromarray(values.astype(">u2"))), grey([0, 1, 128, 255]))


def test_16_bit_colour_png():
    """Pillow cannot write it, so the file is put together by hand: one row red, one row mid grey."""
    rows = b"\0" + struct.pack(">6H", 65535, 0, 0, 65535, 0, 0) + b"\0" + struct.pack(">6H", *[32896] * 6)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    assert same(open_image(data), np.array([[RED, RED], [(128,) * 3] * 2]))


@given(hnp.arrays(np.uint8, (4, 3, 4)))
def test_alpha_lies_over_white(rgba):
    alpha = rgba[..., 3:] / 255.0
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert same(open_image(rgba), expected, atol=1)
    assert same(open_image(encode(Image.fromarray(rgba), "PNG")), expected, atol=1)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_transparent_is_white(mode):
    if mode == "PA":
        image = Image.new("P", (2, 2))
        image.putpalette([0, 0, 0])
        image = image.convert("PA")
        image.putalpha(0)
    else:
        image = Image.new(mode, (2, 2))
    assert same(open_image(image), np.full((2, 2, 3), 255))


def test_palette_with_and_without_transparency():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    assert open_image(encode(image)).getpixel((1, 1)) == RED
    assert open_image(encode(image)).getpixel((0, 0)) == BLACK
    see_through = open_image(encode(image, transparency=0))
    assert see_through.getpixel((0, 0)) == WHITE
    assert see_through.getpixel((1, 1)) == RED


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, WHITE),
        ("1", 0, BLACK),
        ("L", 77, (77,) * 3),
        ("CMYK", (0, 255, 255, 0), RED),
        ("CMYK", (0, 0, 0, 255), BLACK),
        ("HSV", (0, 255, 255), RED),
        ("YCbCr", (255, 128, 128), WHITE),
        ("LAB", (255, 128, 128), WHITE),
        ("I", 65535, WHITE),
        ("F", 255.0, WHITE),
        ("F", 0.5, (128,) * 3),
    ],
)
def test_odd_modes(mode, value, expected):
    assert np.allclose(open_image(Image.new(mode, (3, 2), value)).getpixel((1, 1)), expected, atol=2)


def test_lab_colour():
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (2, 2), (30, 160, 90)), transform)
    assert np.allclose(open_image(lab).getpixel((0, 0)), (30, 160, 90), atol=8)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_odd_modes_in_files(mode):
    image = Image.new("RGB", (16, 16), WHITE).convert(mode)
    fmt = "PNG" if mode == "1" else "JPEG"
    assert same(open_image(encode(image, fmt)), np.full((16, 16, 3), 255), atol=2)


def test_float_arrays():
    assert same(open_image(np.array([[0.0, 0.5, 1.0 + 1e-6]] * 2)), grey([0, 128, 255]))
    assert same(open_image(np.array([[0.0, 128.0, 255.0]] * 2, dtype=np.float32)), grey([0, 128, 255]))
    assert same(open_image(np.array([[False, True]] * 2)), grey([0, 255]))
    assert same(open_image(np.array([[0, 255]] * 2)[..., None]), grey([0, 255]))


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5)"),
        (np.zeros(7, np.uint8), "(7,)"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0"),
        (np.full((2, 2), np.nan), "nan"),
        (np.full((2, 2), -1.0), "-1"),
        (np.full((2, 2), 300.0), "300"),
        (np.full((2, 2), 300), "300"),
        (np.full((2, 2), -1), "-1"),
        (np.full((2, 2), "red"), "<U3"),
        (np.zeros((20_000, 300), np.uint8), "300 x 20000"),
    ],
)
def test_arrays_that_are_no_picture(array, named):
    with pytest.raises(InputError, match="array of shape") as caught:
        open_image(array)
    assert named in str(caught.value)


@pytest.mark.parametrize("values", [[-5, 10], [0, 70_000]])
def test_32_bit_without_agreed_brightness(values):
    with pytest.raises(InputError, match=f"from {values[0]} to {values[1]}"):
        open_image(Image.fromarray(np.array([values] * 2, dtype=np.int32)))


def frames(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(1, n + 1)]


@pytest.mark.parametrize(("fmt", "suffix"), [("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_animations_ask_for_a_frame(tmp_path, fmt, suffix):
    path = tmp_path / f"film.{suffix}"
    first, *rest = frames(3)
    path.write_bytes(encode(first, fmt, save_all=True, append_images=rest, lossless=True))
    with pytest.raises(InputError, match=f"film.{suffix}' has 3 (frames|pages): choose one, .*film.{suffix}#1'"):
        open_image(path)
    for frame in (1, 2, 3):
        assert abs(open_image(f"{path}#{frame}").getpixel((4, 4))[0] - 40 * frame) <= 1
        assert abs(open_image(path.read_bytes(), frame=frame).getpixel((4, 4))[0] - 40 * frame) <= 1
    for frame in (0, 4):
        with pytest.raises(InputError, match=rf"no frame {frame}: choose a frame in \[1, 3\]"):
            open_image(f"{path}#{frame}")


def test_a_name_that_ends_like_a_frame(tmp_path):
    path = tmp_path / "take#2"
    path.write_bytes(encode(Image.new("RGB", (4, 4), RED)))
    assert open_image(path).getpixel((0, 0)) == RED


def test_phone_pictures_with_a_second_view_are_one_picture():
    first, second = frames(2)
    assert abs(open_image(encode(first, "MPO", save_all=True, append_images=[second])).getpixel((4, 4))[0] - 40) <= 2


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF"])
@given(data=st.data())
def test_truncated_and_damaged_files_are_refused_or_read_but_never_crash(fmt, data):
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), fmt)
    cut = data.draw(st.integers(0, len(whole) - 24), label="cut")  # the last bytes may be checksums only
    with pytest.raises(InputError):
        open_image(whole[:cut])
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        assert open_image(bytes(damaged)).mode == "RGB"


@given(st.binary(max_size=200))
def test_random_bytes_are_no_picture(data):
    with pytest.raises(InputError):
        open_image(data)


def test_reading_warns_of_nothing():
    data = encode(Image.new("RGB", (9, 9)), "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cut in range(len(data)):
            with pytest.raises(InputError):
                open_image(data[:cut])


@pytest.mark.parametrize(
    ("head", "mend"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "magick"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "ffmpeg"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "export it as PNG"),
        (b"%PDF-1.7", "export it as PNG"),
        (b"\xff\x4f\xff\x51\0\x2f", "save it as PNG or JPEG"),
        (b"<!DOCTYPE html>", "download the picture itself"),
        (b"version https://git-lfs.github.com/spec/v1", "save it as PNG or JPEG"),
        (b"", "the file is empty"),
    ],
)
def test_foreign_formats_name_the_mend(tmp_path, head, mend):
    path = tmp_path / "photo.heic"
    path.write_bytes(head)
    with pytest.raises(InputError, match=mend) as caught:
        open_image(path)
    assert "photo.heic" in str(caught.value)


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "kitchen.png").write_bytes(encode(Image.new("RGB", (4, 4))))
    with pytest.raises(InputError, match=r"no such file; did you mean '.*kitchen\.png'"):
        open_image(tmp_path / "kitchn.png")
    with pytest.raises(InputError, match="cannot be listed"):
        open_image(tmp_path / "nowhere" / "kitchen.png")
    with pytest.raises(InputError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(InputError, match="web address"):
        open_image("https://example.org/cat.jpg")
    with pytest.raises(InputError, match="null"):
        open_image("a\0b.png")
    with pytest.raises(InputError, match="int: give a path"):
        open_image(3)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((1, 1), "1 x 1 pixels: too small"),
        ((1, 50), "1 x 50 pixels: too small"),
        ((20_000, 300), "20000 x 300 pixels"),
        ((2, 900), "longer than 100:1"),
    ],
)
def test_sizes_that_are_refused(tmp_path, size, named):
    path = tmp_path / "odd.png"
    path.write_bytes(encode(Image.new("RGB", size)))
    for source in (path, path.read_bytes(), Image.new("RGB", size)):
        with pytest.raises(InputError, match=named):
            open_image(source)


def test_decompression_bombs_are_refused_by_their_header():
    """A claim of 60000 x 60000 pixels (and the file behind it is damaged, which must not be reached)."""
    small = encode(Image.new("L", (2, 2)))
    header = struct.pack(">II", 60_000, 60_000) + small[24:29]
    bomb = small[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + small[33:]
    with pytest.raises(InputError, match="too large: 3600000000 pixels"):
        open_image(bomb)


def test_the_limits_themselves_are_allowed(monkeypatch):
    monkeypatch.setattr(images, "MAX_SIDE", 200)
    assert open_image(np.zeros((2, 200), np.uint8)).size == (200, 2)
    with pytest.raises(InputError, match="201 x 3"):
        open_image(np.zeros((3, 201), np.uint8))
    assert open_image(np.zeros((2, 2), np.uint8)).size == (2, 2)

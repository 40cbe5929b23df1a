"""Reading pictures: whatever a person has becomes one upright 8-bit RGB picture, or one clear error.

`open_image` is the only door: the command line, `LVLM.ask` and `look` all read pictures through it.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from sightline.errors import InputError

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray

SOFTWARE = (
    "sightline scenes"  # the note that pictures of the generated world carry; everything else may be a photograph
)
MIN_SIDE = 2  # pixels; a single pixel holds no place to look at
MAX_SIDE = 16384  # pixels
MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs
MAX_ASPECT = 100  # image processors scale the short side up first; longer strips would fill the memory
# Not JPEG 2000: its decoder fills what is cut off, silently.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "ICO", "QOI")

# What Pillow and its codecs raise on damaged data (zlib and struct errors included).
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, RuntimeError)
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def open_image(source: Picture, *, frame: int | None = None) -> Image.Image:
    """The picture as an upright RGB `PIL.Image` of 8 bits per channel, detached from its file.

    The EXIF rotation is applied; alpha is laid over white; 16-bit values are scaled by their range 0..65535; numbers in
    floating point mean 0..1, or 0..255 when one exceeds 1; CMYK, palette, LAB and 1-bit pictures are converted.

    Args:
        source: a path (`photo.gif#3` picks frame 3 of an animation), the bytes of a file, a PIL image (its current
            frame), or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        frame: which frame of an animation or page of a document, from 1.

    Raises:
        InputError: missing, damaged, animated, smaller than 2 or larger than 16384 pixels a side, longer than 100:1,
            or of a format that is not read; the message names the value and the mend.
    """
    if isinstance(source, np.ndarray):
        name = f"array of shape {source.shape}"
        return _to_rgb(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or f"<{source.mode} picture>")
        return _decode(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(bytes(source)), f"<{len(source)} bytes>", frame)
    if isinstance(source, str | os.PathLike):
        path, picked = _split_frame(os.fspath(source))
        with _open_file(path) as file:
            return _read(file, str(path), picked if frame is None else frame)
    raise InputError(
        f"cannot read a picture from {type(source).__name__}: give a path, bytes, a PIL image or a numpy array"
    )


def _split_frame(text: str) -> tuple[str, int | None]:
    """`photo.gif#3` as ("photo.gif", 3); a file whose name really ends in #3 wins."""
    found = re.fullmatch(r"(.+)#(\d+)", text, flags=re.DOTALL)
    if found is None or os.path.lexists(text):
        return text, None
    return found[1], int(found[2])


def _open_file(text: str) -> io.BufferedReader:
    if re.match(r"[a-z][a-z0-9+.-]+://", text, flags=re.IGNORECASE):
        raise InputError(f"cannot read {text!r}: it is a web address; download the picture and give its path")
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            raise InputError(f"cannot read {text!r}: it is a folder; give the path of one picture in it")
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"cannot read {text!r}: no such file{_suggest(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {text!r}: {reason}; check the path and its permissions") from error


def _suggest(path: Path) -> str:
    try:
        close = get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return f"; the folder {str(path.parent)!r} cannot be listed either"
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else "; check the path"


def _read(file: io.BufferedIOBase, name: str, frame: int | None) -> Image.Image:
    head = file.read(64)
    if not head:
        raise InputError(f"cannot read {name!r}: the file is empty; fetch or save the picture again")
    file.seek(0)
    with warnings.catch_warnings():  # Pillow warns of odd metadata; what matters is raised below
        warnings.simplefilter("ignore")
        with _identify(file, head, name) as image:
            _check_size(image.size, name)
            _choose_frame(image, name, frame)
            return _decode(image, name)


def _identify(file: io.BufferedIOBase, head: bytes, name: str) -> Image.Image:
    """Read the header only; the pixels are decoded once the size is known to be sound."""
    Image.init()
    try:
        return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise InputError(_too_large(name, f"{int(pixels[0])} pixels" if pixels else str(error))) from error
    except _DAMAGE as error:
        raise InputError(f"cannot read {name!r}: {_foreign(head, error)}") from error


def tiled(pictures: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures row by row in equal cells, `columns` to a row, with thin white gaps."""
    width, height = max(p.width for p in pictures) + gap, max(p.height for p in pictures) + gap
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * width + gap, rows * height + gap), (255, 255, 255))
    for k, picture in enumerate(pictures):
        page.paste(picture, (gap + k % columns * width, gap + k // columns * height))
    return page


def count_frames(path: str | os.PathLike) -> int:
    """How many frames an animation has; 1 for a still picture, and for what is no picture at all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                return 1 if image.format in ("MPO", "TIFF", "ICO") else getattr(image, "n_frames", 1)
    except (*_DAMAGE, Image.DecompressionBombError):
        return 1


def _choose_frame(image: Image.Image, name: str, frame: int | None) -> None:
    """Seek to the wanted frame. The further views of an MPO (phone and stereo cameras) are not frames."""
    try:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except _DAMAGE as error:
        raise InputError(_damaged(name, error)) from error
    if frame is None and frames > 1:
        what = "pages" if image.format == "TIFF" else "frames"
        raise InputError(f"{name!r} has {frames} {what}: choose one, for example {name + '#1'!r} for the first")
    if frame is not None and not 1 <= frame <= frames:
        raise InputError(f"{name!r} has no frame {frame}: choose a frame in [1, {frames}]")
    try:
        image.seek((frame or 1) - 1)
    except _DAMAGE as error:
        raise InputError(_damaged(name, error)) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode the pixels of the current frame, turn them upright and convert them."""
    _check_size(image.size, name)
    try:
        image.load()
    except MemoryError as error:
        raise InputError(_too_large(name, f"{image.width} x {image.height} pixels")) from error
    except _DAMAGE as error:
        raise InputError(_damaged(name, error)) from error
    try:
        upright = ImageOps.exif_transpose(image)
    except _DAMAGE:  # damaged EXIF around sound pixels
        upright = image.copy()
    return _to_rgb(upright, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I":  # Pillow's 32-bit mode, in which 16-bit files arrive too
        image = _from_array(_as_16_bit(np.asarray(image), name), name)
    elif image.mode == "F" or image.mode.startswith("I;16"):
        image = _from_array(np.asarray(image), name)
    elif image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, transform)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    ours = image.info.get("Software") == SOFTWARE or image.info.get("comment") == SOFTWARE.encode()  # PNG, GIF
    rgb.info = {"Software": SOFTWARE} if ours else {}
    return rgb


def _from_array(values: np.ndarray, name: str) -> Image.Image:
    """An 8-bit picture from numbers, (H, W) or (H, W, 1 | 3 | 4); see `open_image` for their ranges."""
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise InputError(f"{name}: shape (height, width), (height, width, 3) or (height, width, 4) is needed")
    _check_size((values.shape[1], values.shape[0]), name)
    if values.dtype == bool:
        values = values * 255
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:
        values = np.rint(values / 257.0)
    elif values.dtype.kind == "f":
        values = np.rint(_unit(values, name) * 255)
    elif values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        span = f" from {values.min()} to {values.max()}" if values.dtype.kind in "iu" else ""
        raise InputError(f"{name}: {values.dtype} values{span}; give uint8 (0..255), uint16 (0..65535) or float (0..1)")
    return Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))


def _unit(values: np.ndarray, name: str) -> np.ndarray:
    """Floats as 0..1. Pillow's own float pictures count to 255; rounding noise beside 0 and 1 is clipped."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < -1e-3 or high > 255.5:
        raise InputError(f"{name}: values from {low:g} to {high:g}; scale them to 0..1")
    return np.clip(values if high <= 1 + 1e-3 else values / 255, 0, 1)


def _as_16_bit(values: np.ndarray, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"{name!r}: 32-bit values from {values.min()} to {values.max()} have no agreed brightness; "
            "save the picture with 8 or 16 bits"
        )
    return values.astype(np.uint16)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise InputError(f"{name!r} is {width} x {height} pixels: too small, {MIN_SIDE} x {MIN_SIDE} at least")
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{width} x {height} pixels"))
    if max(size) > MAX_ASPECT * min(size):
        raise InputError(f"{name!r} is {width} x {height} pixels, longer than {MAX_ASPECT}:1; crop it")


def _too_large(name: str, size: str) -> str:
    return (
        f"{name!r} is too large: {size}; at most {MAX_SIDE} a side and {MAX_PIXELS // 10**6} million in all are read, "
        "so shrink or crop it first"
    )


def _damaged(name: str, error: Exception) -> str:
    return f"cannot read {name!r}: the picture is damaged or cut off ({error}); fetch or save it again"


def _foreign(head: bytes, error: Exception) -> str:
    """Why a file that Pillow did not recognise cannot be read, from its first bytes."""
    text = head.lstrip().lower()
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "it is a HEIC photograph; convert it, for example with `magick photo.heic photo.jpg`"
    if head[4:8] == b"ftyp" or head[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
        return "it is a film or sound; save one frame as PNG, for example `ffmpeg -i film.mp4 -vframes 1 frame.png`"
    if text.startswith((b"<svg", b"<?xml", b"%pdf", b"%!ps")):
        return "it is a document or a vector drawing; export it as PNG"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page, not a picture; download the picture itself"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is damaged or no picture; save it as PNG or JPEG (also read: WebP, GIF, TIFF, BMP, AVIF)"
    return f"it is damaged or cut off ({error}); fetch or save it again"

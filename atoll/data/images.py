"""What counts as an image, and how any image becomes 8-bit RGB: by fixed public rules only.

No rule looks at an image's own minimum or maximum, so equal files give equal pixels at every site.

| found | becomes |
|---|---|
| 1, L | the grey value in each of R, G, B |
| RGB, YCbCr, HSV | RGB |
| LA, RGBA, PA, and any transparent colour | laid over white |
| P | its palette's colours |
| CMYK | RGB by Pillow's conversion, without colour profile |
| 16 bits a sample | the high byte |
| I (32-bit integers) | the high byte of 16, if all values are in 0..65535; otherwise refused |
| F (floats) | times 255, if all values are in 0..1; otherwise refused |
| LAB and others | refused |

EXIF orientation is applied; of several frames or pages the first is taken.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from atoll.data.diagnostics import opened, shown
from atoll.errors import DataError

MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535
MAX_IMAGE_BYTES = 200_000_000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
"""What files of those formats are called."""
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# What Pillow's decoders are known to raise on damaged files.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError,
    NotImplementedError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """An image as training sees it, and whether its file holds more frames than this one."""

    image: Image.Image
    more_frames: bool


def decode_image(data: bytes, name: str, *, verify: bool = True) -> Image.Image:
    """The 8-bit RGB image in `data`, upright, fully decoded; `name` is for the error."""
    return decode(data, name, verify=verify).image


def decode(data: bytes, name: str, *, verify: bool = True) -> Decoded:
    """The image in `data` and what is remarkable about it.

    Who has seen these bytes decode before need not `verify` them: checksums then go unread.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{name}: {len(data)} bytes of image, at most {MAX_IMAGE_BYTES} allowed")
    try:
        with warnings.catch_warnings():
            # A decompression bomb is only a warning to Pillow: _check_size refuses it.
            warnings.simplefilter("ignore")
            return _decode(data, name, verify)
    except Image.DecompressionBombError:
        raise DataError(f"{name}: a decompression bomb, at most {MAX_PIXELS} pixels allowed") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: {_nature(data)}, expected an image ({', '.join(FORMATS)})") from None
    except _DAMAGED as error:
        raise DataError(f"{name}: damaged image: {_one_line(error)}; expected one that decodes") from None


def eight_bits(image: Image.Image) -> torch.Tensor:
    """An RGB image's pixels, [3, height, width]."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def scaled(images: Sequence[torch.Tensor], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """8-bit images of one size as float32 with this mean and deviation, [batch, 3, height, width]."""
    return torch.stack(list(images)).to(torch.float32).div_(255).sub_(mean).div_(std)


def image_bytes(cell: Mapping[str, object]) -> bytes:
    """The encoded bytes of one cell of an image column, read from its file unless they are at hand."""
    data, path = cell["bytes"], cell["path"]
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str):
        raise DataError("an image has neither bytes nor a path")
    with opened(Path(path)) as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def read_image_input(given: str) -> bytes:
    """The bytes of an image file that someone names, once it is seen to decode."""
    path = Path(given)
    if path.is_dir():
        raise DataError(f"{shown(given)}: a folder, expected an image file")
    with opened(path) as file:
        data = file.read(MAX_IMAGE_BYTES + 1)
    decode(data, shown(given))
    return data


def _decode(data: bytes, name: str, verify: bool) -> Decoded:
    # With a list of formats, open() doesn't load the plugins that they need.
    Image.init()
    if verify:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name)
            # Only this looks at a PNG's checksums, and only load() at the pixels.
            image.verify()
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        _check_size(image, name)
        more = bool(getattr(image, "is_animated", False))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return Decoded(_rgb(image, name), more)


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS} allowed")
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{name}: {width} x {height} pixels, at most {MAX_SIDE} a side allowed")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey(_high_byte(np.asarray(image), name))
    if image.mode == "F":
        return _grey(_from_unit(np.asarray(image), name))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _over_white(image.convert("RGBA"))
    if image.mode in _PLAIN_MODES:
        return image.convert("RGB")
    raise DataError(f"{name}: mode {image.mode}, expected grey, palette, RGB(A), CMYK or 16 bits")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _high_byte(values: np.ndarray, name: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise DataError(f"{name}: integers from {low} to {high}, expected 0 to 65535")
    return np.asarray(values >> 8)


def _from_unit(values: np.ndarray, name: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise DataError(f"{name}: floats from {low:g} to {high:g}, expected 0 to 1")
    return np.asarray(np.rint(values * 255))


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _nature(data: bytes) -> str:
    """What a file that is no image seems to be."""
    if not data:
        return "0 bytes"
    head = data[:1024].lstrip().lower()
    for mark, nature in _NATURES.items():
        if head.startswith(mark) or (mark.startswith(b"<") and mark in head):
            return nature
    if data[128:132] == b"DICM":
        return "a DICOM file, for which there is no decoder"
    return "text" if _is_text(data[:1024]) else "of no known kind"


_NATURES = {
    b"%pdf": "a PDF",
    b"<svg": "an SVG drawing",
    b"<html": "an HTML page",
    b"<!doctype html": "an HTML page",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}


def _is_text(head: bytes) -> bool:
    return head.decode("utf-8", errors="ignore").isprintable() or (b"\0" not in head and head.isascii())

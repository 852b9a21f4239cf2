"""What counts as an image, and how any image becomes 8-bit RGB: by fixed public rules only.

No rule looks at an image's own minimum or maximum, so equal files give equal pixels at every site.

| found | becomes |
|---|---|
| 1, L | the grey value in each of R, G, B |
| RGB, YCbCr, HSV | RGB |
| LA, RGBA, PA, and any transparent colour | laid over white |
| P | its palette's colours |
| CMYK | RGB by Pillow's conversion, without colour profile |
| 16 bits a sample | the high byte; of grey ones that of `data.bits`, or as `data.window` says |
| I (32-bit integers) | the high byte of 16, if all values are in 0..65535; otherwise refused; or as above |
| F (floats) | times 255, if all values are in 0..1; otherwise refused; or as `data.window` says |
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

from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.errors import DataError
from atoll.job.job import DataSection

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
class Depth:
    """Which values of a grey picture of more than 8 bits become black and white, by a job's own rule.

    With `bits` the lowest so many bits hold the value, and their high byte is taken. With a `window` its low
    end becomes black and its high end white, and what is outside is cut off.

    >>> Depth(bits=12).grey(np.array([0, 256, 4095]), "a.png").tolist()
    [0, 16, 255]
    >>> Depth(window=(-100.0, 155.0)).grey(np.array([-500, -100, 0, 155]), "a.tif").tolist()
    [0, 0, 100, 255]
    """

    bits: int | None = None
    window: tuple[float, float] | None = None

    @classmethod
    def of(cls, data: DataSection) -> Depth | None:
        """The job's, if it has one."""
        return None if data.bits is None and data.window is None else cls(data.bits, data.window)

    def grey(self, values: np.ndarray, name: str) -> np.ndarray:
        """8-bit values.

        Raises:
            DataError: there are values that so many bits don't hold.
        """
        if self.window is not None:
            low, high = self.window
            unit = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
            return np.asarray(np.rint(unit * 255).astype(np.uint8))
        assert self.bits is not None
        lowest, highest = values.min(), values.max()
        if lowest < 0 or highest >= 1 << self.bits or values.dtype.kind == "f":
            raise DataError(
                f"{name}: values from {lowest:g} to {highest:g}, expected whole ones from 0 to"
                f" {(1 << self.bits) - 1} with data.bits = {self.bits}"
            )
        return np.asarray((values >> (self.bits - 8)).astype(np.uint8))


@dataclass(frozen=True)
class Decoded:
    """An image as training sees it, and whether its file holds more frames than this one.

    `lost` says which grey values there were, where hardly any are left.
    """

    image: Image.Image
    more_frames: bool
    is_deep: bool = False
    lost: str = ""

    @property
    def is_constant(self) -> bool:
        """Whether all of its pixels have one colour."""
        return all(low == high for low, high in self.image.getextrema())  # type: ignore[misc]


FEW_LEVELS = 32
"""Grey values up to which it is remarked how few of more than that are left of 16 bits: those of 13."""


def seen_picture(data: bytes, name: str, depth: Depth | None, diagnostics: Diagnostics) -> bytes:
    """Bytes that decode to the picture as the job wants it seen; what decoding loses is remarked.

    They are the file's own, or those of an 8-bit PNG where the job says how deep grey ones are seen.

    Raises:
        DataError: it isn't an image, or not one of that depth.
    """
    decoded = decode(data, name, depth=depth)
    remark(decoded, name, diagnostics)
    return _at_depth(data, decoded, depth)


def remark(decoded: Decoded, name: str, diagnostics: Diagnostics) -> None:
    """Tell of a picture of one colour, and of grey values that decoding loses."""
    if decoded.lost:
        diagnostics.warning(LOST, f"{name}, {decoded.lost}")
    if decoded.is_constant:
        diagnostics.warning("pictures of one colour", name)


LOST = "few grey values are left of more than 8 bits (data.bits or data.window says which of them are used)"


def _at_depth(data: bytes, decoded: Decoded, depth: Depth | None) -> bytes:
    if depth is None or not decoded.is_deep:
        return data
    file = BytesIO()
    # Without compression, whose bytes may differ between versions.
    decoded.image.getchannel(0).save(file, "PNG", compress_level=0)
    return file.getvalue()


def decode_image(data: bytes, name: str, *, verify: bool = True) -> Image.Image:
    """The 8-bit RGB image in `data`, upright, fully decoded; `name` is for the error."""
    return decode(data, name, verify=verify).image


def decode(data: bytes, name: str, *, verify: bool = True, depth: Depth | None = None) -> Decoded:
    """The image in `data` and what is remarkable about it.

    Who has seen these bytes decode before need not `verify` them: checksums then go unread.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{name}: {len(data)} bytes of image, at most {MAX_IMAGE_BYTES} allowed")
    try:
        with warnings.catch_warnings():
            # A decompression bomb is only a warning to Pillow: _check_size refuses it.
            warnings.simplefilter("ignore")
            return _decode(data, name, verify, depth)
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


def read_image_input(text: str, depth: Depth | None = None) -> bytes:
    """The bytes of an image file that someone names, as the job wants it seen, once it is seen to decode."""
    path = Path(text)
    if path.is_dir():
        raise DataError(f"{shown(text)}: a folder, expected an image file")
    with opened(path) as file:
        data = file.read(MAX_IMAGE_BYTES + 1)
    return seen_picture(data, shown(text), depth, Diagnostics())


def _decode(data: bytes, name: str, verify: bool, depth: Depth | None) -> Decoded:
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
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)
            seen = _eight_bit(values, name, depth)
            return Decoded(_grey(seen), more, is_deep=True, lost=_lost(values, seen) if verify else "")
        return Decoded(_rgb(image, name), more)


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS} allowed")
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{name}: {width} x {height} pixels, at most {MAX_SIDE} a side allowed")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _over_white(image.convert("RGBA"))
    if image.mode in _PLAIN_MODES:
        return image.convert("RGB")
    raise DataError(f"{name}: mode {image.mode}, expected grey, palette, RGB(A), CMYK or 16 bits")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bit(values: np.ndarray, name: str, depth: Depth | None) -> np.ndarray:
    is_float = values.dtype.kind == "f"
    if depth is not None and (depth.window is not None or not is_float):
        return depth.grey(values, name)
    return _from_unit(values, name) if is_float else _high_byte(values, name)


def _lost(values: np.ndarray, seen: np.ndarray) -> str:
    """Which values there were, where of more than a few hardly any are left."""
    left = len(np.unique(seen))
    if left > FEW_LEVELS or (levels := len(np.unique(values))) <= left:
        return ""
    return f"{levels} values from {values.min():g} to {values.max():g} become {left}"


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

"""Reading medical images: PNG and JPEG, and DICOM, which is converted to 8 bits by fixed rules.

DICOM's stored values are rescaled (slope, intercept), then mapped to grey levels by the file's first window,
or, without one, by the range of values that its bits can hold. MONOCHROME1 is inverted, so that larger values
are always brighter. No rule depends on the pixels' own minimum or maximum. Of several frames the first is
used. Patient data in the header isn't read: a column of the table says which patient an image belongs to.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.data.images import MAX_IMAGE_BYTES, MAX_PIXELS, Depth, decode, remark, seen_picture
from atoll.data.labels import class_name
from atoll.data.layouts import image_classes, open_shard
from atoll.data.parsers import name_cell
from atoll.data.schema import FILE, Schema, SchemaField
from atoll.data.tables import SUFFIXES, Rows
from atoll.datasets.synthetic.png import grey_png, rgb_png
from atoll.errors import DataError

_MARK = slice(128, 132)


def as_picture(data: bytes, where: str) -> bytes:
    """The bytes of an ordinary picture: DICOM is converted to an 8-bit PNG, others are unchanged.

    Raises:
        DataError: the data can't be decoded.
    """
    if data[_MARK] != b"DICM":
        decode(data, where)
        return data
    return _dicom_picture(data, where, None)


def seen_scan(data: bytes, where: str, depth: Depth | None, diagnostics: Diagnostics) -> bytes:
    """As `seen_picture`, for DICOM too; the job's window replaces the file's, and the file gives the bits.

    Raises:
        DataError: the data can't be decoded.
    """
    if data[_MARK] != b"DICM":
        return seen_picture(data, where, depth, diagnostics)
    picture = _dicom_picture(data, where, depth)
    remark(decode(picture, where), where, diagnostics)
    return picture


def _dicom_picture(data: bytes, where: str, depth: Depth | None) -> bytes:
    pixels = _dicom_pixels(data, where, depth)
    return grey_png(pixels) if pixels.ndim == 2 else rgb_png(pixels)


def _dicom_pixels(data: bytes, where: str, depth: Depth | None) -> np.ndarray:
    """The pixels of a DICOM file, uint8: grey [height, width] or RGB [height, width, 3]."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with pydicom.config.disable_value_validation():
            header = pydicom.dcmread(BytesIO(data))
            if int(header.Rows) * int(header.Columns) > MAX_PIXELS:
                raise DataError(f"{where}: {header.Rows} x {header.Columns} pixels, at most {MAX_PIXELS}")
            pixels = np.asarray(header.pixel_array)
            if int(header.get("NumberOfFrames") or 1) > 1:
                pixels = pixels[0]
            return _grey(header, pixels, depth) if pixels.ndim == 2 else _colour(header, pixels, where)
    except (
        InvalidDicomError, AttributeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError,
        RuntimeError, OSError,
    ) as error:  # fmt: skip
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: DICOM that cannot be decoded: {why}; expected one with pixels") from None


def _grey(header: Any, stored: np.ndarray, depth: Depth | None) -> np.ndarray:
    slope = float(header.get("RescaleSlope") or 1)
    intercept = float(header.get("RescaleIntercept") or 0)
    values = stored.astype(np.float64) * slope + intercept
    job_window = None if depth is None else depth.window
    low, high = job_window or _window(header, slope, intercept)
    unit = np.clip((values - low) / (high - low), 0, 1)
    if header.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    grey: np.ndarray = np.rint(unit * 255).astype(np.uint8)
    return grey


def _window(header: Any, slope: float, intercept: float) -> tuple[float, float]:
    """(the value that becomes black, the value that becomes white)."""
    centre, width = (_first(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None and width > 1:
        # DICOM PS3.3 C.11.2.1.2.1: black at centre - 0.5 - (width - 1) / 2, white as far above.
        return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    bits = int(header.BitsStored)
    lowest = -(1 << (bits - 1)) if int(header.PixelRepresentation) else 0
    ends = [(lowest + step) * slope + intercept for step in (0, (1 << bits) - 1)]
    return min(ends), max(ends)


def _first(value: Any) -> float | None:
    """The number in a header's field, or the first of several; None if the field is empty."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float | str) else value[0])


def _colour(header: Any, pixels: np.ndarray, where: str) -> np.ndarray:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise DataError(f"{where}: DICOM pixels {pixels.shape} {pixels.dtype}, expected grey, or 8-bit RGB")
    if header.PhotometricInterpretation != "RGB":
        raise DataError(
            f"{where}: DICOM colours {header.PhotometricInterpretation}, expected RGB or MONOCHROME"
        )
    return pixels


def read_scan_input(text: str, depth: Depth | None = None) -> bytes:
    """The picture in a file, converted as the job's `depth` says.

    Raises:
        DataError: it is a folder, or can't be read or decoded.
    """
    path = Path(text)
    if path.is_dir():
        raise DataError(f"{shown(text)}: a folder, expected an image file")
    with opened(path) as file:
        return seen_scan(file.read(MAX_IMAGE_BYTES + 1), shown(text), depth, Diagnostics())


def _class_folders(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """The rows of a folder with one folder per class, also under train/ and test/; None for a file."""
    return open_shard(path, image_classes, diagnostics) if path.is_dir() else None


SCANS = Schema(
    (
        SchemaField(
            "image",
            as_picture,
            FILE,
            ("img", "file", "file_name", "filename", "path", "scan"),
            file=True,
            picture=seen_scan,
        ),
        SchemaField("label", class_name, pa.string(), ("labels", "class", "finding", "diagnosis", "target")),
        SchemaField(
            "patient", name_cell, pa.string(), ("patient_id", "patientid", "subject", "case"), required=False
        ),
    ),
    count_by="label",
    open_layout=_class_folders,
    layout=f"a folder per class, or one file of {', '.join(SUFFIXES)}",
)
"""The patient's name is part of an example's hash, so that equal images of two patients stay distinct."""

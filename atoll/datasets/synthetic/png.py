"""Grey and colour images as PNG files whose bytes depend on the pixels alone.

A PNG library's output varies with its version of zlib, and with it every hash of the data; stored
(not compressed) blocks leave it no choice.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_LARGEST_BLOCK = 65_535
_GREY, _RGB = 0, 2


def grey_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of `pixels`, shaped (height, width)."""
    return _png(pixels, pixels.shape[1], _GREY)


def rgb_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of `pixels`, shaped (height, width, 3)."""
    height, width, _ = pixels.shape
    return _png(pixels.reshape(height, 3 * width), width, _RGB)


def _png(samples: NDArray[np.uint8], width: int, colour: int) -> bytes:
    # Each line starts with its filter: 0, none.
    lines = np.pad(samples, ((0, 0), (1, 0))).tobytes()
    header = struct.pack(">IIBBBBB", width, len(samples), 8, colour, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", _stored(lines)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    """`data` as a zlib stream of stored blocks (RFC 1950 and 1951)."""
    blocks = [data[start : start + _LARGEST_BLOCK] for start in range(0, len(data), _LARGEST_BLOCK)]
    last = len(blocks) - 1
    body = b"".join(
        struct.pack("<BHH", index == last, len(block), len(block) ^ 0xFFFF) + block
        for index, block in enumerate(blocks)
    )
    return b"\x78\x01" + body + struct.pack(">I", zlib.adler32(data))

"""What counts as a text: UTF-8, not empty, no NUL, at most `MAX_TEXT_BYTES`."""

from pathlib import Path

from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.errors import DataError

MAX_TEXT_BYTES = 1_000_000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BINARY = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive (also DOCX, ODT)",
    b"\xd0\xcf\x11\xe0": "an old Office file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
}


def checked_text(data: bytes | None, where: str) -> str:
    """`data` as text, or a `DataError` that names the first byte which keeps it from being one."""
    if data is None:
        raise DataError(f"{where}: the text is missing")
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"{where}: {len(data)} bytes of text, at most {MAX_TEXT_BYTES} allowed")
    text = decoded(data, where)
    if not text.strip():
        raise DataError(f"{where}: empty, expected some text")
    if (nul := data.find(b"\0")) >= 0:
        raise DataError(f"{where}: byte {nul} is NUL, expected text")
    return text


def decoded(data: bytes, where: str, start: int = 0) -> str:
    """`data`, which begins at byte `start` of its file, read as strict UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_byte = f"byte {start + error.start} is 0x{data[error.start]:02x}"
        raise DataError(f"{where}: {bad_byte}, expected UTF-8 text") from None


def read_text_file(path: Path, diagnostics: Diagnostics) -> str:
    """The whole text of a file, without its byte order mark."""
    with opened(path) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        size = path.stat().st_size
        raise DataError(f"{shown(path)}: {size} bytes of text, at most {MAX_TEXT_BYTES} allowed")
    if data.startswith(_UTF_16_MARKS):
        raise DataError(f"{shown(path)}: byte 0 is 0x{data[0]:02x}: UTF-16, expected UTF-8 text")
    for start, name in _BINARY.items():
        if data.startswith(start):
            raise DataError(f"{shown(path)}: {name}, expected UTF-8 text")
    return checked_text(without_mark(data, shown(path), diagnostics), shown(path))


def read_text_input(text: str) -> str:
    """What someone wants to know the class of: the text of the file of that name, or else the text itself.

    One word that ends in `.txt` is meant as a file.
    """
    path = Path(text)
    try:
        is_file = path.is_file()
        is_folder = bool(text) and path.is_dir()
    except OSError:  # too long for a name, so it is a text
        is_file = is_folder = False
    if is_folder:
        raise DataError(f"{shown(text)}: a folder, expected a text or a file")
    if is_file or (text.lower().endswith(".txt") and len(text.split()) == 1):
        return read_text_file(path, Diagnostics())
    return checked_text(text.encode("utf-8", "surrogateescape"), f"input {shown(repr(text[:40]))}")


def without_mark(data: bytes, where: str, diagnostics: Diagnostics) -> bytes:
    if data.startswith(BYTE_ORDER_MARK):
        diagnostics.warning("a byte order mark was dropped", where)
    return data.removeprefix(BYTE_ORDER_MARK)

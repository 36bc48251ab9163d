"""Zip files that hold a document and its parts: the same bytes for the same contents, aligned where asked for."""

import io
import struct
import zipfile

PADDING = 0x1986  # the kind of extra field that USD's own writer pads with
LOCAL_HEADER, FIELD_HEADER = 30, 4  # bytes


def package(files: dict[str, bytes], *, compress: bool, alignment: int = 1) -> bytes:
    """A zip of the files in their order, dated 1980; each one's data starts at a multiple of `alignment` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            start = buffer.tell() + LOCAL_HEADER + len(name.encode())
            if start % alignment:
                padding = -(start + FIELD_HEADER) % alignment
                entry.extra = struct.pack("<HH", PADDING, padding) + bytes(padding)
            archive.writestr(entry, data)
    return buffer.getvalue()

"""Archives that are damaged, compressed in a way that cannot be read, or hold more than the memory."""

from __future__ import annotations

import contextlib
import gzip
import struct
import tarfile
import zipfile
import zlib

LZMA_ERROR: type[Exception] = zlib.error
with contextlib.suppress(ImportError):  # Python may be built without it
    import lzma

    LZMA_ERROR = lzma.LZMAError
# What the readers of zip, tar and gzip raise for bytes that are none, are cut off or changed, need a password, or are compressed in
# a way that they do not know. An `OSError` of the disk is none of these.
BROKEN_ARCHIVE = (
    zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, LZMA_ERROR, struct.error, EOFError, UnicodeDecodeError,
    RuntimeError,
)  # fmt: skip

LARGEST_PICTURE = 2**26  # bytes of a published image file, of which no data set has one a tenth of that


def content_of(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Reads a member of a zip archive, which may say in a thousandth of its bytes to hold more than the memory.

    Args:
        archive: The archive.
        name: The member.
        most: The most bytes that it may have.

    Raises:
        zipfile.BadZipFile: It has more, by its header or in truth.
    """
    size = archive.getinfo(name).file_size
    refuse_larger(name, size, most)
    with archive.open(name) as file:  # `archive.read` would unpack all of it, whatever the header says
        return file.read(size)


def refuse_larger(name: str, size: int, most: int) -> None:
    """Raises `zipfile.BadZipFile` for a member of an archive that is to have more bytes than any of the published one's."""
    if size > most:
        raise zipfile.BadZipFile(f"{name} is to have {size:,} bytes, and {most:,} are the most here")

"""Archives that are damaged, or compressed in a way that cannot be read."""

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

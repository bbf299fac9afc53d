"""Open a file whatever it is compressed with; the content decides, not the name."""

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from errors_scaledown import ScaleDownError

OPENERS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}
ZIP_MAGIC = b"PK\x03\x04"
# Kinds that are not read, and what to do about them.
REFUSED = {
    b"\x28\xb5\x2f\xfd": ("compressed with zstandard", "decompress it with `zstd -d`"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Excel workbook", "save the sheet as CSV"),
    b"\x89HDF": ("an HDF5 file", "save the table as Parquet or CSV"),
    b"SQLite format 3": ("an SQLite database", "save the table as CSV"),
    b"\x80\x04\x95": ("a pickle", "save the table as Parquet or CSV"),
    b"\x80\x05\x95": ("a pickle", "save the table as Parquet or CSV"),
}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zip")
# What a stream raises in the middle of damaged data.
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading bytes: plain, or compressed with gzip, xz, bzip2 or zip (of one file).

    Args:
        path: The file.

    Returns:
        A binary stream of what it holds.

    Raises:
        ScaleDownError: The file is of a kind that is not read, or an archive of several files.
    """
    with open(path, "rb") as stream:
        start = stream.read(16)
    for magic, (kind, remedy) in REFUSED.items():
        if start.startswith(magic):
            raise ScaleDownError(f"{path} is {kind}, which is not read here; {remedy}, and name the result.")
    if start.startswith(ZIP_MAGIC):
        name = archived_name(path)  # which says what is wrong with a damaged archive
        return zipfile.ZipFile(path).open(name)
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
    return opener(path, "rb")


def archived_name(path: str | os.PathLike) -> str:
    """The name of the one file in a zip archive.

    Args:
        path: The archive.

    Returns:
        The name.

    Raises:
        ScaleDownError: It holds another number of files, or is a workbook.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    except zipfile.BadZipFile as error:
        raise ScaleDownError(f"{path} is a damaged zip archive ({error}); copy or download it again.") from error
    if "[Content_Types].xml" in names:
        raise ScaleDownError(f"{path} is an Excel workbook, which is not read here; save the sheet as CSV.")
    if len(names) != 1:
        listed = ", ".join(names[:5])
        raise ScaleDownError(f"{path} holds {len(names)} files ({listed}), expected one; unpack it and name a file.")
    return names[0]


def kind_suffix(path: Path) -> str:
    """The suffix that shows the kind of a file: that before .gz and the like, or that of the file in a zip archive."""
    if path.suffix not in COMPRESSIONS:
        return path.suffix
    inner = Path(path.stem).suffix
    if path.suffix == ".zip" and not inner and path.is_file():
        return Path(archived_name(path)).suffix
    return inner

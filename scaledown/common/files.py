"""Files are written whole or not at all, and a full disk is explained."""

import contextlib
import errno
import gzip
import json
import lzma
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when the block ends without an exception.

    Args:
        path: The file to write; a name ending in `.gz` or `.xz` is compressed. Missing folders are created.
        overwrite: Whether an existing file is replaced.

    Returns:
        A context manager that gives a binary stream.

    Raises:
        FileExistsError: The file exists and `overwrite` is off.
        IsADirectoryError: The path is a folder.
        OSError: The disk is full; the message says so, and no part of the file is left.
    """
    path = Path(path)
    check_is_writable(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with explained_disk_errors(path, f"{path.name} was not written. Free space and run again."):
            with open(temporary, "xb") as raw:
                with _compressor(raw, path.suffix) as stream:
                    yield stream
                raw.flush()
                os.fsync(raw.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explained_disk_errors(path: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Say what a full disk means for the run.

    Args:
        path: Where the run writes.
        remedy: What a user can do, and what became of the work.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        folder = Path(path).resolve().parent
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
        raise OSError(
            error.errno, f"the disk of {folder} is full ({free} free, or the quota is reached). {remedy}"
        ) from error


def check_is_writable(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise FileExistsError, or IsADirectoryError, unless `path` may be written."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file to write; add a file name.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} already exists; choose another name, or pass overwrite to replace it.")


def check_is_file(path: str | os.PathLike) -> None:
    """Raise FileNotFoundError, or IsADirectoryError, unless `path` is a file."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file; name a file inside it.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked from {Path.cwd()}); check the path.")


def _compressor(raw: BinaryIO, suffix: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if suffix == ".gz":
        # Neither the time nor the temporary name in the header: equal records give equal bytes.
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
    if suffix == ".xz":
        return lzma.open(raw, "wb")
    return contextlib.nullcontext(raw)


def write_json(path: str | os.PathLike, value: Any, **settings: Any) -> None:
    """Write a value as JSON, in place of what was there.

    Args:
        path: The file.
        value: What JSON can hold.
        **settings: Of `json.dumps`.
    """
    with atomic_writer(path, overwrite=True) as stream:
        stream.write(json.dumps(value, **settings).encode("utf-8") + b"\n")

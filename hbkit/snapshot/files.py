"""Files of a snapshot: written once, flushed and checksummed as they are written, checked before they are believed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hbkit.errors import Corrupt, HbkitError, StorageError

DIGEST_NBYTES = 32
RESTORE = "restore the file from a copy, or load another commit"
_BLOCK_NBYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """A file as a manifest lists it.

    Attributes
    ----------
    path : str
        Relative to the snapshot's directory, with ``/``.
    n_rows : int
        Rows of a Parquet file; 0 for bytes of the state.
    nbytes : int
    blake2b : str
        32-byte digest of the whole file, in hexadecimal.
    """

    path: str
    n_rows: int
    nbytes: int
    blake2b: str


@contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system refuses into StorageError."""
    try:
        yield
    except HbkitError:
        raise
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StorageError(
            e.strerror or str(e),
            file=e.filename or os.fspath(path),
            remedy="make room; earlier commits are intact" if full else "check the disk and permissions",
        ) from e


class Output(Protocol):
    """Where the bytes of a new file go."""

    def write(self, data: Any) -> object:
        """Append all bytes of a buffer."""
        ...

    def sync(self) -> None:
        """Return when the bytes are durable."""
        ...

    def close(self) -> None:
        """Let go of the file; what was not synced may be lost."""
        ...


class Sink(io.RawIOBase):
    """A new file that counts and digests what is written to it.

    Parameters
    ----------
    output : Output
        Closed with the sink.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.nbytes = 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)
        self._output = output

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        n = memoryview(data).nbytes
        self._output.write(data)
        self._digest.update(data)
        self.nbytes += n
        return n

    def sync(self) -> None:
        """Return when the bytes are durable."""
        self._output.sync()

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            super().close()
            self._output.close()

    def entry(self, path: str, n_rows: int = 0) -> FileEntry:
        """What a manifest says of this file."""
        return FileEntry(path, n_rows, self.nbytes, self._digest.hexdigest())


def check(path: Path, entry: FileEntry) -> None:
    """Read a whole local file and compare it with its manifest; raises Corrupt."""
    try:
        have = os.stat(path)
        if not stat.S_ISREG(have.st_mode):
            raise Corrupt("a file of the snapshot is no regular file", file=str(path), remedy=RESTORE)
        if have.st_size != entry.nbytes:
            raise Corrupt(
                f"the file has {have.st_size} bytes, its manifest says {entry.nbytes}", file=str(path), remedy=RESTORE
            )
        digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_NBYTES):
                digest.update(block)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise Corrupt("a file of the snapshot is missing", file=str(path), remedy=RESTORE) from e
    if digest.hexdigest() != entry.blake2b:
        raise Corrupt("the file's checksum is wrong", file=str(path), remedy=RESTORE)

"""Files of a snapshot: written once, flushed and checksummed as they are written, checked before they are believed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbkit.errors import Corrupt, HbkitError, Locked, StorageError, Unsupported

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


def local(path: str | os.PathLike[str]) -> Path:
    """A snapshot's directory as a path; raises Unsupported for a URI."""
    text = os.fspath(path)
    if "://" in text:
        raise Unsupported(
            "snapshots are kept in local directories only", file=text, remedy="name a directory, and copy it afterwards"
        )
    return Path(text)


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


class Sink(io.RawIOBase):
    """A new file that counts and digests what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.nbytes = 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)
        self._file = open(path, "xb")  # noqa: SIM115 closed by `create`

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        n = self._file.write(data)
        self._digest.update(data)
        self.nbytes += n
        return n

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        if not self._file.closed:
            self._file.flush()

    def sync(self) -> None:
        """Return when the bytes are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()

    def entry(self, path: str, n_rows: int = 0) -> FileEntry:
        """What a manifest says of this file."""
        return FileEntry(path, n_rows, self.nbytes, self._digest.hexdigest())


@contextmanager
def create(path: Path) -> Iterator[Sink]:
    """A new file that is on the disk when the block ends without an exception."""
    sink = Sink(path)
    try:
        yield sink
        sink.sync()
    finally:
        sink.close()


def sync_directory(path: Path) -> None:
    """Return when the directory's names are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Be the one writer of a snapshot; the lock ends with the process at the latest. Raises Locked."""
    fd = os.open(root / "LOCK", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Locked("another writer saves here", file=str(root), remedy="wait until it has finished") from e
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may hold a copy of fd, and the lock with it
    finally:
        os.close(fd)


def check(root: Path, entry: FileEntry) -> None:
    """Read a whole file and compare it with its manifest; raises Corrupt."""
    path = root / entry.path
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

"""Files of a snapshot: written once, flushed and checksummed as they are written, checked before they are believed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from hbkit._ext import pool
from hbkit.errors import Corrupt, HbkitError, StorageError

DIGEST_NBYTES = 32
RESTORE = "restore the file from a copy, or load another commit"
PAGE_NBYTES = 4096
DIRECT_NBYTES = 1 << 20  # less waits less for the page cache than for the disk
_BLOCK_NBYTES = 4 << 20
_AHEAD = 1  # pieces that are read or written beside the one in use

Bytes = npt.NDArray[np.uint8]


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
    blake2b, blake3 : str or None
        32-byte digest of the whole file, in hexadecimal; one of the two. Versions 1 and 2 have the former.
    """

    path: str
    n_rows: int
    nbytes: int
    blake2b: str | None = None
    blake3: str | None = None

    @property
    def digest(self) -> str:
        """The digest that there is."""
        return self.blake3 or self.blake2b or ""

    def new_digest(self) -> Any:
        """A digest as this one that nothing went into yet, as those of `hashlib`."""
        return blake3() if self.blake3 else hashlib.blake2b(digest_size=DIGEST_NBYTES)


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
        self._digest = blake3()
        self._output = output
        self._threads: list[ThreadPoolExecutor] = []  # one writes, one digests
        self._lent: deque[list[Future[Any]]] = deque()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._settle(0)
        n = memoryview(data).nbytes
        self._output.write(data)
        self._digest.update(data)
        self.nbytes += n
        return n

    def lend(self, data: Bytes) -> None:
        """Append bytes that nobody will change, while the caller makes the next ones."""
        if not self._threads:
            self._threads = [ThreadPoolExecutor(1, "hbkit-snapshot") for _ in range(2)]
        self._settle(_AHEAD)
        jobs: tuple[Callable[[Any], Any], ...] = (self._output.write, self._digest.update)
        self._lent.append([thread.submit(job, data) for thread, job in zip(self._threads, jobs, strict=True)])
        self.nbytes += data.nbytes

    def _settle(self, n: int) -> None:
        """Wait until at most `n` pieces of what was lent are under way; raises what writing them raised."""
        while len(self._lent) > n:
            for job in self._lent.popleft():
                job.result()

    def sync(self) -> None:
        """Return when the bytes are durable."""
        self._settle(0)
        self._output.sync()

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            super().close()
            for thread in self._threads:
                thread.shutdown(cancel_futures=True)
            self._output.close()

    def entry(self, path: str, n_rows: int = 0) -> FileEntry:
        """What a manifest says of this file, which was synced."""
        return FileEntry(path, n_rows, self.nbytes, blake3=self._digest.hexdigest())


@contextmanager
def opened(path: Path, entry: FileEntry) -> Iterator[int]:
    """Descriptor of a local file, which is regular and has the size that its manifest says; raises Corrupt."""
    try:
        # Not to wait for who writes to a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise Corrupt("a file of the snapshot is missing", file=str(path), remedy=RESTORE) from e
    try:
        have = os.fstat(fd)
        if not stat.S_ISREG(have.st_mode):
            raise Corrupt("a file of the snapshot is no regular file", file=str(path), remedy=RESTORE)
        if have.st_size != entry.nbytes:
            raise Corrupt(
                f"the file has {have.st_size} bytes, its manifest says {entry.nbytes}", file=str(path), remedy=RESTORE
            )
        yield fd
    finally:
        os.close(fd)


def empty(nbytes: int) -> Bytes:
    """Memory of undefined contents: uint8[nbytes], aligned to PAGE_NBYTES."""
    return np.frombuffer(pool.shared.take(nbytes, PAGE_NBYTES), np.uint8) if nbytes else np.zeros(0, np.uint8)


def read_ahead(fd: int, path: Path, sizes: Sequence[int]) -> Generator[Bytes]:
    """The bytes of a file from its beginning, in pieces of these sizes: uint8[size], aligned to PAGE_NBYTES.

    They belong to the caller; the next one is read while one is in use. Large ones that lie as the disk wants it go
    past the page cache, which would be filled with what is read once.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)

    def past_cache(on: bool) -> bool:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0) * on)
        except OSError:  # the file system cannot
            return False
        return on

    def read(offset: int, nbytes: int) -> Bytes:
        direct = past_cache(nbytes >= DIRECT_NBYTES and not (offset | nbytes) % PAGE_NBYTES)
        data = empty(nbytes)
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(fd, [data[done:].data], offset + done)
            except OSError as e:
                if e.errno != errno.EINVAL or not direct:
                    raise
                direct = past_cache(False)  # it wants other places than these
                continue
            if got == 0:
                raise Corrupt("the file has become shorter", file=str(path), remedy=RESTORE)
            done += got
        return data

    if len(sizes) == 1:
        yield read(0, sizes[0])
        return
    offset, jobs = 0, deque[Future[Bytes]]()
    with ThreadPoolExecutor(1, "hbkit-snapshot") as thread:
        try:
            for nbytes in sizes:
                jobs.append(thread.submit(read, offset, nbytes))
                offset += nbytes
                if len(jobs) > _AHEAD:
                    yield jobs.popleft().result()
            while jobs:
                yield jobs.popleft().result()
        finally:
            for job in jobs:
                job.cancel()


def check(path: Path, entry: FileEntry) -> None:
    """Read a whole local file and compare it with its manifest; raises Corrupt."""
    with opened(path, entry) as fd:
        full, rest = divmod(entry.nbytes, _BLOCK_NBYTES)
        digest = entry.new_digest()
        for block in read_ahead(fd, path, [_BLOCK_NBYTES] * full + [rest]):
            digest.update(block)
    if digest.hexdigest() != entry.digest:
        raise Corrupt("the file's checksum is wrong", file=str(path), remedy=RESTORE)

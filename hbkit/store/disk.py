"""The one way by which the SSD tier reaches a file system, so that tests can put a failing one in its place.

Errors are OSErrors as the operating system gives them; who knows what was being done turns them into hbkit's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext import disk as ext
from hbkit._ext.pool import shared
from hbkit.errors import HbkitError, StorageError
from hbkit.store.line import Int64s

PAGE_NBYTES = 4096  # what O_DIRECT asks offsets, lengths and memory to be multiples of
_THREADS = 32  # where the kernel has no queue of reads

Bytes = npt.NDArray[np.uint8]


class EndOfFile(OSError):
    """A file ends before what was to be read."""


def aligned(nbytes: int) -> Bytes:
    """Memory as O_DIRECT wants it, undefined: uint8[nbytes]."""
    return np.frombuffer(shared.take(nbytes, align=PAGE_NBYTES), np.uint8)


@contextmanager
def named(what: str, path: Path) -> Iterator[None]:
    """What the operating system refuses within is an error that says what was being done to which file."""
    try:
        yield
    except HbkitError:  # some are OSErrors too
        raise
    except OSError as e:
        raise storage_error(e, what, path) from e


def storage_error(error: OSError, what: str, path: Path) -> StorageError:
    """The named error for what the operating system refused."""
    full = "free some space" if error.errno in (28, 122) else "check the disk and its permissions"  # ENOSPC, EDQUOT
    return StorageError(f"cannot {what}: {os.strerror(error.errno or 0)}", file=path, remedy=full)


class Disk:
    """Files of the operating system.

    Parameters
    ----------
    direct : bool
        Whether files opened as `direct` go past the system's cache, where the file system allows it.
    ring : bool
        Whether reads go through io_uring, where the kernel permits it; else through threads.

    Notes
    -----
    Safe to use from any thread; the GIL is released while the disk works. Interrupted calls go on, and short reads and
    writes are completed.
    """

    def __init__(self, direct: bool = True, ring: bool = True) -> None:
        self._direct = direct
        self._rings: list[Any] = []  # that nobody uses now
        self._threads: ThreadPoolExecutor | None = None
        self.engine = "threads"
        if ring:
            try:
                self._rings.append(ext.Ring())
                self.engine = "io_uring"
            except OSError:
                pass

    @property
    def direct(self) -> bool:
        """Whether files go past the system's cache, as far as it is known."""
        return self._direct

    def make_directory(self, path: Path) -> None:
        """Make a directory, with those above it; nothing if there is one."""
        path.mkdir(parents=True, exist_ok=True)

    def lock(self, path: Path) -> int:
        """Handle of a file that this process alone holds; BlockingIOError where another does."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open(self, path: Path, create: bool = False, direct: bool = False) -> int:
        """Handle of a file, to read and write; with `create`, of an empty one.

        Where `direct`, offsets, lengths and memory are multiples of `PAGE_NBYTES`.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        if direct and self._direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, flags | os.O_DIRECT, 0o666)
            except OSError as e:
                if e.errno != 22:  # EINVAL: the file system cannot
                    raise
                self._direct = False
        return os.open(path, flags, 0o666)

    def rest(self) -> None:
        """Let go of what is kept for the next reads."""
        self._rings.clear()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def close(self, handle: int) -> None:
        """Let go of a handle, and of a lock."""
        os.close(handle)

    def unlock(self, handle: int) -> None:
        """Let go of a lock, also where a forked child has a copy of its handle."""
        try:
            fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def write(self, handle: int, data: Bytes, offset: int) -> None:
        """Write all of uint8[n] at `offset`."""
        view = data.data
        while len(view):
            n = os.pwrite(handle, view, offset)
            view, offset = view[n:], offset + n

    def read(self, handles: npt.NDArray[np.int32], offsets: Int64s, lengths: Int64s, out: Bytes) -> None:
        """Read ``lengths[i]`` bytes at ``offsets[i]`` of each file, one behind the other, into `out`.

        Many are under way at a time, in any order. What an OSError raised here has in its attribute ``request`` is the
        first i that failed; `EndOfFile` where the file is too short.
        """
        at = np.cumsum(lengths) - lengths
        if self.engine == "io_uring":
            try:
                ring = self._rings.pop()
            except IndexError:  # others are reading too
                ring = ext.Ring()
            error, i = ring.read(handles, offsets, lengths, at, out)
            self._rings.append(ring)
        else:
            error, i = self._by_threads(handles, offsets, lengths, at, out)
        if error:
            e = EndOfFile() if error == ext.END else OSError(error, os.strerror(error))
            e.request = i  # type: ignore[attr-defined]  # an errno alone does not say of which file
            raise e

    def _by_threads(self, handles: Any, offsets: Int64s, lengths: Int64s, at: Int64s, out: Bytes) -> tuple[int, int]:
        n = len(handles)
        n_parts = max(1, min(n // 2, _THREADS))
        ends = [n * i // n_parts for i in range(n_parts + 1)]

        def part(i: int) -> tuple[int, int]:
            some = slice(ends[i], ends[i + 1])
            error, first = ext.pread(handles[some], offsets[some], lengths[some], at[some], out)
            return error, ends[i] + first

        if n_parts == 1:
            return part(0)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, "hbkit-disk")
        for found in list(self._threads.map(part, range(n_parts))):
            if found[0]:
                return found
        return 0, 0

    def sync(self, handle: int) -> None:
        """Make what was written durable."""
        os.fsync(handle)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def truncate(self, handle: int, nbytes: int) -> None:
        """Cut a file off."""
        os.ftruncate(handle, nbytes)

    def rename(self, path: Path, to: Path) -> None:
        """Give a file another name, which another file loses."""
        os.replace(path, to)

    def unlink(self, path: Path) -> None:
        """Delete a file."""
        os.unlink(path)

    def remove_tree(self, path: Path, ignore_errors: bool = False) -> None:
        """Delete a directory and all in it."""
        shutil.rmtree(path, ignore_errors)

    def list(self, path: Path) -> list[str]:
        """Names in a directory."""
        return os.listdir(path)

    def size(self, path: Path) -> int:
        """Bytes of a file, -1 where there is none."""
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return -1

    def free(self, path: Path) -> int:
        """Bytes that can still be written to the file system of a directory."""
        s = os.statvfs(path)
        return s.f_bavail * s.f_frsize

"""Segments: lines on disk, in append-only files of fixed-size records.

A record is ``key int64 | line float32[width] | check uint64``, little-endian, where check is the XXH64 of the bytes
before it; so every byte that is read was verified, and a line that belongs to another key is noticed. Record i of
segment s has the address ``s * records a segment + i``. Nothing that was written is ever written again: a row that
changes gets a new record, and the old one is dead. Whoever holds the addresses says which records live (`forget`);
a segment without live records is deleted once no commit needs it.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_bytes
from hbkit.errors import Corrupt, StorageError
from hbkit.store.base import Float32s, Int64s

SEGMENT_NBYTES = 64 * 2**20
RUN_NBYTES = 2**20  # the most that one read asks for
GAP_NBYTES = 4096  # what lies between two wanted records is read too when it is no more than this: a seek costs more
OPEN_FILES = 128

_NAME = re.compile(r"segment-(\d{8})\.hbs")


def storage_error(error: OSError, what: str, path: Path) -> StorageError:
    """The named error for what the operating system refused."""
    full = "free some space" if error.errno in (28, 122) else "check the disk and its permissions"  # ENOSPC, EDQUOT
    return StorageError(f"cannot {what}: {os.strerror(error.errno or 0)}", file=path, remedy=full)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; OSError where the system refuses."""
    while len(data):
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise storage_error(e, "sync the directory", path) from e


def _close_all(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


class Segments:
    """The segment files of one table.

    Parameters
    ----------
    directory : Path
    width : int
        Floats of a line.
    per_segment : int
        Records a segment.
    committed : mapping of segment to records
        What the last commit needs; all else in the directory is deleted.

    Raises
    ------
    Corrupt
        A committed segment is missing or too short.
    """

    def __init__(self, directory: Path, width: int, per_segment: int, committed: Mapping[int, int]) -> None:
        self._directory, self.per_segment = directory, per_segment
        self._record = np.dtype([("key", "<i8"), ("line", "<f4", (width,)), ("check", "<u8")])
        self._committed = set(committed)
        self._length = dict(committed)
        self._live = dict.fromkeys(committed, 0)  # the holder of the addresses counts them in
        self._active: int | None = None
        self._next = max(committed, default=-1) + 1
        self._files: dict[int, int] = {}
        self._unsynced: set[int] = set()
        self._lost: StorageError | None = None
        self.read_nbytes = self.written_nbytes = 0
        weakref.finalize(self, _close_all, self._files)
        for path in directory.iterdir():
            if (found := _NAME.fullmatch(path.name)) and int(found[1]) not in committed:
                try:
                    path.unlink()
                except OSError as e:
                    raise storage_error(e, "delete a segment that was never committed", path) from e
        for segment, length in committed.items():
            path = self.path(segment)
            size = path.stat().st_size if path.exists() else -1
            if size < length * self._record.itemsize:
                raise Corrupt(
                    f"a committed segment has {size} of {length * self._record.itemsize} bytes"
                    if size >= 0
                    else "a committed segment is missing",
                    file=path,
                    offset=max(size, 0),
                    remedy="restore the directory from a copy or a snapshot",
                )

    def path(self, segment: int) -> Path:
        """File of a segment."""
        return self._directory / f"segment-{segment:08d}.hbs"

    @property
    def record_nbytes(self) -> int:
        """Bytes of a record."""
        return self._record.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self._length.values()) * self._record.itemsize

    def _file(self, segment: int, create: bool = False) -> int:
        """Open file of a segment; at most `OPEN_FILES` are open."""
        if segment not in self._files:
            while len(self._files) >= OPEN_FILES:
                oldest = next(iter(self._files))
                self._sync(oldest)
                os.close(self._files.pop(oldest))
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if create else os.O_RDWR
            self._files[segment] = os.open(self.path(segment), flags | os.O_CLOEXEC, 0o666)
        return self._files[segment]

    def _sync(self, segment: int) -> None:
        """Make a segment durable. What fails once is lost: asking again would not tell what is on the disk."""
        if segment in self._unsynced:
            try:
                os.fsync(self._file(segment))
            except OSError as e:
                self._lost = storage_error(e, "sync rows", self.path(segment))
                raise self._lost from e
            self._unsynced.discard(segment)

    def _checks(self, records: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """XXH64 of each record without its check: uint64[n]."""
        size = self._record.itemsize
        splits = np.empty(2 * len(records) + 1, np.int64)
        splits[0::2] = np.arange(len(records) + 1) * size
        splits[1::2] = splits[2::2] - 8
        return hash_bytes(records.view(np.uint8), splits)[::2].view(np.uint64)

    def _count(self, addresses: Int64s, by: int) -> None:
        for segment, n in zip(*np.unique(addresses // self.per_segment, return_counts=True), strict=True):
            self._live[int(segment)] += by * int(n)

    def revive(self, addresses: Int64s) -> None:
        """Count the records of a commit as live."""
        self._count(addresses, 1)

    def forget(self, addresses: Int64s) -> None:
        """Count records as dead; -1 is no record."""
        self._count(addresses[addresses >= 0], -1)

    def append(self, keys: Int64s, lines: Float32s) -> Int64s:
        """Write lines; their addresses: int64[n]. A failure leaves nothing that lives.

        Raises
        ------
        StorageError
            The disk is full, or failed.
        """
        records = np.empty(len(keys), self._record)
        records["key"], records["line"] = keys, lines
        records["check"] = self._checks(records)
        addresses, done, size = np.empty(len(keys), np.int64), 0, self._record.itemsize
        try:
            while done < len(keys):
                segment = self._writable()
                at = self._length[segment]
                n = min(len(keys) - done, self.per_segment - at)
                self._unsynced.add(segment)
                try:
                    write_all(self._file(segment), records[done : done + n].view(np.uint8).data, at * size)
                except StorageError:
                    raise
                except OSError as e:
                    raise storage_error(e, "write rows", self.path(segment)) from e
                addresses[done : done + n] = segment * self.per_segment + at + np.arange(n)
                self._length[segment] += n
                self._live[segment] += n
                self.written_nbytes += n * size
                done += n
        except BaseException:
            self.forget(addresses[:done])
            raise
        return addresses

    def _writable(self) -> int:
        """A segment with room: when one is full, a new one is begun and those that nothing needs are deleted."""
        if self._active is not None and self._length[self._active] < self.per_segment:
            return self._active
        self._active = None
        self.clean()
        segment = self._next
        try:
            self._file(segment, create=True)
        except StorageError:
            raise
        except OSError as e:
            raise storage_error(e, "create a segment", self.path(segment)) from e
        self._active, self._next = segment, segment + 1
        self._length[segment] = self._live[segment] = 0
        return segment

    def read(self, addresses: Int64s, keys: Int64s) -> Float32s:
        """Lines at addresses, which belong to `keys`: float32[n, width].

        Notes
        -----
        Sorted by address; neighbours are read together.

        Raises
        ------
        Corrupt
            A record does not match its check or key: names file and offset.
        StorageError
            The disk failed.
        """
        n, size = len(addresses), self._record.itemsize
        order = np.argsort(addresses)
        at = addresses[order]
        records = np.empty(n, self._record)
        block = at // max(1, RUN_NBYTES // size)  # a run ends with its block, so that it is never longer than one
        apart = (np.diff(at) * size > GAP_NBYTES + size) | (np.diff(block) != 0)
        apart |= np.diff(at // self.per_segment) != 0
        for begin, end in pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), n] if n else []):
            first, last = int(at[begin]), int(at[end - 1])
            run = np.frombuffer(self._pread(first, last - first + 1), self._record)
            records[begin:end] = run[at[begin:end] - first]
        bad = np.flatnonzero((self._checks(records) != records["check"]) | (records["key"] != keys[order]))
        if len(bad):
            segment, i = divmod(int(at[bad[0]]), self.per_segment)
            raise self._corrupt(segment, i * size, "a row does not match its checksum")
        lines = np.empty((n, self._record["line"].shape[0]), np.float32)
        lines[order] = records["line"]
        return lines

    def _corrupt(self, segment: int, offset: int, problem: str) -> Corrupt:
        remedy = "restore the directory from a copy or a snapshot"
        return Corrupt(problem, file=self.path(segment), offset=offset, remedy=remedy)

    def _pread(self, address: int, n: int) -> bytes:
        segment, i = divmod(address, self.per_segment)
        offset, nbytes, parts = i * self._record.itemsize, n * self._record.itemsize, []
        try:
            while nbytes:
                parts.append(os.pread(self._file(segment), nbytes, offset))
                if not parts[-1]:
                    raise self._corrupt(segment, offset, "the segment ends before a row")
                offset, nbytes = offset + len(parts[-1]), nbytes - len(parts[-1])
        except FileNotFoundError:
            raise self._corrupt(segment, 0, "the segment is missing") from None
        except StorageError:
            raise
        except OSError as e:
            raise storage_error(e, "read rows", self.path(segment)) from e
        self.read_nbytes += n * self._record.itemsize
        return b"".join(parts)

    def sparse(self) -> list[int]:
        """Segments that are written no more and have less than half of their room live."""
        return [s for s, n in self._live.items() if s != self._active and 0 < n < self.per_segment / 2]

    def sync(self) -> dict[int, int]:
        """Make all records durable; records of each segment that has live ones, as a commit lists them."""
        for segment in sorted(self._unsynced):
            self._sync(segment)
        if self._lost is not None:
            raise self._lost
        return {s: self._length[s] for s, n in self._live.items() if n}

    def keep(self, segments: Mapping[int, int]) -> None:
        """A commit that needs `segments` is about to be made, besides the one before."""
        self._committed |= set(segments)

    def committed(self, segments: Mapping[int, int]) -> None:
        """The last commit needs `segments` and no others: delete the rest."""
        self._committed = set(segments)
        self.clean()

    def clean(self) -> None:
        """Delete segments that have no live record and that no commit needs."""
        for segment in [s for s, n in self._live.items() if not n and s not in self._committed and s != self._active]:
            self._unsynced.discard(segment)
            if segment in self._files:
                os.close(self._files.pop(segment))
            try:
                self.path(segment).unlink(missing_ok=True)
            except OSError as e:
                raise storage_error(e, "delete a dead segment", self.path(segment)) from e
            del self._live[segment], self._length[segment]

    def validate(self, addresses: Int64s) -> None:
        """Recount everything against the live addresses; AssertionError where they disagree. For tests."""
        assert len(np.unique(addresses)) == len(addresses), "two rows share a record"
        segments, counts = np.unique(addresses // self.per_segment, return_counts=True)
        live = {s: n for s, n in self._live.items() if n}
        assert live == dict(zip(segments.tolist(), counts.tolist(), strict=True)), "live records are miscounted"
        for address in addresses.tolist():
            segment, i = divmod(address, self.per_segment)
            assert i < self._length[segment], "an address lies beyond its segment"

    def close(self) -> None:
        """Close the files. Idempotent."""
        _close_all(self._files)

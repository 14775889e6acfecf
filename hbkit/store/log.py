"""The log of one table: its records on disk, in append-only segment files of self-checking blocks.

A record is reached by its *address*: ``place * slots + block * per_block + number in the block``, below 2**32. A place
is a segment's number in memory, given anew when the segment is deleted; its *file* number names the file and only ever
grows, so the order of files, and of blocks in them, is the order in which everything was written.

New records gather in a buffer, where they can be read, and go to disk in large writes; `flush` pads the last block.
What was flushed is not written again. Who holds the addresses counts which records live (`append` and `count`); a
segment without any is deleted as soon as no commit needs it and nobody reads in it. An erased key's record, a
tombstone, counts until a checkpoint knows that the key is gone.

Not thread-safe but for `fetch`: the home's lock orders calls.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext.blocks import Blocks
from hbkit.errors import Corrupt, StorageError
from hbkit.store.disk import Bytes, Disk, EndOfFile, aligned, named, storage_error
from hbkit.store.line import Int64s

SEGMENT_NBYTES = 256 * 2**20  # at the most
SLOTS = 2**20  # records of a segment at the most, so that there are addresses for 4,095 segments
N_ADDRESSES = 2**32 - 2  # the last two have a meaning of their own, see home.py
GAP_NBYTES = 16_384  # what lies between two wanted blocks is read too when it is less: another read costs more
RUN_NBYTES = 2**20  # the most that one read asks for
AHEAD = 3  # lots of blocks that a read has under way, so that the disk is never idle
OVERLAP_NBYTES = 2**18  # smaller lots are not worth a thread
READ = 1.75  # all of them together take as many times the memory of the buffer
PIECE_NBYTES = 2**18  # a long read is so many at once
OPEN_FILES = 256
SPARE_NBYTES = 2**25  # left free on the file system: so much a commit can always write
RESTORE = "restore the directory from a copy or a snapshot"

UInt32s = npt.NDArray[np.uint32]
_NAME = re.compile(r"segment-(\d{8,})\.hbs")


def slots_of(blocks: Blocks) -> int:
    """Addresses of a place: as many records as a segment may have at the most."""
    return int(max(1, SLOTS // blocks.per_block) * blocks.per_block)


class Held(NamedTuple):
    """Records that are about to be read; their segments stay until `Log.release`."""

    which: Int64s  # of the batch, in the order of their addresses
    slots: Int64s
    places: Int64s
    pinned: Int64s
    files: Int64s  # by place
    handles: npt.NDArray[np.int32]  # by place


class Records(NamedTuple):
    """All records of some blocks of a segment, and the blocks."""

    keys: Int64s
    freq: UInt32s
    last_step: UInt32s
    positions: Int64s  # from the first of the blocks
    erased: npt.NDArray[np.bool_]
    buffer: Bytes


class Log:
    """Segments of one table.

    Parameters
    ----------
    disk : Disk
    directory : Path
    blocks : hbkit._ext.blocks.Blocks
    metadata : bool
        Whether frequency and last step of every record are held in memory too.
    buffer_nbytes : int
        Of what is to be written.
    segment_nbytes : int
        The most that a segment may have. Small tables have smaller ones.
    budget : int or None
        Bytes that the segments may have together.
    committed : sequence of (place, file, blocks)
        What the last commit needs.
    next_file : int
        More than the number of any file that was ever committed.

    Raises
    ------
    Corrupt
        A committed segment is missing or too short.
    """

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        blocks: Blocks,
        metadata: bool,
        buffer_nbytes: int,
        segment_nbytes: int,
        budget: int | None,
        committed: Sequence[tuple[int, int, int]],
        next_file: int,
    ) -> None:
        self.disk, self._directory, self._blocks, self._budget = disk, directory, blocks, budget
        self._block_nbytes, self._per_block = blocks.block_nbytes, blocks.per_block
        self._most_blocks = max(1, min(segment_nbytes // blocks.block_nbytes, SLOTS // blocks.per_block))
        self.slots = slots_of(blocks)
        n_places = max((place for place, _, _ in committed), default=-1) + 1
        self._file, self._n_blocks, self._target, self._live, self._tombs, self._pins = (
            np.full(n_places, fill, np.int64) for fill in (-1, 0, 0, 0, 0, 0)
        )
        self._metadata: dict[int, npt.NDArray[np.uint32]] | None = {} if metadata else None
        self._handles: dict[int, int] = {}
        self._unsynced: set[int] = set()
        self._needed = {file for _, file, _ in committed}
        self._lost: StorageError | None = None
        self._next = next_file
        self._active: int | None = None
        self._buffer = aligned(max(1, buffer_nbytes // self._block_nbytes) * self._block_nbytes)
        self._buffer[:] = 0
        self._first = self._filled = 0  # the buffer's first block in its segment; records in the buffer
        self.voids: list[tuple[int, int, int]] = []  # file, first and last slot: records of writes that failed
        self.read_nbytes = self.written_nbytes = self.n_reads = self.n_waiting = 0
        self._counting = threading.Lock()
        self._readers = ThreadPoolExecutor(2 * AHEAD, "hbkit-read")
        for place, file, n_blocks in committed:
            with named("find a segment", self.path(file)):
                size = disk.size(self.path(file))
            if size < n_blocks * self._block_nbytes:
                raise Corrupt(
                    f"a committed segment has {size} of {n_blocks * self._block_nbytes} bytes"
                    if size >= 0
                    else "a committed segment is missing",
                    file=self.path(file),
                    offset=max(size, 0),
                    remedy=RESTORE,
                )
            self._file[place], self._n_blocks[place], self._target[place] = file, n_blocks, n_blocks
            if self._metadata is not None:
                self._metadata[place] = self._no_metadata(n_blocks)

    def path(self, file: int) -> Path:
        """Path of a segment's file."""
        return self._directory / f"segment-{file:08d}.hbs"

    def clear(self) -> None:
        """Delete the segments that no commit lists."""
        with named("list the directory", self._directory):
            names = self.disk.list(self._directory)
        for name in names:
            if (found := _NAME.fullmatch(name)) and int(found[1]) not in self._needed:
                with named("delete a segment that was never committed", self._directory / name):
                    self.disk.unlink(self._directory / name)

    # --- what is there ----------------------------------------------------------------------------------------

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffer."""
        return len(self._buffer)

    @property
    def nbytes(self) -> int:
        """Memory held: buffer and metadata, in bytes."""
        metadata = 0 if self._metadata is None else 8 * self._per_block * int(self._n_blocks.sum())
        return len(self._buffer) + metadata

    @property
    def next_file(self) -> int:
        """More than the number of any file until now."""
        return self._next

    @property
    def disk_nbytes(self) -> int:
        """Bytes of all segments."""
        return int(self._n_blocks.sum()) * self._block_nbytes

    @property
    def live_nbytes(self) -> int:
        """Bytes of all records that live."""
        return int(self._live.sum()) * self._blocks.record_nbytes

    def segments(self) -> list[tuple[int, int, int]]:
        """Place, file and blocks of each segment that is needed, in the order in which they were written."""
        places = np.flatnonzero((self._live + self._tombs > 0) & (self._n_blocks > 0))
        places = places[np.argsort(self._file[places])]
        return list(zip(places.tolist(), self._file[places].tolist(), self._n_blocks[places].tolist(), strict=True))

    def end(self) -> tuple[int, int]:
        """File and block that are written next."""
        if self._active is None:
            return self._next, 0
        return int(self._file[self._active]), int(self._n_blocks[self._active])

    def file(self, place: int) -> int:
        """File at a place, -1 where there is none."""
        return int(self._file[place]) if place < len(self._file) else -1

    def n_blocks(self, place: int) -> int:
        """Blocks of the segment at a place."""
        return int(self._n_blocks[place])

    def inside(self, addresses: Int64s) -> npt.NDArray[np.bool_]:
        """Which addresses lie in a segment."""
        place, slot = np.divmod(addresses, self.slots)
        n_blocks = np.append(self._n_blocks, 0)[np.minimum(place, len(self._n_blocks))]
        return slot < n_blocks * self._per_block

    def count(self, addresses: Int64s, by: int) -> None:
        """Count records as living (1) or dead (-1)."""
        if len(addresses):
            self._live += by * np.bincount(addresses // self.slots, minlength=len(self._file))

    def count_tombs(self, place: int, n: int) -> None:
        """Count tombstones of a segment."""
        self._tombs[place] += n

    def bury(self, place: int | None = None) -> None:
        """The tombstones of a segment, or of all, are needed no more."""
        self._tombs[slice(None) if place is None else place] = 0

    # --- writing ----------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on writing in the last segment, where it has room. What lies behind its end was never committed."""
        last = int(np.argmax(self._file)) if len(self._file) else -1
        if last < 0 or self._file[last] != self._next - 1 or self._n_blocks[last] >= self._want_blocks():
            return
        path = self.path(int(self._file[last]))
        with named("cut off a segment", path):
            self.disk.truncate(self._handle(last), int(self._n_blocks[last]) * self._block_nbytes)
        self._target[last] = self._want_blocks()
        self._active, self._first = last, int(self._n_blocks[last])
        if self._metadata is not None:
            held, self._metadata[last] = self._metadata[last], self._no_metadata(int(self._target[last]))
            self._metadata[last][: len(held)] = held

    def _want_blocks(self) -> int:
        """Length of the next segment: a small part of what lives, so that small tables are compacted too."""
        live = -(-int(self._live.sum()) // self._per_block)
        return min(self._most_blocks, max(live // 32, len(self._buffer) // self._block_nbytes))

    def _no_metadata(self, n_blocks: int) -> npt.NDArray[np.uint32]:
        return np.zeros((n_blocks * self._per_block, 2), np.uint32)

    def append(self, keys: Int64s, freq: UInt32s, last_step: UInt32s, lines: Bytes | None) -> Int64s:
        """Write records, tombstones where there are no lines; their addresses: int64[n].

        They count as living. A failure leaves none.

        Raises
        ------
        StorageError
            The disk is full, or failed.
        """
        addresses, done = np.empty(len(keys), np.int64), 0
        try:
            while done < len(keys):
                place = self._writable()
                room = min(len(self._buffer) // self._block_nbytes, int(self._target[place]) - self._first)
                n = min(len(keys) - done, room * self._per_block - self._filled)
                some = slice(done, done + n)
                part = None if lines is None else lines[some]
                self._blocks.fill(self._buffer, self._filled, keys[some], freq[some], last_step[some], part)
                slot = self._first * self._per_block + self._filled
                addresses[some] = place * self.slots + slot + np.arange(n)
                if self._metadata is not None:
                    self._metadata[place][slot : slot + n, 0] = freq[some]
                    self._metadata[place][slot : slot + n, 1] = last_step[some]
                self._filled += n
                self._n_blocks[place] = self._first - (-self._filled // self._per_block)
                (self._tombs if lines is None else self._live)[place] += n
                done += n
        except BaseException:
            self.void(addresses[:done], lines is None)
            raise
        return addresses

    def void(self, addresses: Int64s, tombs: bool = False) -> None:
        """Take back what `append` has just written: nobody may take it for a row."""
        for place in np.unique(addresses // self.slots).tolist():
            slots = addresses[addresses // self.slots == place] % self.slots
            (self._tombs if tombs else self._live)[place] -= len(slots)
            self.voids.append((int(self._file[place]), int(slots[0]), int(slots[-1])))

    def _writable(self) -> int:
        """The segment that is written, with room for a record in the buffer."""
        full = self._filled == len(self._buffer) // self._block_nbytes * self._per_block
        if self._active is not None:
            ends = self._first * self._per_block + self._filled >= self._target[self._active] * self._per_block
            if full or ends:
                self.flush()
            if not ends:
                return self._active
            self._active = None
        self.clean()
        free = np.flatnonzero(self._file < 0)
        place = int(free[0]) if len(free) else len(self._file)
        path, target = self.path(self._next), self._want_blocks()
        if (place + 1) * self.slots > N_ADDRESSES:
            raise StorageError("the table has no addresses left", file=path, remedy="split the table in two")
        self._close_some()
        with named("create a segment", path):
            handle = self.disk.open(path, create=True, direct=True)
        if place == len(self._file):
            for name in ("_file", "_n_blocks", "_target", "_live", "_tombs", "_pins"):
                setattr(self, name, np.append(getattr(self, name), 0))
        self._handles[place], self._file[place], self._target[place] = handle, self._next, target
        self._n_blocks[place] = self._live[place] = self._tombs[place] = self._pins[place] = 0
        if self._metadata is not None:
            self._metadata[place] = self._no_metadata(target)
        self._next += 1
        self._active, self._first = place, 0
        return place

    def flush(self) -> None:
        """Write what the buffer holds to disk, the last block padded. Where that fails the buffer stays as it is."""
        if not self._filled or self._active is None:
            return
        file, n_blocks = int(self._file[self._active]), -(-self._filled // self._per_block)
        data = self._buffer[: n_blocks * self._block_nbytes]
        self._look_ahead(len(data), file)
        self._blocks.seal(data, n_blocks, file, self._first)
        self._unsynced.add(self._active)
        with named("write rows", self.path(file)):
            self.disk.write(self._handle(self._active), data, self._first * self._block_nbytes)
        self.written_nbytes += len(data)
        data[:] = 0
        self._first, self._filled = self._first + n_blocks, 0

    def _look_ahead(self, nbytes: int, file: int) -> None:
        """Refuse to write what would fill the disk: a commit must still be possible."""
        if self._budget is not None and self.disk_nbytes > self._budget:
            raise StorageError(
                f"the rows would take {self.disk_nbytes} bytes on disk",
                file=self.path(file),
                remedy=f"evict rows, or give a disk_budget of more than {self._budget} bytes",
            )
        if not self.has_room(nbytes):
            raise StorageError(
                f"cannot write rows: fewer than {SPARE_NBYTES} bytes would be left on the disk",
                file=self.path(file),
                remedy="free some space",
            )

    def has_room(self, nbytes: int) -> bool:
        """Whether the file system has room for so much, and a commit after that."""
        with named("ask for the free space", self._directory):
            return self.disk.free(self._directory) >= nbytes + SPARE_NBYTES

    def sync(self) -> None:
        """Make all records durable."""
        for place in sorted(self._unsynced):
            self._sync(place)
        if self._lost is not None:
            raise self._lost

    def _sync(self, place: int) -> None:
        """Make a segment durable. What fails once is lost: asking again would not tell what is on the disk."""
        if place in self._unsynced:
            try:
                self.disk.sync(self._handle(place))
            except OSError as e:
                self._lost = storage_error(e, "sync rows", self.path(int(self._file[place])))
                raise self._lost from e
            self._unsynced.discard(place)

    # --- deleting ---------------------------------------------------------------------------------------------

    def keep(self, files: Iterable[int]) -> None:
        """A commit that needs `files` is about to be made, besides the one before."""
        self._needed |= set(files)

    def committed(self, files: Iterable[int]) -> None:
        """The last commit needs `files` and no others: delete the rest."""
        self._needed = set(files)
        self.clean()

    def clean(self) -> None:
        """Delete the segments that nobody needs. One that cannot be deleted now is at the next opening."""
        for place in np.flatnonzero((self._file >= 0) & (self._live + self._tombs == 0) & (self._pins == 0)).tolist():
            file = int(self._file[place])
            if place == self._active or file in self._needed:
                continue
            self._unsynced.discard(place)
            if place in self._handles:
                self.disk.close(self._handles.pop(place))
            try:
                self.disk.unlink(self.path(file))
            except OSError:
                pass
            self._file[place], self._n_blocks[place] = -1, 0
            if self._metadata is not None:
                del self._metadata[place]

    def sparsest(self, most: float) -> int | None:
        """The segment whose records are dead for the most part, once all take `most` times the bytes that live."""
        held = self._live + self._tombs
        slots = self._n_blocks * self._per_block
        used = held > 0
        most = max(1.5, most * self._blocks.filled)
        if slots[used].sum() <= most * held.sum() + 2 * self._per_block * self._want_blocks():
            return None
        used &= np.arange(len(used)) != (-1 if self._active is None else self._active)
        shares = np.where(used, held / np.maximum(slots, 1), 2.0)
        place = int(np.argmin(shares)) if len(shares) else -1
        return place if place >= 0 and shares[place] < 0.9 else None

    # --- reading ----------------------------------------------------------------------------------------------

    def _handle(self, place: int) -> int:
        """Handle of a segment; at most about `OPEN_FILES` are open."""
        if place in self._handles:
            self._handles[place] = self._handles.pop(place)  # the last to be closed
            return self._handles[place]
        self._close_some()
        self._handles[place] = self.disk.open(self.path(int(self._file[place])), direct=True)
        return self._handles[place]

    def _close_some(self) -> None:
        """Close what was not used for long, to open another."""
        for old in list(self._handles):
            if len(self._handles) < OPEN_FILES:
                break
            if old != self._active and not self._pins[old]:
                self._sync(old)
                self.disk.close(self._handles.pop(old))

    def _opened(self, place: int) -> int:
        try:
            return self._handle(place)
        except FileNotFoundError:
            raise self._corrupt(int(self._file[place]), 0, "the segment is missing") from None
        except StorageError:
            raise
        except OSError as e:
            raise storage_error(e, "open a segment", self.path(int(self._file[place]))) from e

    def hold(
        self, addresses: Int64s, which: Int64s, keys: Int64s, freq: UInt32s, last_step: UInt32s, lines: Bytes
    ) -> tuple[Held, Int64s]:
        """Copy what is in the buffer; see that the rest stays until it is read.

        Parameters
        ----------
        addresses, which : int64[m]
            Records, and where they belong in the batch.
        keys, freq, last_step, lines
            The batch.

        Returns
        -------
        held : Held
        left : int64[k]
            Those of `which` that lie in too many other segments to have all of them open.
        """
        place, slots = np.divmod(addresses, self.slots)
        first = self._first * self._per_block
        near = (place == (-1 if self._active is None else self._active)) & (slots >= first)
        index = which[near]
        if len(index):
            nowhere = np.zeros(len(index), np.int64)
            bad = self._blocks.take(
                self._buffer, slots[near] - first, nowhere, nowhere, keys, index, freq, last_step, lines, False
            )
            assert bad < 0, "a record in the buffer is another's"
        far = np.flatnonzero(~near)
        far = far[np.argsort(addresses[far])]
        pinned = np.flatnonzero(np.bincount(place[far]))
        left = which[:0]
        if len(pinned) > OPEN_FILES // 4:
            n = int(np.searchsorted(place[far], pinned[OPEN_FILES // 4]))
            far, left, pinned = far[:n], which[far[n:]], pinned[: OPEN_FILES // 4]
        handles = np.zeros(len(self._file), np.int32)
        self._pins[pinned] += 1
        try:
            for p in pinned.tolist():
                handles[p] = self._opened(p)
        except BaseException:
            self._pins[pinned] -= 1
            raise
        return Held(which[far], slots[far], place[far], pinned, self._file.copy(), handles), left

    @property
    def reading(self) -> bool:
        """Whether somebody reads."""
        return bool(self._pins.any())

    def release(self, held: Held) -> None:
        """The records were read."""
        self._pins[held.pinned] -= 1

    def fetch(self, held: Held, keys: Int64s, freq: UInt32s, last_step: UInt32s, lines: Bytes) -> None:
        """Read the records of `hold`; in any thread, beside all else.

        Notes
        -----
        Sorted; blocks that lie close together are read at once.

        Raises
        ------
        Corrupt
            A block does not match its check, or a record is another key's: names file and offset.
        StorageError
            The disk failed.
        """
        n = len(held.which)
        if not n:
            return
        size, block = self._block_nbytes, held.slots // self._per_block
        apart = (np.diff(block) > 1 + GAP_NBYTES // size) | (np.diff(block // max(1, RUN_NBYTES // size)) != 0)
        apart |= np.diff(held.places) != 0
        begins = np.concatenate([[0], np.flatnonzero(apart) + 1])
        ends = np.append(begins[1:], n)
        n_blocks = block[ends - 1] - block[begins] + 1
        after = np.cumsum(n_blocks)
        overlap = READ * len(self._buffer) >= AHEAD * OVERLAP_NBYTES
        most = max(1, int(READ * len(self._buffer)) // (AHEAD if overlap else 1) // size)
        lots = np.flatnonzero(np.diff(after // most, prepend=-1, append=-1))

        def read(a: int, b: int) -> tuple[int, int, Bytes]:
            runs = slice(a, b)
            places, out = held.places[begins[runs]], aligned(int(n_blocks[runs].sum()) * size)
            offsets, lengths = block[begins[runs]] * size, n_blocks[runs] * size
            self._read(held.handles[places], held.files[places], offsets, lengths, out)
            return a, b, out

        def take(a: int, b: int, out: Bytes) -> None:
            runs, some = slice(a, b), slice(int(begins[a]), int(ends[b - 1]))
            shift = after[runs] - n_blocks[runs] - (after[a] - n_blocks[a]) - block[begins[runs]]
            at = held.slots[some] + np.repeat(shift, ends[runs] - begins[runs]) * self._per_block
            files = held.files[held.places[some]]
            bad = self._blocks.take(out, at, files, block[some], keys, held.which[some], freq, last_step, lines)
            if bad >= 0:
                raise self._corrupt(int(files[bad]), int(block[some][bad]) * size, "a row does not match its checksum")

        pairs = list(pairwise(lots.tolist()))
        if len(pairs) == 1 or not overlap:
            for pair in pairs:
                take(*read(*pair))
            return
        ahead: deque[Future[tuple[int, int, Bytes]]] = deque()  # while one lot is taken, others are read
        try:
            for pair in pairs:
                ahead.append(self._readers.submit(read, *pair))
                if len(ahead) == AHEAD:
                    take(*ahead.popleft().result())
            while ahead:
                take(*ahead.popleft().result())
        finally:
            wait(ahead)

    def _corrupt(self, file: int, offset: int, problem: str) -> Corrupt:
        return Corrupt(problem, file=self.path(file), offset=offset, remedy=RESTORE)

    def _read(self, handles: Any, files: Int64s, offsets: Int64s, lengths: Int64s, out: Bytes) -> None:
        with self._counting:
            self.n_waiting += len(handles)
        try:
            self.disk.read(handles, offsets, lengths, out)
        except OSError as e:
            i = getattr(e, "request", 0)
            if isinstance(e, EndOfFile):
                raise self._corrupt(int(files[i]), int(offsets[i]), "the segment ends before a row") from None
            raise storage_error(e, f"read rows at {int(offsets[i])}", self.path(int(files[i]))) from e
        finally:
            with self._counting:
                self.n_waiting -= len(handles)
                self.n_reads += len(handles)
                self.read_nbytes += len(out)

    def records(self, place: int, first: int, n_blocks: int) -> Records:
        """All records of blocks that are on disk, verified."""
        size, file = self._block_nbytes, int(self._file[place])
        out = aligned(n_blocks * size)
        begins = np.arange(0, n_blocks, max(1, PIECE_NBYTES // size))
        lengths = np.diff(begins, append=n_blocks) * size
        handles = np.full(len(begins), self._opened(place), np.int32)
        self._read(handles, np.full(len(begins), file), (first + begins) * size, lengths, out)
        bad, *found = self._blocks.parse(out, n_blocks, file, first)
        if bad >= 0:
            raise self._corrupt(file, (first + bad) * size, "rows do not match their checksum")
        return Records(found[0], found[1], found[2], found[3], found[4], out)

    def lines_of(self, records: Records, some: Int64s) -> Bytes:
        """Lines of some of the records: uint8[n, line_nbytes]."""
        n, unused = len(some), np.empty((2, len(some)), np.uint32)
        lines = np.empty((n, self._blocks.line_nbytes), np.uint8)
        nowhere = np.zeros(n, np.int64)
        self._blocks.take(
            records.buffer, records.positions[some], nowhere, nowhere, records.keys[some], np.arange(n), *unused, lines,
            False,
        )  # fmt: skip
        return lines

    def on_disk(self, place: int) -> int:
        """Blocks of a segment that are on disk."""
        return self._first if place == self._active else int(self._n_blocks[place])

    def _by_place(self, addresses: Int64s) -> Iterator[tuple[int, Int64s, Int64s]]:
        """Places, which of the addresses lie in each, and their slots there."""
        place, slot = np.divmod(addresses, self.slots)
        order = np.argsort(place, kind="stable")
        for some in np.split(order, np.flatnonzero(np.diff(place[order])) + 1) if len(order) else []:
            yield int(place[some[0]]), some, slot[some]

    def metadata(self, addresses: Int64s) -> tuple[UInt32s, UInt32s]:
        """Frequency and last step of records, where they are held in memory."""
        assert self._metadata is not None
        out = np.empty((len(addresses), 2), np.uint32)
        for place, some, slots in self._by_place(addresses):
            out[some] = self._metadata[place][slots]
        return out[:, 0], out[:, 1]

    def put_metadata(self, addresses: Int64s, freq: UInt32s, last_step: UInt32s) -> None:
        """Set frequency and last step of records, where they are held in memory."""
        if self._metadata is not None:
            for place, some, slots in self._by_place(addresses):
                self._metadata[place][slots, 0], self._metadata[place][slots, 1] = freq[some], last_step[some]

    def validate(self, live: Int64s) -> None:
        """Recount against the records that live, by place; AssertionError where they disagree. For tests."""
        assert np.array_equal(self._live, live[: len(self._live)]) and not live[len(self._live) :].any(), "miscounted"
        assert (self._pins == 0).all() and (self._tombs >= 0).all()

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._readers.shutdown()
        while self._handles:
            self.disk.close(self._handles.popitem()[1])

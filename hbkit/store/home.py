"""The home of rows on disk: an index in memory, their lines in a log (see `log`), and commits.

A table has a directory of its own: segments, index checkpoints, what the table wants kept, and a manifest. A commit

1. writes and syncs the segments;
2. where much was written since the last checkpoint, writes the index (key, address, and metadata where it is held) to
   a new one; else the next opening replays the log's tail on top of the last;
3. writes what the table wants kept beside its rows, if it has changed;
4. writes the manifest, which lists all of these with lengths and checksums, under another name, syncs it, and renames
   it into place: at that instant the commit exists;
5. deletes what the commit no longer needs.

Whatever happens before the rename leaves the last commit whole, because nothing that it lists is ever overwritten or
deleted; what is not listed is deleted at the next opening. All is verified when it is read.

Rows whose lines were never written have the address ADDED. While a checkpoint is read, rows that it puts into segments
that are no more have the address GONE: the tail says where they went, or that they were erased.
"""

from __future__ import annotations

import json
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.blocks import Blocks
from hbkit._ext.hash import hash_bytes
from hbkit._ext.places import Places
from hbkit.errors import Closed, Corrupt, InvalidArgument, Locked, SchemaMismatch, Unsupported
from hbkit.store.disk import Bytes, Disk, EndOfFile, named, storage_error
from hbkit.store.line import Int64s, Layout, Part
from hbkit.store.log import RESTORE, SEGMENT_NBYTES, Log, UInt32s, slots_of

FORMAT = "hbkit-ssd"
VERSION = 2
MANIFEST = "manifest.json"
BUFFER_NBYTES = 4 * 2**20
BUFFERS = 8  # so much memory as that: one, and what compaction (a quarter) and four reading threads take (the rest)
PART_ROWS = 65_536  # about as many rows of a checkpoint share a checksum, and are in memory at a time
MOST_PART_ROWS = 2**24
SORTED_ROWS = 2**20  # what is gone through in the order of keys is sorted so many at a time
COLUMN_NBYTES = 2**20  # of what is kept share a checksum
TAIL = 12  # a checkpoint is written once the log has grown by so many times its size since the last
LEAST_TAIL_NBYTES = 4 * 2**20
SPACE = 1.8  # compaction holds all segments below about so many times the bytes of the records that live
SWEEP = 4  # blocks of sparse segments that are gone through for each block written, while there are too many

ADDED, GONE = 2**32 - 1, 2**32 - 2
_OTHERS = re.compile(r"(index|kept)-\d+\.hbi|manifest\.json\.new")
_KEPT_DTYPES = ("<i8", "<u2")


class Home:
    """Lines of one table on disk.

    Parameters
    ----------
    layout : Layout
    directory : Path
        Made if need be; a table found in it goes on from its last commit.
    buffer_nbytes : int
        Of what is to be written; a read and compaction take twice as much.
    segment_nbytes : int
        The most that a segment file may have.
    disk_budget : int, optional
        Bytes that the segments may have together.
    disk : Disk, optional

    Raises
    ------
    Corrupt
        What the last commit lists is missing or damaged.
    Locked
        Another home has the directory open.
    SchemaMismatch
        The table there has other lines.
    StorageError
        The operating system refuses.

    Notes
    -----
    Safe to use from any thread. `read` holds the lock only to look keys up and to copy what is in the buffer; so it
    runs beside all else, and gives the rows as they were when it looked them up.
    """

    def __init__(
        self,
        layout: Layout,
        directory: Path,
        buffer_nbytes: int = BUFFER_NBYTES,
        segment_nbytes: int = SEGMENT_NBYTES,
        disk_budget: int | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.layout, self._directory, self._disk = layout, directory, disk or Disk()
        self._lock = threading.RLock()
        self._read_ended = threading.Condition(self._lock)
        self._closed = False
        self._places = Places()
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._kept_entry: dict[str, Any] = {"file": None, "columns": {}, "checks": []}
        self._checkpoint: dict[str, Any] | None = None
        self._n_added = self._latest = self.n_commits = self._n_tries = 0
        self._appended_nbytes = self._written_nbytes = 0  # given to write; written besides segments
        self._debt = 0  # blocks that compaction may go through now
        self._victim: tuple[int, int, int] | None = None  # place, file, next block
        self._tail_nbytes = 0  # written to the log at the last checkpoint, less what the tail had at the opening
        self._n_compacted = 0
        with named("open the table's directory", directory):
            self._disk.make_directory(directory)
            try:
                lock = self._disk.lock(directory / "LOCK")
            except BlockingIOError:
                remedy = "close it there, or give another path"
                raise Locked("another store has the table open", file=directory / "LOCK", remedy=remedy) from None
        self._unlock = weakref.finalize(self, self._disk.close, lock)
        try:
            self._open(buffer_nbytes, segment_nbytes, disk_budget)
        except BaseException:
            self.close()
            raise

    # --- opening ----------------------------------------------------------------------------------------------

    def _open(self, buffer_nbytes: int, segment_nbytes: int, budget: int | None) -> None:
        manifest = self._read_manifest()
        size, nonce, segments, next_file = self.layout.line_nbytes, int.from_bytes(os.urandom(8)), [], 0
        if manifest:
            have = manifest["lines"]
            want = self._lines()
            if have != want:
                raise SchemaMismatch(
                    f"the table on disk has lines of {have}, not {want}",
                    table=self.layout.table,
                    file=self._directory,
                    remedy="give the table the dim, dtype and optimizer that it was made with, or another path",
                )
            nonce, next_file = int(manifest["nonce"], 16), manifest["next_file"]
            segments = [(place, file, n) for place, file, n in manifest["segments"]]
            self.n_commits, self._latest = manifest["commit"], manifest["latest_step"]
            self._checkpoint, self._kept_entry = manifest["checkpoint"], manifest["kept"]
        self._nonce, self._blocks = nonce, Blocks(size, nonce)
        self._log = Log(
            self._disk, self._directory, self._blocks, self.layout.metadata, buffer_nbytes, segment_nbytes, budget,
            self._fitting(segments), next_file,
        )  # fmt: skip
        weakref.finalize(self, self._log.close)
        self._most_blocks = max(1, buffer_nbytes // self._blocks.block_nbytes)  # that are in memory at a time
        self._step_blocks = max(1, self._most_blocks // 4)  # that compaction reads at a time
        self._clean()
        self._log.clear()
        self._kept = self._read_kept()
        if manifest:
            self._load(manifest)
        self._log.resume()

    def _fitting(self, segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        slots = slots_of(self._blocks)
        if any(n * self._blocks.per_block > slots or (place + 1) * slots > GONE for place, _, n in segments):
            raise self._corrupt("the manifest lists a segment that is too long", MANIFEST)
        return segments

    def _lines(self) -> str:
        return f"{self.layout.dim} x {self.layout.dtype} + {len(self.layout.initial_state)} x float32"

    def _corrupt(self, problem: str, name: str, offset: int = 0) -> Corrupt:
        return Corrupt(problem, file=self._directory / name, offset=offset, remedy=RESTORE)

    def _load(self, manifest: dict[str, Any]) -> None:
        """Fill the index: the checkpoint, then the log's tail."""
        log, c = self._log, self._checkpoint
        n_gone, from_file, from_block = 0, 0, 0
        if c is not None:
            n_gone, (from_file, from_block) = self._read_checkpoint(c), c["end"]
        voids: dict[int, list[tuple[int, int]]] = {}
        for file, first, last in manifest["voids"]:
            voids.setdefault(file, []).append((first, last))
        self._log.voids = [(file, first, last) for file, first, last in manifest["voids"]]
        for place, file, n_blocks in sorted(manifest["segments"], key=lambda s: s[1]):
            first = 0 if file > from_file else from_block if file == from_file else n_blocks
            for at in range(first, n_blocks, self._most_blocks):
                n = min(self._most_blocks, n_blocks - at)
                self._tail_nbytes -= n * self._blocks.block_nbytes
                n_gone -= self._replay(place, at, n, voids.get(file, []))
        if n_gone or len(self._places) != manifest["n_rows"]:
            raise self._corrupt("the log does not lead to the rows that the manifest counts", MANIFEST)
        log.clean()

    def _replay(self, place: int, first: int, n_blocks: int, voids: list[tuple[int, int]]) -> int:
        """Do what records say; how many rows are not GONE any more."""
        records = self._log.records(place, first, n_blocks)
        slots = first * self._blocks.per_block + records.positions
        valid = np.ones(len(slots), np.bool_)
        for a, b in voids:
            valid &= (slots < a) | (slots > b)
        addresses = place * self._log.slots + slots
        found = 0
        # Runs of equal kind, in order: a key may be written, erased and written again in one block.
        kind = np.where(valid, records.erased, 2)
        ends = np.append(np.flatnonzero(np.diff(kind)) + 1, len(kind)).tolist()
        begin = 0
        for end in ends if len(kind) else []:
            some = slice(begin, end)
            keys, begin = records.keys[some], end
            if kind[end - 1] == 2:
                continue
            if kind[end - 1] == 1:
                before = self._places.drop(keys)
                self._log.count_tombs(place, len(keys))
            else:
                before = self._places.put(keys, addresses[some])
                self._log.count(addresses[some], 1)
                self._log.put_metadata(addresses[some], records.freq[some], records.last_step[some])
            found += int(np.count_nonzero(before == GONE))
            self._log.count(before[(before >= 0) & (before < GONE)], -1)
        return found

    def _read_manifest(self) -> dict[str, Any] | None:
        """A verified manifest, None where nothing was committed."""
        size = self._size(MANIFEST)
        if size < 0:
            return None
        data = self._read_file(MANIFEST, 0, min(size, 2**28)).tobytes()
        lines = data.split(b"\n")
        if len(lines) != 3 or lines[2] or lines[1] != _check(lines[0]).encode():
            raise self._corrupt("the manifest does not match its checksum", MANIFEST)
        try:
            manifest = json.loads(lines[0])
            if manifest["format"] != FORMAT or manifest["version"] != VERSION:
                raise Unsupported(
                    f"format {manifest['format']!r} version {manifest['version']!r}",
                    file=self._directory / MANIFEST,
                    remedy="use the hbkit that wrote it",
                )
            good = _is_manifest(manifest)
        except (KeyError, TypeError, ValueError, AttributeError):
            good = False
        if not good:
            raise self._corrupt("the manifest is not one", MANIFEST)
        return manifest

    def _clean(self) -> None:
        """Delete what an earlier or unfinished commit left, segments apart."""
        keep = {self._kept_entry["file"], self._checkpoint["file"] if self._checkpoint else None}
        with named("list the directory", self._directory):
            names = self._disk.list(self._directory)
        for name in names:
            if _OTHERS.fullmatch(name) and name not in keep:
                try:
                    self._disk.unlink(self._directory / name)
                except OSError:
                    pass  # the next opening tries again

    # --- files beside the segments ----------------------------------------------------------------------------

    def _size(self, name: str) -> int:
        with named("read", self._directory / name):
            return self._disk.size(self._directory / name)

    def _read_file(self, name: str, offset: int, nbytes: int, handle: int | None = None) -> Bytes:
        """Bytes of a file, of which there must be so many."""
        out = np.empty(nbytes, np.uint8)
        own = None
        try:
            if handle is None:
                own = handle = self._disk.open(self._directory / name)
            self._disk.read(np.array([handle], np.int32), np.array([offset]), np.array([nbytes]), out)
        except FileNotFoundError:
            raise self._corrupt("a committed file is missing", name) from None
        except EndOfFile:
            raise self._corrupt("a committed file is too short", name, offset) from None
        except OSError as e:
            raise storage_error(e, "read", self._directory / name) from e
        finally:
            if own is not None:
                self._disk.close(own)
        return out

    def _write_file(self, name: str, pieces: Iterator[bytes | Bytes]) -> int:
        """Write a file and sync it; its length."""
        path, offset = self._directory / name, 0
        with named("write", path):
            handle = self._disk.open(path, create=True)
            try:
                for piece in pieces:
                    data = np.frombuffer(piece, np.uint8)
                    self._disk.write(handle, data, offset)
                    offset += len(data)
                self._disk.sync(handle)
            finally:
                self._disk.close(handle)
        self._written_nbytes += offset
        return offset

    def _part_check(self, data: Bytes, name: str, offset: int) -> npt.NDArray[np.int64]:
        seed = self._nonce ^ (int(re.findall(r"\d+", name)[0]) << 40) ^ offset
        return hash_bytes(data, np.array([0, len(data)]), seed % 2**64)

    def _checkpoint_pieces(self, name: str) -> Iterator[Bytes]:
        """The index in parts: n int64 | keys int64[n] | addresses uint32[n] | freq, last_step uint32[n] | check."""
        offset, metadata = 0, self.layout.metadata
        for keys in self._parts():
            addresses = self._places.find(keys)
            columns: list[npt.NDArray[Any]] = [np.array([len(keys)]), keys, addresses.astype(np.uint32)]
            if metadata:
                columns += self._log.metadata(addresses)
            data = np.concatenate([np.ascontiguousarray(c).view(np.uint8) for c in columns])
            yield data
            yield self._part_check(data, name, offset).view(np.uint8)
            offset += len(data) + 8

    def _read_checkpoint(self, c: dict[str, Any]) -> int:
        """Fill the index from a checkpoint; how many rows lie in segments that are no more."""
        name, size = c["file"], self._size(c["file"])
        if size != c["nbytes"]:
            raise self._corrupt(
                "a committed file is missing" if size < 0 else "the index has another length than its manifest says",
                name,
                max(0, min(size, c["nbytes"])),
            )
        moved = np.array([self._log.file(place) != file for place, file in c["places"]], np.bool_)
        place_of = np.array([place for place, _ in c["places"]], np.int64)
        gone = place_of[moved] if len(place_of) else place_of
        n_gone, offset, row = 0, 0, 20 if c["metadata"] else 12
        if c["n_rows"] * row > size:
            raise self._corrupt("the index has not as many rows as its manifest says", name)
        # Rows come in the order of an index: one that grew meanwhile would be searched along ever longer ways.
        self._places = Places(c["n_rows"])
        with named("read", self._directory / name):
            handle = self._disk.open(self._directory / name)
        try:
            while offset < size:
                n = int(self._read_file(name, offset, 8, handle).view(np.int64)[0]) if size - offset >= 16 else -1
                if not 0 <= n <= MOST_PART_ROWS or offset + 16 + n * row > size:
                    raise self._corrupt("the index does not match its checksum", name, offset)
                data = self._read_file(name, offset, 16 + n * row, handle)
                if self._part_check(data[:-8], name, offset).view(np.uint8).tobytes() != data[-8:].tobytes():
                    raise self._corrupt("the index does not match its checksum", name, offset)
                keys, rest = data[8 : 8 + 8 * n].view(np.int64), data[8 + 8 * n : -8].view(np.uint32)
                addresses = rest[:n].astype(np.int64)
                lost = np.isin(addresses // self._log.slots, gone)
                if not (lost | self._log.inside(addresses)).all():
                    raise self._corrupt("the index points outside the segments", name, offset)
                n_gone += int(np.count_nonzero(lost))
                if (self._places.put(keys, np.where(lost, GONE, addresses)) >= 0).any():
                    raise self._corrupt("the index has a key twice", name, offset)
                held = ~lost
                self._log.count(addresses[held], 1)
                if c["metadata"]:
                    self._log.put_metadata(addresses[held], rest[n : 2 * n][held], rest[2 * n :][held])
                offset += len(data)
        finally:
            self._disk.close(handle)
        if len(self._places) != c["n_rows"]:
            raise self._corrupt("the index has not as many rows as its manifest says", name)
        return n_gone

    def _read_kept(self) -> dict[str, npt.NDArray[Any]]:
        entry = self._kept_entry
        sizes = [np.dtype(dtype).itemsize * n for dtype, n in entry["columns"].values()]
        if not entry["columns"]:
            return {}
        name, have, checks, offset, out = entry["file"], self._size(entry["file"]), iter(entry["checks"]), 0, {}
        if have != sum(sizes):
            problem = "what was kept has another length than its manifest says"
            raise self._corrupt("a committed file is missing" if have < 0 else problem, name)
        for (column, (dtype, _)), size in zip(entry["columns"].items(), sizes, strict=True):
            data = self._read_file(name, offset, size)
            for at in range(0, size, COLUMN_NBYTES):
                if _check(data[at : at + COLUMN_NBYTES]) != next(checks, None):
                    raise self._corrupt("what was kept does not match its checksum", name, offset + at)
            out[column] = data.view(dtype)
            offset += size
        return out

    def _write_kept(self, keep: Mapping[str, npt.NDArray[Any]], commit: int) -> dict[str, Any]:
        """Write columns, unless they are those of the last commit; their entry in the manifest."""
        arrays = {k: np.ascontiguousarray(c, c.dtype.newbyteorder("<")) for k, c in keep.items()}
        if any(c.dtype.str not in _KEPT_DTYPES or c.ndim != 1 for c in arrays.values()):
            raise InvalidArgument("what is to be kept is no column of int64 or uint16", remedy="give such columns")
        pieces = [
            flat[at : at + COLUMN_NBYTES]
            for flat in (c.view(np.uint8) for c in arrays.values())
            for at in range(0, len(flat), COLUMN_NBYTES)
        ]
        entry = {
            "file": f"kept-{commit:08d}.hbi" if arrays else None,
            "columns": {k: [c.dtype.str, len(c)] for k, c in arrays.items()},
            "checks": [_check(piece) for piece in pieces],
        }
        if {**entry, "file": None} == {**self._kept_entry, "file": None}:
            return self._kept_entry
        if arrays:
            self._write_file(f"kept-{commit:08d}.hbi", iter(pieces))
        return entry

    # --- rows -------------------------------------------------------------------------------------------------

    def _use(self) -> None:
        if self._closed:
            raise Closed("the store is closed", table=self.layout.table, remedy="open the table again")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes: index, metadata, and buffers."""
        return int(self._places.nbytes) + self._log.nbytes - self._log.buffer_nbytes + self.buffers_nbytes

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffer for what is to be written."""
        return self._log.buffer_nbytes

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of buffers: one for what is to be written, and what reads and compaction take."""
        return BUFFERS * self._log.buffer_nbytes

    def find(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether there is such a row, of each key: bool[n]."""
        found: npt.NDArray[np.bool_] = self._places.find(keys) >= 0
        return found

    def written(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether there is such a row with a line here, of each key: bool[n]."""
        at = self._places.find(keys)
        return (at >= 0) & (at != ADDED)

    def add(self, keys: Int64s) -> None:
        """Rows for distinct keys that have none; their lines come with a later `write`, before the next commit."""
        with self._lock:
            self._use()
            before = self._places.put(keys, np.full(len(keys), ADDED, np.int64))
            assert (before < 0).all(), "a row is added that exists"
            self._n_added += len(keys)

    def erase(self, keys: Int64s) -> int:
        """Remove rows; how many were there. All or none.

        Raises
        ------
        StorageError
            The disk is full, or failed.
        """
        with self._lock:
            self._use()
            keys = np.unique(keys)
            at = self._places.find(keys)
            real = keys[(at >= 0) & (at != ADDED)]
            self._tidy(len(real))
            zeros = np.zeros(len(real), np.uint32)
            self._log.append(real, zeros, zeros, None)
            return self.drop(keys)

    def drop(self, keys: Int64s) -> int:
        """`erase` in memory alone: for a table that will not be committed any more, since its disk failed."""
        with self._lock:
            self._use()
            before = self._places.drop(keys)
            self._n_added -= int(np.count_nonzero(before == ADDED))
            self._log.count(before[(before >= 0) & (before != ADDED)], -1)
            return int(np.count_nonzero(before >= 0))

    def write(self, keys: Int64s, lines: Bytes, freq: UInt32s, last_step: UInt32s) -> None:
        """Lines of distinct keys, in place of what may be there. All or none.

        Parameters
        ----------
        keys : int64[n]
        lines : uint8[n, line_nbytes]
        freq, last_step : uint32[n]

        Raises
        ------
        StorageError
            The disk is full, or failed.
        """
        with self._lock:
            self._use()
            self._tidy(len(keys))
            at = self._log.append(keys, freq, last_step, lines)
            try:
                before = self._places.put(keys, at)
            except MemoryError:
                self._log.void(at)
                raise
            self._n_added -= int(np.count_nonzero(before == ADDED))
            self._log.count(before[(before >= 0) & (before != ADDED)], -1)
            self._latest = max(self._latest, int(last_step.max(initial=0)))
            self._appended_nbytes += len(keys) * self._blocks.record_nbytes

    def read(self, keys: Int64s) -> tuple[Bytes, UInt32s, UInt32s]:
        """Lines of rows that were written: uint8[n, line_nbytes], with frequency and last step, uint32[n] each.

        Raises
        ------
        Corrupt
            Bytes on disk are not those that were written: names file and offset.
        InvalidArgument
            A key has no row here, or one without a line.
        StorageError
            The disk failed.
        """
        n = len(keys)
        lines = np.empty((n, self._blocks.line_nbytes), np.uint8)
        freq, last_step = np.empty(n, np.uint32), np.empty(n, np.uint32)
        for first in range(0, n, PART_ROWS):
            some = slice(first, first + PART_ROWS)
            self._read(keys[some], freq[some], last_step[some], lines[some])
        return lines, freq, last_step

    def _read(self, keys: Int64s, freq: UInt32s, last_step: UInt32s, lines: Bytes) -> None:
        left = np.arange(len(keys))
        while len(left):
            with self._lock:
                self._use()
                at = self._places.find(keys[left])
                if ((at < 0) | (at == ADDED)).any():
                    raise InvalidArgument("a key has no line here", table=self.layout.table, remedy="see `written`")
                held, left = self._log.hold(at, left, keys, freq, last_step, lines)
            try:
                self._log.fetch(held, keys, freq, last_step, lines)
            finally:
                with self._lock:
                    self._log.release(held)
                    self._read_ended.notify_all()

    def metadata(self, keys: Int64s) -> tuple[UInt32s, UInt32s]:
        """Frequency and last step of rows, from memory where they are held there, else from disk; 0 where there is no
        line."""
        out = np.zeros((2, len(keys)), np.uint32)
        with self._lock:
            self._use()
            at = self._places.find(keys)
            some = np.flatnonzero((at >= 0) & (at != ADDED))
            if self.layout.metadata:
                out[0, some], out[1, some] = self._log.metadata(at[some])
                return out[0], out[1]
        _, out[0, some], out[1, some] = self.read(keys[some])
        return out[0], out[1]

    def _parts(self) -> Iterator[Int64s]:
        """All keys, about `PART_ROWS` at a time, in no order that matters."""
        n = max(1, len(self._places) // PART_ROWS)
        for part in (Part.share(i, n) for i in range(n)):
            yield self._places.part(part.first, part.last - 1)

    def keys(self, part: Part | None = None) -> Int64s:
        """Keys of a part in the order of their mix, or all: int64[m]. Passes over their shards of the index alone."""
        return (part or Part()).of(self._places)

    def in_order(self) -> Iterator[Int64s]:
        """All keys, ascending, `SORTED_ROWS` or a few more at a time: each piece takes a pass over the index."""
        sample = np.sort(next(self._parts()))  # the keys of a part are as good as drawn at random
        n = -(-len(self) // SORTED_ROWS)
        ends = sample[np.arange(1, n) * len(sample) // n].tolist() if len(sample) else []
        for first, last in pairwise([-(2**63), *ends, 2**63 - 1]):
            found = [keys[(keys >= first) & ((keys < last) | (last == 2**63 - 1))] for keys in self._parts()]
            yield np.sort(np.concatenate(found))

    def latest_step(self) -> int:
        """Largest step that a line here was stamped with, 0 for none."""
        return self._latest

    # --- compaction -------------------------------------------------------------------------------------------

    def _tidy(self, n: int) -> None:
        """Move rows out of sparse segments, as far as writing `n` records allows for."""
        self._debt += SWEEP * n
        step = self._step_blocks * self._blocks.per_block
        while self._debt >= step:
            if self._victim is None or self._log.file(self._victim[0]) != self._victim[1]:
                place = self._log.sparsest(SPACE)
                if place is None:
                    self._debt = 0
                    return
                self._victim = place, self._log.file(place), 0
            place, file, first = self._victim
            n_blocks = min(self._step_blocks, self._log.n_blocks(place) - first)
            self._move(place, first, n_blocks)
            self._debt -= n_blocks * self._blocks.per_block
            self._victim = place, file, first + n_blocks
            if first + n_blocks == self._log.n_blocks(place):
                self._log.bury(place)
                self._victim = None
                self._n_compacted += 1

    def _move(self, place: int, first: int, n_blocks: int) -> None:
        """Write the live records of some blocks again, and the tombstones that the tail still needs."""
        records = self._log.records(place, first, n_blocks)
        addresses = place * self._log.slots + first * self._blocks.per_block + records.positions
        now = self._places.find(records.keys)
        some = np.flatnonzero((now == addresses) & ~records.erased)
        keys = records.keys[some]
        at = self._log.append(keys, records.freq[some], records.last_step[some], self._log.lines_of(records, some))
        self._places.put(keys, at)  # in place: takes no memory
        self._log.count(addresses[some], -1)
        if self._log.file(place) >= (self._checkpoint["end"][0] if self._checkpoint else 0):
            keys = np.unique(records.keys[records.erased & ((now < 0) | (now == ADDED))])
            zeros = np.zeros(len(keys), np.uint32)
            self._log.append(keys, zeros, zeros, None)

    # --- commits ----------------------------------------------------------------------------------------------

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """What the last commit was given to keep, as it was when this home was opened."""
        return self._kept

    def commit(self, keep: Mapping[str, npt.NDArray[Any]] | None = None, latest_step: int = 0) -> str:
        """Make everything up to now durable, and the columns of `keep` (int64 or uint16) beside it; its id.

        `latest_step` of the table, where it is larger than that of any line.

        Raises
        ------
        InvalidArgument
            A row that was added has no line yet.
        StorageError
            The disk is full or failed; the last commit stays, or this one is there whole. May be tried again, but
            fails for ever once rows could not be synced: then the table must be opened anew.
        """
        with self._lock:
            self._use()
            if self._n_added:
                raise InvalidArgument(f"{self._n_added} rows have no line yet", remedy="write them before a commit")
            log = self._log
            # A commit that failed may be the last one for all that is known: its files are not written again.
            self._n_tries += 1
            commit = self.n_commits + self._n_tries
            self._latest = max(self._latest, latest_step)
            log.flush()
            checkpoint, voids = self._checkpoint, log.voids
            size = (20 if self.layout.metadata else 12) * len(self._places)
            tail = log.written_nbytes - self._tail_nbytes
            grown = tail >= max(LEAST_TAIL_NBYTES, TAIL * size, log.live_nbytes // 2) and log.has_room(size)
            log.sync()
            if grown:
                checkpoint, voids = self._write_checkpoint(commit), []
            segments = log.segments()
            files = [file for _, file, _ in segments]
            log.keep(files)
            kept = self._write_kept(keep or {}, commit)
            self._write_manifest(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "commit": commit,
                    "table": self.layout.table,
                    "lines": self._lines(),
                    "nonce": f"{self._nonce:016x}",
                    "n_rows": len(self._places),
                    "latest_step": self._latest,
                    "next_file": log.next_file,
                    "segments": segments,
                    "voids": voids,
                    "checkpoint": checkpoint,
                    "kept": kept,
                }
            )
            self.n_commits, self._n_tries, self._checkpoint, self._kept_entry = commit, 0, checkpoint, kept
            if grown:
                self._tail_nbytes = log.written_nbytes
                log.voids = []
                log.bury()
            log.committed(files)
            self._clean()
            return str(commit)

    def _write_checkpoint(self, commit: int) -> dict[str, Any]:
        name = f"index-{commit:08d}.hbi"
        nbytes = self._write_file(name, self._checkpoint_pieces(name))
        return {
            "file": name,
            "nbytes": nbytes,
            "n_rows": len(self._places),
            "metadata": self.layout.metadata,
            "end": self._log.end(),
            "places": [(place, file) for place, file, _ in self._log.segments()],
        }

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        body = json.dumps(manifest).encode()
        new, path = self._directory / (MANIFEST + ".new"), self._directory / MANIFEST
        with named("sync the directory", self._directory):
            self._disk.sync_directory(self._directory)  # the files it lists have names before it has one
        self._write_file(new.name, iter([body + b"\n" + _check(body).encode() + b"\n"]))
        with named("rename the manifest", path):
            self._disk.rename(new, path)
        with named("sync the directory", self._directory):
            self._disk.sync_directory(self._directory)

    # --- the rest ---------------------------------------------------------------------------------------------

    def verify(self) -> int:
        """Read every block on disk and check it; how many rows have lines.

        Raises
        ------
        Corrupt
            Names file and offset of the first block that fails.
        """
        with self._lock:
            self._use()
            for place, _, _ in self._log.segments():
                n_blocks = self._log.on_disk(place)
                for first in range(0, n_blocks, self._most_blocks):
                    self._log.records(place, first, min(self._most_blocks, n_blocks - first))
            return len(self._places) - self._n_added

    def validate(self) -> None:
        """Recount everything; AssertionError where the home contradicts itself. For tests."""
        with self._lock:
            self._use()
            self._places.validate()
            live, n_added, n = np.zeros(4096, np.int64), 0, 0
            for keys in self._parts():
                at = self._places.find(keys)
                real = at[at != ADDED]
                assert self._log.inside(real).all(), "an address lies outside the segments"
                live += np.bincount(real // self._log.slots, minlength=4096)
                n_added += len(at) - len(real)
                n += len(at)
            assert n == len(self._places) and n_added == self._n_added
            self._log.validate(live)

    def stats(self) -> dict[str, Any]:
        """Rows, sizes in memory and on disk, and what was read and written since the opening."""
        with self._lock:
            log = self._log
            checkpoint = self._checkpoint["nbytes"] if self._checkpoint else 0
            written = log.written_nbytes + self._written_nbytes
            return {
                "rows": len(self._places),
                "index_nbytes": self._places.nbytes,
                "metadata_nbytes": log.nbytes - log.buffer_nbytes,
                "buffer_nbytes": self.buffers_nbytes,
                "disk_nbytes": log.disk_nbytes + checkpoint,
                "live_nbytes": log.live_nbytes,
                "space_amplification": (log.disk_nbytes + checkpoint) / max(1, log.live_nbytes),
                "reads": log.n_reads,
                "read_nbytes": log.read_nbytes,
                "given_nbytes": self._appended_nbytes,
                "written_nbytes": written,
                "write_amplification": written / max(1, self._appended_nbytes),
                "compacted_segments": self._n_compacted,
                "commits": self.n_commits,
                "engine": self._disk.engine,
                "direct": self._disk.direct,
                "waiting": log.n_waiting,
            }

    def close(self) -> None:
        """Let go of memory, files and the lock; what was not committed is discarded. Idempotent."""
        with self._lock:
            self._closed = True
            self._places = Places()
            if hasattr(self, "_log"):
                self._read_ended.wait_for(lambda: not self._log.reading)  # a file's number may soon be another's
                self._log.close()
            self._disk.rest()
            self._unlock()


def _check(data: Any) -> str:
    """XXH64 of bytes, in hexadecimal."""
    view = np.frombuffer(data, np.uint8)
    return f"{int(hash_bytes(view, np.array([0, len(view)]))[0]) % 2**64:016x}"


def _counts(*values: Any, below: int = 2**62) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < below for n in values)


def _is_manifest(m: dict[str, Any]) -> bool:
    """Whether a manifest's values are of the kinds and sizes that they can have."""
    good = _counts(m["commit"], m["n_rows"], m["latest_step"], m["next_file"]) and isinstance(m["lines"], str)
    good = good and re.fullmatch("[0-9a-f]{16}", m["nonce"]) is not None
    for place, file, n_blocks in m["segments"]:
        good = good and _counts(place, n_blocks, below=2**20) and _counts(file, below=m["next_file"])
    for column in (0, 1):
        good = good and len({s[column] for s in m["segments"]}) == len(m["segments"])
    good = good and all(_counts(*void) and len(void) == 3 for void in m["voids"])
    if (c := m["checkpoint"]) is not None:
        good = good and _OTHERS.fullmatch(c["file"]) is not None and _counts(c["nbytes"], c["n_rows"], *c["end"])
        good = good and len(c["end"]) == 2 and isinstance(c["metadata"], bool)
        good = good and all(_counts(*pair) and len(pair) == 2 for pair in c["places"])
    kept = m["kept"]
    good = good and all(isinstance(check, str) for check in kept["checks"])
    for dtype, n in kept["columns"].values():
        good = good and dtype in _KEPT_DTYPES and _counts(n, below=2**40)
    return good and (not kept["columns"] or _OTHERS.fullmatch(kept["file"]) is not None)

"""The SSD tier: rows in segment files, an index of all of them and a cache of some in memory.

A table has a directory of its own: segment files (see `segments`), an index checkpoint and a manifest, all named by
the commit. A commit

1. writes all dirty lines home, and rewrites the live rows of segments that are less than half alive;
2. syncs the segments;
3. writes the index (key, frequency, last step, address of each row) to a new file and syncs it, and to another what
   the table wants kept beside its rows (the counts of its admission);
4. writes the manifest, which lists segments and index with lengths and checksums, under another name, syncs it, and
   renames it into place: at that instant the commit exists;
5. deletes what the commit no longer needs.

Whatever happens before the rename leaves the last commit whole, because nothing that it lists is ever overwritten or
deleted; what is not listed is deleted at the next opening.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_bytes
from hbkit._ext.slabs import Slabs
from hbkit.errors import Corrupt, InvalidArgument, Locked, SchemaMismatch, Unsupported
from hbkit.store.base import Float32s, Int64s, Layout
from hbkit.store.cache import LINE_NBYTES, WAYS, as_nbytes
from hbkit.store.policy import Policy, make_policy
from hbkit.store.segments import SEGMENT_NBYTES, Segments, storage_error, sync_directory, write_all
from hbkit.store.tier import Lines, TieredStore, budget_exceeded, grown, index_entries

FORMAT = "hbkit-ssd"
VERSION = 1
BLOCK_NBYTES = 2**20  # of the index that share a checksum
MANIFEST = "manifest.json"
_INDEX = re.compile(r"(index|kept)-\d+\.hbi|manifest\.json\.new")
_KEPT_DTYPES = ("<i8", "<u2")


@dataclass(frozen=True)
class CachedSsd:
    """Rows on disk under a cache in memory; see `cached_ssd`."""

    path: Path
    host_budget: int
    policy: Callable[[int], Policy]

    def open(self, layout: Layout) -> SsdStore:
        """A store for one table of this layout, in a directory named after it."""
        if not layout.table or "/" in layout.table or layout.table.startswith("."):
            raise InvalidArgument(f"table name {layout.table!r}", remedy="give a name that can be a file name")
        return SsdStore(layout, self.path / layout.table, self.host_budget, self.policy)


def cached_ssd(
    path: str | os.PathLike[str], host_budget: int | str = "2GiB", policy: str | Callable[[int], Policy] = "lfu"
) -> CachedSsd:
    """A place for tables larger than memory: rows on disk, a cache of bounded size above them.

    Parameters
    ----------
    path : path
        Directory, made if need be. Tables found in it go on from their last `commit`; what came after it is gone.
    host_budget : int or str
        Bytes of memory ("2GiB") that each table's index, metadata and cache may take together.
    policy : "lfu", "lru" or "tinylfu", or a `Policy` class
        Which rows the cache keeps. No result depends on it.

    Raises
    ------
    BudgetExceeded
        On opening, or when rows are added: the index leaves no room for a cache.
    Corrupt
        On opening or reading: bytes on disk are not those that were written.
    Locked
        On opening: another store holds the table.
    SchemaMismatch
        On opening: the table there has another dim or optimizer state.

    Examples
    --------
    >>> Table("user", dim=16, store=hbkit.store.cached_ssd("rows", host_budget="1GiB"))
    """
    return CachedSsd(Path(path), as_nbytes(host_budget), make_policy(policy))


class SsdStore(TieredStore):
    """One table on disk, cached in memory.

    Parameters
    ----------
    layout : Layout
    directory : Path
    host_budget : int
        Bytes.
    policy : callable
    cache_lines : int, optional
        The most lines that the cache may have, where the budget would allow for more.
    segment_nbytes : int
        About how long a segment file is, for a table that is not there yet.
    """

    tier = "ssd"
    row_nbytes = 24

    def __init__(
        self,
        layout: Layout,
        directory: Path,
        host_budget: int,
        policy: Callable[[int], Policy],
        cache_lines: int | None = None,
        segment_nbytes: int = SEGMENT_NBYTES,
    ) -> None:
        line_nbytes = 4 * layout.width
        self._budget, self._cache_lines, self._directory = host_budget, cache_lines, directory
        # On their way, lines exist up to four times: in the cache's order, as records, in a read's run, in scratch.
        self._scratch_nbytes = min(2**23, host_budget // 8)
        super().__init__(layout, policy, max(1, self._scratch_nbytes // (4 * (line_nbytes + 16))))
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._address = np.zeros(0, np.int64)  # of each row's record, -1 where it has none
        self._least_line = line_nbytes + LINE_NBYTES
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise storage_error(e, "open the table's directory", directory) from e
        self._unlock = weakref.finalize(self, os.close, lock)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "close it there, or give another path"
                raise Locked("another store has the table open", file=directory / "LOCK", remedy=remedy) from None
            except OSError as e:
                raise storage_error(e, "lock the table", directory / "LOCK") from e
            self._open(segment_nbytes)
        except BaseException:
            self._unlock()
            raise

    def _open(self, segment_nbytes: int) -> None:
        manifest = _read_manifest(self._directory / MANIFEST)
        self._clean({manifest["index"]["file"], manifest["kept"]["file"]} if manifest else set())
        if manifest is None:
            per_segment = max(1, segment_nbytes // (4 * self.layout.width + 16))
            self._segments = Segments(self._directory, self.layout.width, per_segment, {})
            self._use()  # a budget too small for an empty table is refused now
            return
        have, want = (manifest["dim"], manifest["n_state"]), (self.layout.dim, self.layout.width - self.layout.dim)
        if have != want:
            raise SchemaMismatch(
                f"the table on disk has lines of {have[0]} + {have[1]} floats, not {want[0]} + {want[1]}",
                table=self.layout.table,
                file=self._directory,
                remedy="give the table the dim and optimizer that it was made with, or another path",
            )
        committed = {int(s): int(n) for s, n in manifest["segments"].items()}
        self._segments = Segments(self._directory, self.layout.width, manifest["per_segment"], committed)
        self._n_commits = manifest["commit"]
        n_rows = manifest["n_rows"]
        self._make_room(n_rows)
        path = self._directory / manifest["index"]["file"]
        shapes = [("<i8", n_rows)] * 4
        key, freq, last_step, address = _read_columns(path, shapes, manifest["index"]["checks"], "the index")
        segment, i = np.divmod(address, self._segments.per_segment)
        lengths = np.array([committed.get(int(s), 0) for s in np.unique(segment)], np.int64)
        if (i >= lengths[np.unique(segment, return_inverse=True)[1]]).any():
            raise Corrupt("the index points outside the segments", file=path, offset=0, remedy=_RESTORE)
        rows = self._insert(key)
        if len(self._index) != n_rows:
            raise Corrupt("the index has a key twice", file=path, offset=0, remedy=_RESTORE)
        self._metadata.put(rows, freq, last_step)
        self._address[rows] = address
        self._segments.revive(address)
        kept = manifest["kept"]
        if kept["columns"]:
            shapes = [(dtype, n) for dtype, n in kept["columns"].values()]
            columns = _read_columns(self._directory / kept["file"], shapes, kept["checks"], "what was kept")
            self._kept = dict(zip(kept["columns"], columns, strict=True))
        self._use()

    def _clean(self, keep: set[str]) -> None:
        """Delete what an earlier or unfinished commit left, segments apart."""
        for path in self._directory.iterdir():
            if _INDEX.fullmatch(path.name) and path.name not in keep:
                try:
                    path.unlink()
                except OSError as e:
                    raise storage_error(e, "delete an old index", path) from e

    def _grow(self, room: int) -> None:
        super()._grow(room)
        self._address = grown(self._address, room)

    def _insert(self, keys: Int64s) -> Int64s:
        rows = super()._insert(keys)
        self._address[rows] = -1
        return rows

    def _capacity(self, n_rows: int) -> int:
        entries = index_entries(n_rows)
        fixed = 12 * entries + (4 + self.row_nbytes) * (entries * 3 // 4)  # 4: the index's list of free slots
        n_lines = (self._budget - self._scratch_nbytes - fixed) // self._least_line
        if n_lines < 1:
            least = fixed + WAYS * self._least_line
            least = min(least + 2**23, least * 8 // 7 + 8)
            raise budget_exceeded("host_budget", self._budget, n_rows, least, self.layout.table)
        if self._cache_lines is not None:
            n_lines = min(n_lines, self._cache_lines)
        unit = max(WAYS, 1 << max(0, _chunk_lines(n_lines, self.layout.width).bit_length() - 1))
        return n_lines if n_lines < WAYS else n_lines // unit * unit

    def _new_lines(self, n_lines: int) -> Lines:
        lines = Slabs(self.layout.width, _chunk_lines(n_lines, self.layout.width) * 4 * self.layout.width)
        return _Growing(lines, n_lines)

    def _metadata_changed(self, rows: Int64s) -> None:
        pass  # each commit writes all of it

    def _read_home(self, rows: Int64s, keys: Int64s) -> Float32s:
        return self._segments.read(self._address[rows], keys)

    def _write_home(self, rows: Int64s, keys: Int64s, lines: Float32s) -> None:
        addresses = self._segments.append(keys, lines)
        self._segments.forget(self._address[rows])
        self._address[rows] = addresses

    def _erase_home(self, rows: Int64s, keys: Int64s) -> None:
        self._segments.forget(self._address[rows])
        self._address[rows] = -1

    def _compact(self) -> None:
        sparse = self._segments.sparse()
        if not sparse:
            return
        keys, rows = self._index.items()
        moving = np.flatnonzero(np.isin(self._address[rows] // self._segments.per_segment, sparse))
        for first in range(0, len(moving), self._scratch_lines):
            some = moving[first : first + self._scratch_lines]
            self._write_home(rows[some], keys[some], self._read_home(rows[some], keys[some]))

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """What the last commit that was opened was given to keep."""
        return self._kept

    def _commit_home(self, keep: Mapping[str, npt.NDArray[Any]]) -> str:
        self._compact()
        segments = self._segments.sync()
        self._segments.keep(segments)
        keys, rows = self._index.items()
        name = f"index-{self._n_commits:08d}.hbi"
        columns = (*self._metadata.get(rows), self._address[rows])
        checks = _write_columns(self._directory / name, [keys, *columns])
        kept = f"kept-{self._n_commits:08d}.hbi"
        arrays = {k: np.ascontiguousarray(c, c.dtype.newbyteorder("<")) for k, c in keep.items()}
        kept_checks = _write_columns(self._directory / kept, list(arrays.values())) if arrays else []
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "commit": self._n_commits,
            "table": self.layout.table,
            "dim": self.layout.dim,
            "n_state": self.layout.width - self.layout.dim,
            "n_rows": len(keys),
            "per_segment": self._segments.per_segment,
            "segments": {str(s): n for s, n in sorted(segments.items())},
            "index": {"file": name, "checks": checks},
            "kept": {
                "file": kept,
                "columns": {k: [c.dtype.str, len(c)] for k, c in arrays.items()},
                "checks": kept_checks,
            },
        }
        _write_manifest(self._directory, manifest)
        self._segments.committed(segments)
        self._clean({name, kept})
        return str(self._n_commits)

    def _home_stats(self) -> dict[str, Any]:
        return {
            "host_budget_nbytes": self._budget,
            "scratch_nbytes": self._scratch_nbytes,
            "disk_nbytes": self._segments.nbytes,
            "read_nbytes": self._segments.read_nbytes,
            "written_nbytes": self._segments.written_nbytes,
            "commits": self._n_commits,
        }

    def verify(self) -> int:
        """Read every row that lies on disk and check it; how many rows.

        Raises
        ------
        Corrupt
            Names file and offset of the first row that fails.
        """
        with self._lock:
            self._use()
            keys, rows = self._index.items()
            held = self._address[rows] >= 0
            keys, rows = keys[held], rows[held]
            order = np.argsort(self._address[rows])
            for first in range(0, len(order), self._scratch_lines):
                some = order[first : first + self._scratch_lines]
                self._read_home(rows[some], keys[some])
            return len(order)

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        with self._lock:
            super().validate()
            cache, _ = self._use()
            _, rows = self._index.items()
            addresses = self._address[rows]
            self._segments.validate(addresses[addresses >= 0])
            dirty = np.zeros(self._room, np.bool_)
            dirty[cache.owner[cache.dirty]] = True
            assert not ((addresses < 0) & ~dirty[rows]).any(), "a row is nowhere"
            s = self.stats()
            used = sum(s[k] for k in ("index_nbytes", "lines_nbytes", "metadata_nbytes", "scratch_nbytes"))
            assert used <= self._budget, "over budget"

    def close(self) -> None:
        """Let go of memory, files and the lock; what was not committed is discarded. Idempotent."""
        with self._lock:
            super().close()
            self._segments.close()
            self._unlock()


class _Growing:
    """Slabs that take memory only as far as lines are used; the cache hands them out from the lowest on."""

    def __init__(self, slabs: Slabs, n_lines: int) -> None:
        self._slabs, self._n_lines = slabs, n_lines
        self.gather, self.apply = slabs.gather, slabs.apply

    @property
    def nbytes(self) -> int:
        return int(self._slabs.nbytes)

    def scatter(self, slots: Int64s, lines: Float32s) -> None:
        if len(slots):
            self._slabs.reserve(int(slots.max()) + 1)
        self._slabs.scatter(slots, lines)


def _chunk_lines(n_lines: int, width: int) -> int:
    """Lines of a slab's chunk: a sixteenth of the cache or about 4 MiB, so that rounding up costs little."""
    return max(1, min(n_lines // WAYS, 2**22 // (4 * width)))


_RESTORE = "restore the directory from a copy or a snapshot"


def _check(data: Any) -> str:
    """XXH64 of bytes, in hexadecimal."""
    view = np.frombuffer(data, np.uint8)
    return f"{int(hash_bytes(view, np.array([0, len(view)]))[0]) % 2**64:016x}"


def _write_file(path: Path, blocks: list[Any]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            offset = 0
            for block in blocks:
                view = memoryview(block).cast("B")
                write_all(fd, view, offset)
                offset += len(view)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise storage_error(e, "write", path) from e


def _read_file(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(most + 1)
    except FileNotFoundError:
        raise Corrupt("a committed file is missing", file=path, offset=0, remedy=_RESTORE) from None
    except OSError as e:
        raise storage_error(e, "read", path) from e


def _write_columns(path: Path, columns: Sequence[npt.NDArray[Any]]) -> list[str]:
    """Write columns one after the other; the checksums of their blocks."""
    flat = [np.ascontiguousarray(c).view(np.uint8) for c in columns]
    blocks = [c[i : i + BLOCK_NBYTES] for c in flat for i in range(0, len(c), BLOCK_NBYTES)]
    _write_file(path, blocks)
    return [_check(block) for block in blocks]


def _read_columns(
    path: Path, shapes: Sequence[tuple[str, int]], checks: list[str], what: str
) -> list[npt.NDArray[Any]]:
    """Columns of these dtypes and lengths, verified."""
    sizes = [np.dtype(dtype).itemsize * n for dtype, n in shapes]
    data = _read_file(path, sum(sizes))
    if len(data) != sum(sizes):
        raise Corrupt(f"{what} has another length than its manifest says", file=path, offset=0, remedy=_RESTORE)
    out, end, unchecked = [], 0, iter(checks)
    for (dtype, _), size in zip(shapes, sizes, strict=True):
        start, end = end, end + size
        for first in range(start, end, BLOCK_NBYTES):
            if _check(memoryview(data)[first : min(first + BLOCK_NBYTES, end)]) != next(unchecked, None):
                raise Corrupt(f"{what} does not match its checksum", file=path, offset=first, remedy=_RESTORE)
        out.append(np.frombuffer(data[start:end], dtype))
    return out


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    body = json.dumps(manifest).encode()
    new, path = directory / (MANIFEST + ".new"), directory / MANIFEST
    sync_directory(directory)  # the files it lists have names before it has one
    _write_file(new, [body + b"\n" + _check(body).encode() + b"\n"])
    try:
        os.replace(new, path)
    except OSError as e:
        raise storage_error(e, "rename the manifest", path) from e
    sync_directory(directory)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """A verified manifest, None where nothing was committed."""
    if not path.exists():
        return None
    lines = _read_file(path, 2**28).split(b"\n")
    if len(lines) != 3 or lines[2] or lines[1] != _check(lines[0]).encode():
        raise Corrupt("the manifest does not match its checksum", file=path, offset=0, remedy=_RESTORE)
    try:
        manifest = json.loads(lines[0])
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise Unsupported(
                f"format {manifest['format']!r} version {manifest['version']!r}",
                file=path,
                remedy="use the hbkit that wrote it",
            )
        numbers = [manifest[k] for k in ("commit", "dim", "n_state", "n_rows", "per_segment")]
        numbers += [n for s in manifest["segments"].items() for n in (int(s[0]), s[1])]
        name = manifest["index"]["file"]
        good = all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers) and _INDEX.fullmatch(name) is not None
        good = good and 0 < manifest["per_segment"] < 2**32 and max(map(int, manifest["segments"]), default=0) < 2**30
        good = good and all(isinstance(c, str) for c in manifest["index"]["checks"])
        kept = manifest["kept"]
        good = good and _INDEX.fullmatch(kept["file"]) is not None and all(isinstance(c, str) for c in kept["checks"])
        for dtype, n in kept["columns"].values():
            good = good and dtype in _KEPT_DTYPES and isinstance(n, int) and 0 <= n < 2**40
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise Corrupt("the manifest is not one", file=path, offset=0, remedy=_RESTORE)
    return manifest

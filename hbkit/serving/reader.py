"""Reader: the rows of one commit of a snapshot, for lookups by any number of threads."""

from __future__ import annotations

import copy
import os
import threading
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.index import Index
from hbkit.embedding.initializers import Initializer, named
from hbkit.errors import Closed, Corrupt, InvalidArgument, UnknownColumn, Unsupported
from hbkit.snapshot.files import RESTORE
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest, TableEntry
from hbkit.snapshot.places import place_of
from hbkit.store.keys import as_keys
from hbkit.store.line import Chunk, Float32s, Int64s

__all__ = ["Reader"]


class Reader:
    """Lookups in the newest commit of a snapshot, or in one that is named.

    Parameters
    ----------
    path : str or path
        Directory or URI of a snapshot. All its files that the commit needs are checked, then all rows held in memory.
    commit : str, optional
        Its id: then `refresh` changes nothing. The newest when left out.

    Raises
    ------
    NotFound
        There is no snapshot, or no such commit.
    Corrupt
        A file is missing, damaged or hostile.
    StorageError
        The disk cannot be read.
    Unsupported
        The snapshot is of a newer hbkit, or a table's default is drawn by an initializer that hbkit does not know.

    Notes
    -----
    Safe to use from several threads; lookups take no lock, and each reads one commit.

    Memory: a row is float32[dim], 4 bytes, and 16 to 20 of an index. Where the newest commit builds on the one held,
    `refresh` reads only the deltas since, and its time and memory follow their rows (and 4 bytes for each row of the
    table). The rows that they replace stay until a fifth of all are such; then those that are left are copied. While
    that is done, or a commit is loaded that does not build on the one held, two commits are in memory.

    Examples
    --------
    >>> with hbkit.serving.Reader("model") as reader:
    ...     rows = reader.lookup("user", [1, 2, 3])
    """

    def __init__(self, path: str | os.PathLike[str], commit: str | None = None) -> None:
        self._place = place_of(path)
        self._stays = commit not in (None, "latest")
        self._refreshing = threading.Lock()
        # The one reference that refresh swaps; whoever took it before keeps what it took.
        history = History(self._place)
        self._held: _Held | None = _Held(history, history.find(commit))

    def lookup(self, table: str, keys: npt.ArrayLike) -> Float32s:
        """Rows of keys: float32[n, dim], the caller's own; absent keys read the default that the table had.

        Parameters
        ----------
        table : str
        keys : integers [n]
            As `hbkit.embedding.Table.lookup` takes them.

        Raises
        ------
        UnknownColumn
            There is no such table in the commit.
        InvalidArgument
            The keys are no vector of integers, or one does not fit the table's key_dtype.
        Closed
            The reader is closed.
        """
        held = self._use()
        rows = held.tables.get(table)
        if rows is None:
            raise UnknownColumn(
                f"no table {table!r} in commit {held.manifest.commit}",
                file=self._place.name,
                remedy=f"tables are {', '.join(held.tables) or 'none'}",
            )
        return rows.lookup(keys)

    def refresh(self) -> bool:
        """Whether there was a newer commit, which lookups that begin from now on read.

        Where it cannot be loaded, this raises as the constructor does, and the reader stays at the commit it has.
        """
        with self._refreshing:
            held = self._use()
            if self._stays:
                return False
            history = History(self._place)
            newest = history.find(None)
            if history.digest(newest) == held.digest:
                return False
            self._held = _Held(history, newest, held)
            return True

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(self._use().tables)

    @property
    def step(self) -> int:
        """Training step of the commit."""
        return self._use().manifest.step

    @property
    def commit(self) -> str:
        """Id of the commit."""
        return self._use().manifest.commit

    def close(self) -> None:
        """Let go of the rows. Idempotent; lookups under way finish."""
        with self._refreshing:
            self._held = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _use(self) -> _Held:
        held = self._held
        if held is None:
            raise Closed("the reader is closed", file=self._place.name, remedy="open another Reader")
        return held


class _Held:
    """All tables of one commit, never changed."""

    def __init__(self, history: History, manifest: Manifest, before: _Held | None = None) -> None:
        self.manifest = manifest
        self.digest = history.digest(self.manifest)
        self.tables = {name: self._rows(history, name, before) for name in self.manifest.tables}

    def _rows(self, history: History, name: str, before: _Held | None) -> _Rows:
        entry = self.manifest.tables[name]
        if before is not None and name in before.tables and before.tables[name].reads_like(entry):
            changes = history.changes(self.manifest, name, before.digest)
            if changes is not None:
                return before.tables[name].changed(*changes, entry, history.place.name)
        return _Rows.load(history, name, history.chain(self.manifest, name))


ABSENT, ZEROS, FIRST = 0, 1, 2  # lines: what absent keys read, what the padding key reads, and the first of a key
STEP = 4096  # keys that are made known at once: lookups wait meanwhile


class _Rows:
    """One table at one commit: key to slot to line.

    The commits of a reader share the index and the lines, to which a newer commit only adds; what tells them apart is
    `place`, the line of each slot. So an older one, which lookups under way may hold, reads what it always read.
    """

    def __init__(self, name: str, entry: TableEntry, n_keys: int, file: str) -> None:
        self._name, self._entry, self.n_rows = name, entry, n_keys
        room = n_keys + n_keys // 4 + STEP  # for slots, and for lines: memory that is not touched is not taken
        self._index = Index(n_keys)
        self._lines = np.zeros((FIRST + room, entry.dim), np.float32)
        self._n_lines = FIRST
        self._place = np.full(room + 1, ABSENT, np.uint32)  # the last one is that of slot -1
        self._drawn: Initializer | None = None
        if isinstance(entry.default, dict):
            self._drawn = self._initializer(entry.default, file)
        elif entry.default is not None:
            self._lines[ABSENT] = entry.default
        self._padding = None if entry.padding_key is None else as_keys([entry.padding_key], entry.key_dtype, name)[0]

    @staticmethod
    def load(history: History, name: str, chain: list[Manifest]) -> _Rows:
        """A table as a chain of commits has it."""
        keys = history.check_rows(chain, name)
        held = _Rows(name, chain[-1].tables[name], len(keys), history.place.name)
        held._know(keys)
        for _, chunk in history.replay(chain, name):
            if chunk is not None:  # a key erased and not made again is not among the keys
                lines = held._find(chunk.key)
                there = lines != ABSENT
                held._lines[lines[there]] = chunk.row[there]
        return held

    def reads_like(self, entry: TableEntry) -> bool:
        """Whether rows of `entry` can stand beside these."""
        same = ("dim", "key_dtype", "default", "padding_key")
        return all(getattr(self._entry, what) == getattr(entry, what) for what in same)

    def changed(self, erased: Int64s, chunk: Chunk, entry: TableEntry, file: str) -> _Rows:
        """Without some keys, and with the rows of `chunk`. Raises Corrupt where that does not make `entry`."""
        was_there = self._find(erased) != ABSENT
        is_new = self._find(chunk.key) == ABSENT
        n_rows = self.n_rows - int(was_there.sum()) + int(is_new.sum())
        if n_rows != entry.n_rows:
            raise Corrupt(
                f"the deltas make {n_rows} rows, the manifest says {entry.n_rows}",
                file=file,
                table=self._name,
                remedy=RESTORE,
            )
        room = len(self._place) - 1
        if max(self._index.n_slots + is_new.sum(), self._n_lines - FIRST + len(chunk.key)) > room:
            return self._packed(len(chunk.key), file).changed(erased, chunk, entry, file)
        new = copy.copy(self)
        new._entry, new.n_rows, new._place = entry, n_rows, self._place.copy()
        new._place[new._index.find(erased)] = ABSENT
        new._know(chunk.key)
        new._lines[self._n_lines : new._n_lines] = chunk.row
        return new

    def _packed(self, more: int, file: str) -> _Rows:
        """The same rows, with room for `more` of them, and none that are not read."""
        keys, slots = self._index.items()
        lines = self._place[slots]
        there = lines != ABSENT
        new = _Rows(self._name, self._entry, self.n_rows + more, file)
        new.n_rows = self.n_rows
        new._know(keys[there])
        np.take(self._lines, lines[there], axis=0, out=new._lines[FIRST : new._n_lines], mode="clip")
        return new

    def _know(self, keys: Int64s) -> None:
        """Give each of some distinct keys a new line."""
        for first in range(0, len(keys), STEP):
            part = keys[first : first + STEP]
            slots, _ = self._index.find_or_insert(part)
            self._place[slots] = np.arange(self._n_lines, self._n_lines + len(part))
            self._n_lines += len(part)

    def _find(self, keys: Int64s) -> npt.NDArray[np.uint32]:
        lines: npt.NDArray[np.uint32] = self._place.take(self._index.find(keys))
        return lines

    def lookup(self, keys: npt.ArrayLike) -> Float32s:
        """As `Reader.lookup`."""
        held = as_keys(keys, self._entry.key_dtype, self._name)
        lines = self._find(held)
        if self._padding is not None:
            lines[held == self._padding] = ZEROS
        rows: Float32s = self._lines.take(lines, axis=0)
        if self._drawn is not None:
            absent = np.flatnonzero(lines == ABSENT)
            rows[absent] = self._drawn(self._name, held[absent], self._entry.dim)
        return rows

    def _initializer(self, config: dict[str, Any], file: str) -> Initializer:
        try:
            return named(config)
        except InvalidArgument as e:
            raise Corrupt(e.problem, file=file, table=self._name, remedy=RESTORE) from e
        except Unsupported as e:
            raise Unsupported(
                f"the default is drawn by {config['name']!r:.40}",
                file=file,
                table=self._name,
                remedy=f"{e.remedy}, and save again",
            ) from e

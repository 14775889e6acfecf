"""Following: tables that are kept at the newest commit of a snapshot, at the cost of what each commit changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hbkit.snapshot.history import History, Step
from hbkit.snapshot.manifest import Manifest, TableEntry
from hbkit.snapshot.places import place_of
from hbkit.snapshot.reader import (
    Loaded,
    _admission,
    _admitting,
    _compare,
    _keeps_state,
    named_tables,
    read_state,
)
from hbkit.snapshot.table import EVERYTHING, TableLike, descend, forget
from hbkit.store.line import Chunk, Int64s

__all__ = ["Follower", "follow"]


def follow(path: str | os.PathLike[str], tables: Sequence[TableLike] | Mapping[str, TableLike]) -> Follower:
    """Keep tables at the newest commit of a snapshot that another process writes.

    >>> follower = hbkit.snapshot.follow("model", [users, items])
    >>> threading.Thread(target=follower.run, args=(1.0, stop)).start()  # and look up in the tables meanwhile

    Parameters
    ----------
    path : str or path
        Of a snapshot; the first commit may still be to come.
    tables : sequence of Table, or mapping of str to Table
        As `load` takes them. Nobody else may change them.
    """
    return Follower(path, tables)


class Follower:
    """Tables that `poll` brings to the newest commit of a snapshot; see `follow`.

    Notes
    -----
    Only the deltas since the commit that the tables are at are read, checked and applied. Where the newest commit does
    not build on that one (a full save, another history), all its rows are read.

    A lookup in a `Table` over host memory that runs meanwhile sees all rows that a delta brings or none; over a tier,
    each row as it was before or after. Keys that it erases go a moment later, and other tables have their turn before
    or after. While all rows are replaced, no row is missing, but those of the old and the new commit are mixed.
    `hbkit.serving.Reader` has no such moments.

    Memory: the deltas that one `poll` applies are held at once.
    """

    def __init__(self, path: str | os.PathLike[str], tables: Sequence[TableLike] | Mapping[str, TableLike]) -> None:
        self._place = place_of(path)
        self._tables = named_tables(tables)
        self._digest: str | None = None  # of the commit that the tables are at
        self._commit: str | None = None
        self._polling = threading.Lock()

    @property
    def commit(self) -> str | None:
        """Id of the commit that the tables are at; None before the first."""
        return self._commit

    def poll(self) -> Loaded | None:
        """Bring the tables to the newest commit, and say what else is in it; None where they are there already.

        Raises
        ------
        HbkitError
            As `load` raises. The tables stay as they are, unless the store itself failed; the next call tries again.
        """
        with self._polling:
            history = History(self._place)
            if not history.commits():
                return None
            newest = history.find(None)
            if history.digest(newest) == self._digest:
                return None
            notes = []
            for name, table in self._tables.items():
                if table.pending is not None:
                    table.pending.settle()
                notes += _compare(name, table, newest, self._place.name)
            history.check_files(f for name in self._tables for f in newest.tables[name].admission_files)
            state = read_state(history, newest)
            steps = {name: self._prepare(name, table, history, newest) for name, table in self._tables.items()}
            counts = _admission(history, newest, self._tables, EVERYTHING)
            self._digest = None  # if a store fails midway, all is loaded anew
            with _admitting(counts):
                for name, table in self._tables.items():
                    gone, lines = steps[name]
                    entry = newest.tables[name]
                    if lines is None:
                        _replace(table, history.replay(history.chain(newest, name), name), entry, gone)
                    else:
                        _put(table, lines, entry)
                        table.store.erase(gone)
                    table.step = entry.step
                    if _keeps_state(table, entry) and name == table.name:  # as `load` does
                        for digest in history.same(newest):
                            descend(table, digest)
            self._digest, self._commit = history.digest(newest), newest.commit
            return Loaded(newest.step, state, newest.commit, notes)

    def run(self, every: float = 1.0, stop: threading.Event | None = None) -> None:
        """`poll` every so many seconds, until `stop` is set. What `poll` raises ends it; it may be called again."""
        stop = stop or threading.Event()
        while not stop.is_set():
            self.poll()
            stop.wait(every)

    def _prepare(self, name: str, table: TableLike, history: History, newest: Manifest) -> tuple[Int64s, Chunk | None]:
        """Keys to erase, and lines to put; or all keys, and None. Everything that is needed is checked."""
        if self._digest is not None and (changes := history.changes(newest, name, self._digest)) is not None:
            erased, lines = changes
            n = len(table.store) + np.count_nonzero(~table.store.has(lines.key))
            if n - np.count_nonzero(table.store.has(erased)) == newest.tables[name].n_rows:
                return erased, lines
        return history.check_rows(history.chain(newest, name), name), None


def _replace(table: TableLike, steps: Iterable[Step], entry: TableEntry, keys: Int64s) -> None:
    """Make the rows of a table those of `keys` that `steps` put; none is missing meanwhile."""
    forget(table)
    for _, lines in steps:
        if lines is not None:
            _put(table, lines, entry)
    for chunk in table.store.scan():
        table.store.erase(chunk.key[~np.isin(chunk.key, keys, assume_unique=True)])


def _put(table: TableLike, lines: Chunk, entry: TableEntry) -> None:
    if not _keeps_state(table, entry):
        initial = np.asarray(table.optimizer.initial_state(table.dim), np.float32)
        lines = lines._replace(state=np.tile(initial, (len(lines.key), 1)))
    table.store.put(lines)

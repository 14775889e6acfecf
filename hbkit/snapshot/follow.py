"""Following: tables that are kept at the newest commit of a snapshot, at the cost of what each commit changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from hbkit.errors import InvalidArgument
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest
from hbkit.snapshot.place import place_of
from hbkit.snapshot.reader import Loaded, _compare, _keeps_state, _load_admission, read_state
from hbkit.snapshot.table import TableLike, descend, forget
from hbkit.store.base import Chunk, Int64s

__all__ = ["Follower", "follow"]


def follow(path: str | os.PathLike[str], tables: Sequence[TableLike]) -> Follower:
    """Keep tables at the newest commit of a snapshot that another process writes.

    >>> follower = hbkit.snapshot.follow("model", [users, items])
    >>> threading.Thread(target=follower.run, args=(1.0, stop)).start()  # and look up in the tables meanwhile

    Parameters
    ----------
    path : str or path
        Of a snapshot; the first commit may still be to come.
    tables : sequence of Table
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

    def __init__(self, path: str | os.PathLike[str], tables: Sequence[TableLike]) -> None:
        if len({t.name for t in tables}) != len(tables):
            raise InvalidArgument("two tables have one name", remedy="name each table differently")
        self._place = place_of(path)
        self._tables = list(tables)
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
            for table in self._tables:
                if table.pending is not None:
                    table.pending.settle()
            notes = [note for table in self._tables for note in _compare(table, newest, self._place.name)]
            state = read_state(history, newest)
            steps = [self._prepare(table, history, newest) for table in self._tables]
            _load_admission(history, newest, self._tables)
            self._digest = None  # if a store fails midway, all is loaded anew
            for table, (erased, lines, links) in zip(self._tables, steps, strict=True):
                if lines is None:
                    _replace(table, history, links, erased)
                else:
                    _put(table, lines, links[-1])
                    table.store.erase(erased)
                table.step = newest.tables[table.name].step
                if _keeps_state(table, newest.tables[table.name]):
                    descend(table, history.digest(newest))
            self._digest, self._commit = history.digest(newest), newest.commit
            return Loaded(newest.step, state, newest.commit, notes)

    def run(self, every: float = 1.0, stop: threading.Event | None = None) -> None:
        """`poll` every so many seconds, until `stop` is set. What `poll` raises ends it; it may be called again."""
        stop = stop or threading.Event()
        while not stop.is_set():
            self.poll()
            stop.wait(every)

    def _prepare(
        self, table: TableLike, history: History, newest: Manifest
    ) -> tuple[Int64s, Chunk | None, list[Manifest]]:
        """Keys to erase, lines to put, and the deltas that they are of; or all keys, None and the whole chain."""
        name = table.name
        history.check_files(newest.tables[name].admission_files)
        if self._digest is not None and (links := history.since(newest, name, self._digest)) is not None:
            history.check_files(file for link in links for file in link.tables[name].rows + link.tables[name].erased)
            erased, lines = history.changes(links, name)
            n = len(table.store) + np.count_nonzero(~table.store.has(lines.key))
            if n - np.count_nonzero(table.store.has(erased)) == newest.tables[name].n_rows:
                return erased, lines, links
        chain = history.chain(newest, name)
        history.check_files(file for link in chain for file in link.tables[name].rows + link.tables[name].erased)
        return history.check_rows(chain, name), None, chain


def _replace(table: TableLike, history: History, chain: list[Manifest], keys: Int64s) -> None:
    """Make the rows of a table those of a chain, whose keys are `keys`; no row is missing meanwhile."""
    forget(table)
    for _, lines in history.replay(chain, table.name):
        if lines is not None:
            _put(table, lines, chain[-1])
    for gone in _others(table, keys):
        table.store.erase(gone)


def _others(table: TableLike, keys: Int64s) -> Iterator[Int64s]:
    for chunk in table.store.scan():
        yield chunk.key[~np.isin(chunk.key, keys, assume_unique=True)]


def _put(table: TableLike, lines: Chunk, manifest: Manifest) -> None:
    if not _keeps_state(table, manifest.tables[table.name]):
        initial = np.asarray(table.optimizer.initial_state(table.dim), np.float32)
        lines = lines._replace(state=np.tile(initial, (len(lines.key), 1)))
    table.store.put(lines)

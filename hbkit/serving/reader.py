"""Reader: the rows of one commit of a snapshot, for lookups by any number of threads."""

from __future__ import annotations

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
from hbkit.snapshot.place import place_of
from hbkit.store.base import Float32s
from hbkit.store.keys import as_keys

__all__ = ["Reader"]


class Reader:
    """Lookups in the newest commit of a snapshot.

    Parameters
    ----------
    path : str or path
        Directory of a snapshot. All its files that the commit needs are checked, then all rows held in memory.

    Raises
    ------
    NotFound
        There is no snapshot.
    Corrupt
        A file is missing, damaged or hostile.
    StorageError
        The disk cannot be read.
    Unsupported
        The snapshot is of a newer hbkit, or a table's default is drawn by an initializer that hbkit does not know.

    Notes
    -----
    Safe to use from several threads; lookups take no lock. While `refresh` loads, two commits are in memory.

    Examples
    --------
    >>> with hbkit.serving.Reader("model") as reader:
    ...     rows = reader.lookup("user", [1, 2, 3])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._place = place_of(path)
        self._refreshing = threading.Lock()
        # The one reference that refresh swaps; whoever took it before keeps what it took.
        self._held: _Held | None = _Held(History(self._place), None)

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
            history = History(self._place)
            newest = history.find(None)
            if history.digest(newest) == held.digest:
                return False
            self._held = _Held(history, newest)
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

    def __init__(self, history: History, manifest: Manifest | None) -> None:
        self.manifest = manifest or history.find(None)
        self.digest = history.digest(self.manifest)
        chains = {name: history.chain(self.manifest, name) for name in self.manifest.tables}
        history.check_files(
            file
            for name, chain in chains.items()
            for link in chain
            for file in link.tables[name].rows + link.tables[name].erased
        )
        self.tables = {name: _Rows(history, name, chain) for name, chain in chains.items()}


class _Rows:
    """One table: an index over contiguous rows."""

    def __init__(self, history: History, name: str, chain: list[Manifest]) -> None:
        self._name = name
        self._entry: TableEntry = chain[-1].tables[name]
        keys = history.check_rows(chain, name)
        self._index = Index(len(keys))
        self._index.find_or_insert(keys)  # slots are 0..n-1 in this order
        # Two rows more than keys: zeros for the padding key and, since an absent key's slot is -1, the default last.
        self._rows = np.zeros((len(keys) + 2, self._entry.dim), np.float32)
        self._drawn: Initializer | None = None
        default, key = self._entry.default, self._entry.padding_key
        if isinstance(default, dict):
            self._drawn = self._initializer(default, history.place.name)
        elif default is not None:
            self._rows[-1] = default
        self._padding = None if key is None else as_keys([key], self._entry.key_dtype, name)[0]
        for _, lines in history.replay(chain, name):
            if lines is not None:  # a key erased and not made again is not among the keys
                slots = self._index.find(lines.key)
                there = slots >= 0
                self._rows[slots[there]] = lines.row[there]

    def lookup(self, keys: npt.ArrayLike) -> Float32s:
        held = as_keys(keys, self._entry.key_dtype, self._name)
        slots = self._index.find(held)
        if self._padding is not None:
            slots[held == self._padding] = len(self._rows) - 2
        rows = np.take(self._rows, slots, axis=0)
        if self._drawn is not None:
            absent = np.flatnonzero(slots < 0)
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

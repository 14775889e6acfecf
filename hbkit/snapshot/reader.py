"""Loading, verifying and listing: everything that is needed is checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hbkit.errors import Corrupt, InvalidArgument, SchemaMismatch, UnknownColumn
from hbkit.snapshot import rows
from hbkit.snapshot.files import FileEntry
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest, TableEntry
from hbkit.snapshot.place import place_of
from hbkit.snapshot.table import TableLike, config, descend, forget


@dataclass(frozen=True)
class Commit:
    """One commit as `log` lists it.

    Attributes
    ----------
    id : str
    parent : str or None
        The commit that this one is a delta to; None where it holds all rows.
    step : int
    tables : dict of str to int
        Rows of each table.
    nbytes : int
        Size of the commit's own files.
    """

    id: str
    parent: str | None
    step: int
    tables: dict[str, int]
    nbytes: int


@dataclass(frozen=True)
class Loaded:
    """What `load` found beside the rows.

    Attributes
    ----------
    step : int
    state : dict of str to JSON value or bytes
        As it was given to `save`.
    commit : str
    notes : list of str
        What of the tables was not loaded, a line each: optimizer state of another optimizer, admission counts.
    """

    step: int
    state: dict[str, Any]
    commit: str
    notes: list[str] = field(default_factory=list)


def load(path: str | os.PathLike[str], tables: Sequence[TableLike], commit: str | None = None) -> Loaded:
    """Replace the rows of tables by those of a commit.

    Parameters
    ----------
    path : str or path
        Directory of a snapshot.
    tables : sequence of Table
        Any of the snapshot's, found by name; their rows, optimizer state, admission counts and step are replaced. Where
        the optimizer is another class than the one saved, or keeps other state, the rows get its initial state and
        `Loaded.notes` says so.
    commit : str, optional
        Its id; the newest when left out.

    Raises
    ------
    NotFound
        No snapshot, or no such commit.
    UnknownColumn
        A table is not in the snapshot.
    SchemaMismatch
        A table has another dim, key_dtype or admission rule than the one saved.
    Corrupt
        A file is missing, damaged or hostile; no table was touched.
    StorageError
        The disk cannot be read.
    """
    history = History(place_of(path))
    manifest = history.find(commit)
    if len({t.name for t in tables}) != len(tables):
        raise InvalidArgument("two tables have one name", remedy="name each table differently")
    notes: list[str] = []
    for table in tables:
        if table.pending is not None:
            table.pending.settle()
        notes += _compare(table, manifest, history.place.name)
    chains = {t.name: history.chain(manifest, t.name) for t in tables}
    history.check_files(_files(manifest, chains))
    for name, chain in chains.items():
        history.check_rows(chain, name)
    state = read_state(history, manifest)
    _load_admission(history, manifest, tables)
    for table in tables:
        _replace(table, history, chains[table.name])
    return Loaded(manifest.step, state, manifest.commit, notes)


def read_state(history: History, manifest: Manifest) -> dict[str, Any]:
    """The state of a commit, as it was given to `save`. Raises Corrupt."""
    history.check_files(manifest.state_files.values())
    state = dict(manifest.state)
    for name, file in manifest.state_files.items():
        state[name] = history.place.read(file.path, file.nbytes)
    return state


def _files(manifest: Manifest, chains: dict[str, list[Manifest]]) -> Iterable[FileEntry]:
    for name, chain in chains.items():
        for link in chain:
            yield from link.tables[name].rows + link.tables[name].erased
        yield from manifest.tables[name].admission_files


def _compare(table: TableLike, manifest: Manifest, path: str) -> list[str]:
    """Notes on a table that differs from the one saved; raises where it cannot take the rows."""
    if table.name not in manifest.tables:
        raise UnknownColumn(
            f"table {table.name!r} is not in commit {manifest.commit}",
            file=path,
            remedy=f"it has {', '.join(manifest.tables) or 'none'}",
        )
    entry = manifest.tables[table.name]
    for what in ("dim", "dtype", "key_dtype"):
        have, saved = getattr(table, what), getattr(entry, what)
        if have != saved:
            raise SchemaMismatch(
                f"{what} is {have}, saved was {saved}", file=path, table=table.name, remedy=f"give it {what}={saved!r}"
            )
    notes = []
    if not _keeps_state(table, entry):
        notes.append(
            f"table {table.name}: state of {entry.optimizer['name']} dropped, "
            f"{type(table.optimizer).__name__} begins with its initial state"
        )
    rule = type(table.admission).__name__ if table.admission is not None else None
    if rule is not None and entry.admission is not None and rule != entry.admission:
        raise SchemaMismatch(
            f"admission is by {rule}, saved was {entry.admission}",
            file=path,
            table=table.name,
            remedy="give it the admission rule that it was saved with",
        )
    if rule is None and entry.admission is not None:
        notes.append(f"table {table.name}: counts of {entry.admission} left out, the table admits all keys")
    if rule is not None and entry.admission is None:
        notes.append(f"table {table.name}: {rule} begins anew, none was saved")
    return notes


def _keeps_state(table: TableLike, entry: TableEntry) -> bool:
    same = type(table.optimizer).__name__ == entry.optimizer["name"]
    # Of named columns, the state belongs to the optimizer of each.
    same = same and config(table.optimizer).get("columns") == entry.optimizer.get("columns")
    return same and table.optimizer.n_state(table.dim) == entry.n_state


def _load_admission(history: History, manifest: Manifest, tables: Sequence[TableLike]) -> None:
    """Replace the filters' counts, of all tables or of none."""
    filters = [(t.admission, manifest.tables[t.name].admission_files) for t in tables if t.admission is not None]
    new = [(f, rows.read_columns(history.place, files[0])) for f, files in filters if files]
    old = [(f, {name: column.copy() for name, column in f.state().items()}) for f, _ in new]
    for (_, columns), (_, like) in zip(new, old, strict=True):
        if {n: c.dtype for n, c in columns.items()} != {n: c.dtype for n, c in like.items()}:
            raise Corrupt(
                f"admission counts with columns {sorted(columns)}",
                file=history.place.where(f"{manifest.commit}.json"),
                remedy="load another commit",
            )
    try:
        for admission, columns in new:
            admission.load_state(columns)
    except BaseException:
        for admission, columns in old:
            admission.load_state(columns)
        raise


def _replace(table: TableLike, history: History, chain: list[Manifest]) -> None:
    entry = chain[-1].tables[table.name]
    keeps = _keeps_state(table, entry)
    initial = np.asarray(table.optimizer.initial_state(table.dim), np.float32)
    forget(table)
    for chunk in table.store.scan():
        table.store.erase(chunk.key)
    for link in chain:
        for erased, lines in history.replay([link], table.name):
            if lines is None:
                table.store.erase(erased)
            elif keeps:
                table.store.put(lines)
            else:
                table.store.put(lines._replace(state=np.tile(initial, (len(lines.key), 1))))
        if keeps:
            descend(table, history.digest(link))
    table.step = entry.step


def verify(path: str | os.PathLike[str]) -> list[Commit]:
    """Every commit of a snapshot, all its bytes checked: manifests, checksums, schemas, key order, counts, chains.

    Raises
    ------
    NotFound
        There is no snapshot.
    Corrupt
        The first thing found wrong.
    StorageError
        The disk cannot be read.
    """
    history, manifests = _all(path)
    for manifest in manifests:
        history.check_files(manifest.files)
    # The last link of each chain passes through the others.
    passed = {(m.parent, name) for m in manifests for name, t in m.tables.items() if t.since is not None}
    for manifest in manifests:
        for name, table in manifest.tables.items():
            if (manifest.commit, name) not in passed:
                history.check_rows(history.chain(manifest, name), name)
            for file in table.admission_files:
                rows.read_columns(history.place, file)
    return [_commit(m) for m in manifests]


def log(path: str | os.PathLike[str]) -> list[Commit]:
    """All commits of a snapshot, oldest first. Raises NotFound where there is none, Corrupt for a bad manifest."""
    return [_commit(m) for m in _all(path)[1]]


def _all(path: str | os.PathLike[str]) -> tuple[History, list[Manifest]]:
    history = History(place_of(path))
    history.find(None)
    return history, [history.manifest(commit) for commit in history.commits()]


def _commit(m: Manifest) -> Commit:
    tables = {name: table.n_rows for name, table in m.tables.items()}
    return Commit(m.commit, m.parent, m.step, tables, sum(f.nbytes for f in m.files))

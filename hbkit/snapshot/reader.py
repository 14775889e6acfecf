"""Loading, verifying and listing: everything that is needed is checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hbkit.errors import Corrupt, InvalidArgument, SchemaMismatch, StorageError, UnknownColumn
from hbkit.snapshot import rows
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest, TableEntry
from hbkit.snapshot.places import place_of
from hbkit.snapshot.table import EVERYTHING, TableLike, config, descend, forget, held, saved
from hbkit.store.line import Chunk, Part

N_SHARDS = 1024  # of keys, by the leading bits of their mix


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


def load(
    path: str | os.PathLike[str],
    tables: Sequence[TableLike] | Mapping[str, TableLike],
    commit: str | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Loaded:
    """Replace the rows of tables by those of a commit.

    Parameters
    ----------
    path : str or path
        Directory or URI of a snapshot.
    tables : sequence of Table, or mapping of str to Table
        Any of the snapshot's, found by name, or by the name that a mapping gives: that of the table when it was saved.
        Their rows, optimizer state, admission counts and step are replaced. Where the optimizer is another class than
        the one saved, or keeps other state, the rows get its initial state and `Loaded.notes` says so.
    commit : str, optional
        Its id; the newest when left out.
    shard : (i, n)
        Load the rows, and the counts, of those keys alone that rank i of n owns, 0 <= i < n, whoever saved them. The n
        shards share no key and together are the whole.

    Raises
    ------
    NotFound
        No snapshot, or no such commit.
    UnknownColumn
        A table is not in the snapshot.
    SchemaMismatch
        A table has another dim, key_dtype or admission rule than the one saved.
    Corrupt
        A file is missing, damaged or hostile; the tables are as they were.
    StorageError
        The disk cannot be read; the tables are as they were, or the error says which one is empty now.

    Notes
    -----
    A table without rows is filled while its files are read and checked, once, and is emptied again if anything is
    wrong. The files of one that has rows are read twice: its rows go when everything was found right, since there may
    be no memory for both. If the second reading fails all the same, or memory is short, the table is empty, and the
    error names it. Nobody else may use the tables meanwhile.
    """
    history = History(place_of(path))
    manifest = history.find(commit)
    named = named_tables(tables)
    if not 0 <= shard[0] < shard[1]:
        raise InvalidArgument(f"shard {shard}", remedy="give (i, n) with 0 <= i < n")
    notes: list[str] = []
    for name, table in named.items():
        if table.pending is not None:
            table.pending.settle()
        notes += _compare(name, table, manifest, history.place.name)
    chains = {name: history.chain(manifest, name) for name in named}
    history.check_files(f for name in named for f in manifest.tables[name].admission_files)
    state = read_state(history, manifest)
    held = [name for name, table in named.items() if len(table.store)]
    for name in held:
        history.check_rows(chains[name], name)
    counts = _admission(history, manifest, named, shard)
    changed: list[str] = []

    def replace(names: Iterable[str]) -> None:
        for name in names:
            changed.append(name)
            _replace(name, named[name], history, chains[name], shard)

    try:
        replace(name for name in named if name not in held)
        with _admitting(counts):
            replace(held)
    except BaseException as e:
        for name in changed:
            _clear(named[name])
        lost = [named[name].name for name in changed if name in held]
        if lost and isinstance(e, Exception):
            raise StorageError(
                f"the old rows are gone, and the new ones could not be read or held: {e or type(e).__name__}",
                file=history.place.name,
                table=", ".join(lost),
                remedy="load again, or another commit; until then the table is empty",
            ) from e
        raise
    for name, table in named.items():
        table.step = manifest.tables[name].step
    return Loaded(manifest.step, state, manifest.commit, notes)


def named_tables(tables: Sequence[TableLike] | Mapping[str, TableLike]) -> dict[str, TableLike]:
    """Tables by the names that they were saved by. Raises InvalidArgument."""
    named = dict(tables) if isinstance(tables, Mapping) else {t.name: t for t in tables}
    if len({id(t) for t in named.values()}) != len(tables):
        raise InvalidArgument("two tables have one name", remedy="name each table differently, and once")
    return named


def read_state(history: History, manifest: Manifest) -> dict[str, Any]:
    """The state of a commit, as it was given to `save`. Raises Corrupt."""
    history.check_files(manifest.state_files.values())
    state = dict(manifest.state)
    for name, file in manifest.state_files.items():
        state[name] = history.place.read(file.path, file.nbytes)
    return state


def _compare(name: str, table: TableLike, manifest: Manifest, path: str) -> list[str]:
    """Notes on a table that differs from the one saved; raises where it cannot take the rows."""
    if name not in manifest.tables:
        raise UnknownColumn(
            f"table {name!r} is not in commit {manifest.commit}",
            file=path,
            remedy=f"it has {', '.join(manifest.tables) or 'none'}",
        )
    entry = manifest.tables[name]
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


def _admission(
    history: History, manifest: Manifest, tables: dict[str, TableLike], shard: tuple[int, int]
) -> list[tuple[Any, rows.Columns, rows.Columns]]:
    """Filters, and their counts as they were and as they are to be. Raises Corrupt."""
    filters = [(t, manifest.tables[n].admission_files) for n, t in tables.items() if t.admission is not None]
    read = [(t, [rows.read_columns(history.place, file) for file in files]) for t, files in filters if files]
    old = [{name: column.copy() for name, column in t.admission.state().items()} for t, _ in read]
    for (_, parts), like in zip(read, old, strict=True):
        for columns in parts:
            if {n: c.dtype for n, c in columns.items()} != {n: c.dtype for n, c in like.items()}:
                raise Corrupt(
                    f"admission counts with columns {sorted(columns)}",
                    file=history.place.where(f"{manifest.commit}.json"),
                    remedy="load another commit",
                )
    return [
        (t.admission, like, _counts(parts, like, saved(t, *shard))) for (t, parts), like in zip(read, old, strict=True)
    ]


@contextmanager
def _admitting(counts: list[tuple[Any, rows.Columns, rows.Columns]]) -> Iterator[None]:
    """Replace the filters' counts, of all tables or, if what is done within fails, of none."""
    try:
        for admission, _, new in counts:
            admission.load_state(new)
        yield
    except BaseException:
        for admission, old, _ in counts:
            admission.load_state(old)
        raise


def _counts(files: list[rows.Columns], like: rows.Columns, part: Part) -> rows.Columns:
    """The counts of a part of all keys, from those of all ranks."""
    if "key" in like:
        whole = {name: np.concatenate([file[name] for file in files]) for name in like}
        own = part.has(whole["key"])
        return {name: column[own] for name, column in whole.items()}
    if any(len(file[name]) != len(like[name]) for file in files for name in like):
        return files[0]  # `load_state` says what is wrong with it
    # Counters, as many for each virtual shard. Each is raised by the rank that owns the shard, and never lowered.
    first, last = (-(-bound * N_SHARDS >> 64) for bound in part)
    counts = {name: np.maximum.reduce([file[name] for file in files]) for name in like}
    for column in counts.values():
        in_shards = column.reshape(N_SHARDS, -1)
        in_shards[:first] = in_shards[last:] = 0
    return counts


def _replace(name: str, table: TableLike, history: History, chain: list[Manifest], shard: tuple[int, int]) -> None:
    entry = chain[-1].tables[name]
    keeps = _keeps_state(table, entry)
    initial = np.asarray(table.optimizer.initial_state(table.dim), np.float32)
    _clear(table)
    descends = keeps and name == table.name  # by another name, a delta would be none to this commit
    for link, steps in history.links(chain, name):
        for erased, lines in steps:
            if lines is None:
                table.store.erase(erased)
                continue
            if shard != (0, 1):
                own = held(table, *shard, lines.key)
                lines = Chunk._make(column[own] for column in lines)
            table.store.put(lines if keeps else lines._replace(state=np.tile(initial, (len(lines.key), 1))))
        if descends:
            for digest in history.same(link):
                descend(table, digest, saved(table, *shard))


def _clear(table: TableLike) -> None:
    """Without rows."""
    forget(table)
    for chunk in table.store.part(EVERYTHING, rows=False):
        table.store.erase(chunk.key)


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
        others = (f for t in manifest.tables.values() for f in t.admission_files)
        history.check_files([*manifest.state_files.values(), *others])
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

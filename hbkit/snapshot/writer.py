"""Saving: all files of a commit are written, then its manifest, which makes them one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, overload

import numpy as np

from hbkit._ext.slabs import ROW_DTYPES
from hbkit.errors import InvalidArgument, Unsupported
from hbkit.snapshot import rows
from hbkit.snapshot.files import FileEntry
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import (
    MAX_WIDTH,
    VERSION,
    Manifest,
    TableEntry,
    encode,
    file_name,
    state_path,
    table_directory,
)
from hbkit.snapshot.place import Draft, place_of
from hbkit.snapshot.saving import Saving
from hbkit.snapshot.table import TableLike, config, default_config, descends
from hbkit.store.keys import KEY_DTYPES
from hbkit.store.point import Point

log = logging.getLogger("hbkit.snapshot")


@overload
def save(
    path: str | os.PathLike[str],
    tables: Sequence[TableLike],
    step: int,
    base: str | None = None,
    state: Mapping[str, Any] | None = None,
    background: Literal[False] = False,
) -> str: ...


@overload
def save(
    path: str | os.PathLike[str],
    tables: Sequence[TableLike],
    step: int,
    base: str | None = None,
    state: Mapping[str, Any] | None = None,
    *,
    background: Literal[True],
) -> Saving: ...


def save(
    path: str | os.PathLike[str],
    tables: Sequence[TableLike],
    step: int,
    base: str | None = None,
    state: Mapping[str, Any] | None = None,
    background: bool = False,
) -> str | Saving:
    """Commit tables, step and state as one, durable and complete when this returns.

    Parameters
    ----------
    path : str or path
        A local directory; made where it is absent.
    tables : sequence of Table
        Of distinct names. Rows, optimizer state, frequencies, admission counts and the tables' own steps are kept.
    step : int
        Of the training, at least 0; given back by `load`.
    base : str, optional
        A commit, or "latest": write only rows changed or erased since. A table that was neither saved as that commit
        nor loaded from it or from one that builds on it is written in full all the same, and so is one of whose changes
        since too many are erased or put rows (see `hbkit.store.changes.Changes`), or that has no metadata: the log
        ("hbkit.snapshot") and `Saving.notes` say so. None writes all rows.
    state : mapping of str to JSON value or bytes, optional
        Dataset cursor, dense weights, random states. JSON values (no tuples, no NaN) stand in the manifest; bytes
        become files of their own.
    background : bool
        Return once it is settled what is saved: everything as it is now. A thread writes it while training goes on.

    Returns
    -------
    str
        The commit's id; a `Saving` with `background`.

    Raises
    ------
    InvalidArgument
        Two tables of one name, a state that JSON would change, a negative step.
    NotFound
        There is no commit `base`.
    Locked
        Another writer is saving here.
    StorageError
        The disk is full or fails; earlier commits are as they were.
    Unsupported
        `path` is a URI.

    Notes
    -----
    Equal rows give equal Parquet bytes, whatever tier holds them. Each table is saved as of one instant of this call, so
    others may train it meanwhile; for several tables to be of one step, none may be trained until this returns.

    In the background: rows that change before they are written are set aside, at most 64 MiB of them in memory, then in
    a temporary file in the snapshot's directory; 20 bytes for each and 8 for each row to be written come on top. A
    second save of a table, `load` and `Table.close` wait. A table of 10 million rows in host memory pauses for a pass
    over 4 of 8 bytes a row at the most, and for a copy of the admission counts.
    """
    place = place_of(path)
    _check(tables, step)
    values, blobs = _split_state(state or {})
    for table in tables:
        if table.pending is not None:
            table.pending.settle()
    with ExitStack() as stack:
        draft = stack.enter_context(place.draft())
        history = History(place)
        parent = history.find(base) if base is not None else None
        taken: dict[str, tuple[TableEntry, Point]] = {}
        notes = []
        for table in sorted(tables, key=id):  # points are waited for: all in one order
            entry, point, note = _take(draft, table, history, parent)
            stack.callback(point.close)
            taken[table.name] = entry, point
            notes += [note] if note is not None else []
        for note in notes:
            log.warning("%s", note)

        saving = Saving(notes) if background else None

        def write() -> str:
            with held:
                manifest = Manifest(
                    version=VERSION,
                    commit=draft.commit,
                    parent=parent.commit if parent else None,
                    step=int(step),
                    tables={t.name: _write_table(draft, t.name, *taken[t.name], saving) for t in tables},
                    state=values,
                    state_files={n: _write_bytes(draft, state_path(draft.directory, n), b) for n, b in blobs.items()},
                    directory=draft.directory,
                )
                data, digest = encode(manifest)
                draft.publish(data)
                for table in tables:
                    table.store.changes.name(taken[table.name][1].mark, digest)
            return draft.commit

        held = stack.pop_all()
    if saving is None:
        return write()
    for table in tables:
        table.pending = saving
    saving.begin(write)
    return saving


def _check(tables: Sequence[TableLike], step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 2**63:
        raise InvalidArgument(f"step {step!r}", remedy="give a count of steps")
    names = [t.name for t in tables]
    if len(set(names)) != len(names):
        raise InvalidArgument("two tables have one name", remedy="name each table differently")
    for t in tables:
        file_name(t.name)
        if t.dtype not in ROW_DTYPES or t.key_dtype not in KEY_DTYPES:
            raise Unsupported(
                f"rows of {t.dtype} by keys of {t.key_dtype}", table=t.name, remedy="use dtype='float32' and int64 keys"
            )
        if t.dim > MAX_WIDTH:
            raise Unsupported(f"rows of {t.dim} floats", table=t.name, remedy=f"use a dim of at most {MAX_WIDTH}")


def _split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """JSON values and bytes of the state; raises InvalidArgument for what would not come back as it went in."""
    values: dict[str, Any] = {}
    blobs: dict[str, bytes] = {}
    for name, value in state.items():
        file_name(name)
        if isinstance(value, bytes | bytearray | memoryview):
            blobs[name] = bytes(value)
            continue
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise InvalidArgument(
                f"state {name!r} does not survive JSON",
                remedy="give bytes, or str, int, finite float, bool, None, lists and dicts with str keys",
            )
        values[name] = value
    return values, blobs


def _take(
    draft: Draft, table: TableLike, history: History, parent: Manifest | None
) -> tuple[TableEntry, Point, str | None]:
    """A point of a table, what the manifest is to say of it, and why it holds all rows although a parent was named."""
    base, name = parent.tables.get(table.name) if parent is not None else None, table.name
    digest = why = None
    if parent is not None:
        mine = config(table.optimizer)
        if base is None:
            why = f"it is not in commit {parent.commit}"
        elif any(mine.get(k) != base.optimizer.get(k) for k in ("name", "columns")):
            why = "its optimizer is another"
        elif not descends(table, history.digest(parent)):
            why = (
                f"it does not descend from commit {parent.commit}, or too much has changed since, or it has no metadata"
            )
        else:
            digest = history.digest(parent)
    admission = table.admission

    def keep() -> tuple[int, dict[str, Any]]:
        counts = {} if admission is None else {k: np.array(column) for k, column in admission.state().items()}
        return int(table.step), counts

    point = table.store.point(digest, keep, draft.spill)
    entry = TableEntry(
        dim=table.dim,
        n_state=table.optimizer.n_state(table.dim),
        dtype=table.dtype,
        key_dtype=table.key_dtype,
        optimizer=config(table.optimizer),
        initializer=config(table.initializer),
        step=point.kept[0],
        since=base.step if base is not None and point.changed else None,
        n_rows=point.n_rows,
        rows=[],
        erased=[],
        admission=None if admission is None else type(admission).__name__,
        admission_files=[],
        default=default_config(table.default),
        padding_key=None if table.padding_key is None else int(table.padding_key),
    )
    return entry, point, None if why is None else f"table {name} is written in full: {why}"


def _write_table(draft: Draft, name: str, entry: TableEntry, point: Point, saving: Saving | None) -> TableEntry:
    """Write the files of a table; its entry with them."""
    directory, key_dtype = table_directory(draft.directory, name), entry.key_dtype
    path = f"{directory}/rows-00000.parquet"
    chunks = point.scan() if saving is None else saving.paced(point.scan())
    file = rows.write_rows(draft, path, chunks, name, key_dtype, entry.dim, entry.n_state)
    erased, admission = [], []
    if len(point.erased):
        path = f"{directory}/erased-00000.parquet"
        erased.append(rows.write_keys(draft, path, point.erased, name, key_dtype))
    if entry.admission is not None:
        path = f"{directory}/admission-00000.parquet"
        admission.append(rows.write_columns(draft, path, point.kept[1]))
    return dataclasses.replace(entry, rows=[file], erased=erased, admission_files=admission)


def _write_bytes(draft: Draft, path: str, data: bytes) -> FileEntry:
    with draft.create(path) as sink:
        sink.write(data)
    return sink.entry(path)

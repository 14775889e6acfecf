"""Saving: all files of a commit are written, then its manifest, which makes them one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
from hbkit.snapshot.table import TableLike, config, default_config, descend, descends
from hbkit.store.base import Chunk
from hbkit.store.keys import KEY_DTYPES


def save(
    path: str | os.PathLike[str],
    tables: Sequence[TableLike],
    step: int,
    base: str | None = None,
    state: Mapping[str, Any] | None = None,
) -> str:
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
        nor loaded from it or from one that builds on it is written in full all the same. None writes all rows.
    state : mapping of str to JSON value or bytes, optional
        Dataset cursor, dense weights, random states. JSON values (no tuples, no NaN) stand in the manifest; bytes
        become files of their own.

    Returns
    -------
    str
        The commit's id.

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
    The tables must rest while they are saved. Equal rows give equal Parquet bytes, whatever tier holds them.
    """
    place = place_of(path)
    _check(tables, step)
    values, blobs = _split_state(state or {})
    with place.draft() as draft:
        history = History(place)
        parent = history.find(base) if base is not None else None
        manifest = Manifest(
            version=VERSION,
            commit=draft.commit,
            parent=parent.commit if parent else None,
            step=int(step),
            tables={t.name: _write_table(draft, t, history, parent) for t in tables},
            state=values,
            state_files={name: _write_bytes(draft, state_path(draft.directory, name), b) for name, b in blobs.items()},
            directory=draft.directory,
        )
        data, digest = encode(manifest)
        draft.publish(data)
    for table in tables:
        descend(table, digest)
    return draft.commit


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


def _write_table(draft: Draft, table: TableLike, history: History, parent: Manifest | None) -> TableEntry:
    directory, name = table_directory(draft.directory, table.name), table.name
    n_state = table.optimizer.n_state(table.dim)
    step = int(table.step)
    base = parent.tables.get(name) if parent is not None else None
    if parent is None or base is None or not _is_delta(table, base, history.digest(parent)):
        base = None

    held = rows.NO_METADATA if base is None or parent is None else history.metadata(history.chain(parent, name), name)
    since, keys = -1 if base is None else base.step, [held.key[:0]]

    def changed() -> Iterator[Chunk]:
        # A row's stamp alone does not tell where the steps of a table began anew; its frequency does then.
        for chunk in table.store.scan():
            keys.append(chunk.key)
            rests = held.has(chunk) & (chunk.last_step <= since)
            yield chunk if not rests.any() else Chunk._make(column[~rests] for column in chunk)

    path = f"{directory}/rows-00000.parquet"
    file = rows.write_rows(draft, path, changed(), name, table.key_dtype, table.dim, n_state)
    erased, n_rows = [], sum(map(len, keys))
    gone = held.without(np.concatenate(keys)).key
    if len(gone):
        path = f"{directory}/erased-00000.parquet"
        erased.append(rows.write_keys(draft, path, gone, name, table.key_dtype))
    admission = []
    if table.admission is not None:
        path = f"{directory}/admission-00000.parquet"
        admission.append(rows.write_columns(draft, path, table.admission.state()))
    return TableEntry(
        dim=table.dim,
        n_state=n_state,
        dtype=table.dtype,
        key_dtype=table.key_dtype,
        optimizer=config(table.optimizer),
        initializer=config(table.initializer),
        step=step,
        since=None if base is None else base.step,
        n_rows=n_rows,
        rows=[file],
        erased=erased,
        admission=None if table.admission is None else type(table.admission).__name__,
        admission_files=admission,
        default=default_config(table.default),
        padding_key=None if table.padding_key is None else int(table.padding_key),
    )


def _is_delta(table: TableLike, base: TableEntry, digest: str) -> bool:
    """Whether the rows stamped after `base` are all that changed since."""
    mine = config(table.optimizer)
    same_rule = all(mine.get(k) == base.optimizer.get(k) for k in ("name", "columns"))
    return descends(table, digest) and table.step >= base.step and same_rule


def _write_bytes(draft: Draft, path: str, data: bytes) -> FileEntry:
    with draft.create(path) as sink:
        sink.write(data)
    return sink.entry(path)

"""Saving: all files of a commit are written, then its manifest, which makes them one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
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
from hbkit.snapshot.place import Draft, Place
from hbkit.snapshot.places import place_of
from hbkit.snapshot.ranks import Group, Ranks
from hbkit.snapshot.saving import Saving
from hbkit.snapshot.table import EVERYTHING, TableLike, config, default_config, held, mark, saved
from hbkit.store.keys import KEY_DTYPES
from hbkit.store.line import Chunk, Part
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
    group: Group | None = None,
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
    group: Group | None = None,
) -> Saving: ...


def save(
    path: str | os.PathLike[str],
    tables: Sequence[TableLike],
    step: int,
    base: str | None = None,
    state: Mapping[str, Any] | None = None,
    background: bool = False,
    group: Group | None = None,
) -> str | Saving:
    """Commit tables, step and state as one, durable and complete when this returns.

    Parameters
    ----------
    path : str or path
        A local directory, made where it is absent; or a URI (see `hbkit.snapshot.bucket.Bucket`).
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
    group : Group, optional
        Ranks that save one commit together, from tables that hold the keys that each owns (`load` with
        ``shard=(rank, size)``). All call this with the same arguments; a name of the state that several give is
        kept as the lowest of them gives it. All return the same, or raise what one of them raised. In the background,
        another thread uses the group. Ranks of a local directory share its file system.

    Returns
    -------
    str
        The commit's id; a `Saving` with `background`.

    Raises
    ------
    InvalidArgument
        Two tables of one name, a state that JSON would change, a negative step, ranks that disagree or hold keys of
        another.
    NotFound
        There is no commit `base`.
    Locked
        Another writer is saving here, or has committed meanwhile: nothing was committed, save again.
    StorageError
        The disk is full or fails, or the service does; earlier commits are as they were.
    Unsupported
        `path` is a URI whose service needs obstore, which is not there.

    Notes
    -----
    Equal rows give equal Parquet bytes, whatever tier holds them. Each table is saved as of one instant of this call,
    so others may train it meanwhile; for several tables to be of one step, none may be trained until this returns.

    In the background: rows that change before they are written are set aside, at most 64 MiB of them in memory, then in
    a temporary file in the snapshot's directory; 20 bytes for each and 8 for each row to be written come on top. A
    second save of a table, `load` and `Table.close` wait. Until somebody waits, the thread rests three times as long as
    it works. A table pauses for a copy of its admission counts; in host memory and with `base`, also for a pass over
    the stamps, 8 bytes a row; in other tiers, for a look at each key erased or put since.
    """
    with ExitStack() as stack:
        job = _Save(place_of(path), tables, step, Ranks(group), stack)
        job.begin(base, state or {})
        job.take_points()
        for note in job.notes:
            log.warning("%s", note)
        held = stack.pop_all()

    def write() -> str:
        with held:
            return job.write()

    if not background:
        return write()
    saving = job.saving = Saving(job.notes)
    for table in tables:
        table.pending = saving
    saving.begin(write)
    return saving


class _Save:
    """One rank's part in a save. What the stack holds in the end is the draft and the points, which `write` needs."""

    def __init__(
        self, place: Place, tables: Sequence[TableLike], step: int, ranks: Ranks, stack: ExitStack[bool | None]
    ) -> None:
        self._place, self._tables, self._step, self._ranks, self._stack = place, tables, step, ranks, stack
        self._history = History(place)
        self._draft: Draft | None = None
        self._values: dict[str, Any] = {}
        self._blobs: dict[str, bytes] = {}
        self._taken: dict[str, tuple[TableEntry, Point]] = {}
        self.notes: list[str] = []
        self.saving: Saving | None = None

    def begin(self, base: str | None, state: Mapping[str, Any]) -> None:
        """Check the arguments, and make the draft."""

        def act() -> list[str | None]:
            _check(self._tables, self._step)
            self._values, self._blobs = _split_state(state)
            for table in self._tables:
                if table.pending is not None:
                    table.pending.settle()
            if self._ranks.rank:
                return []
            self._draft = self._stack.enter_context(self._place.draft())
            parent = self._history.find(base) if base is not None else None
            return [self._draft.commit, self._draft.directory, parent.commit if parent is not None else None]

        self._commit, self._directory, self._parent = self._ranks.gather(act)[0]

    def take_points(self) -> None:
        """Settle what is saved, and agree about it."""
        told = self._ranks.gather(lambda: self._take([t.name for t in self._tables], self._parent))
        entries = [entry for t in told for entry in t["tables"].items()]
        # What is a delta in some ranks and not in all is written in full.
        mixed = {n for n, e in entries if e["since"] is None} & {n for n, e in entries if e["since"] is not None}
        if mixed:
            deltas = [n for n in mixed if n in self._taken and self._taken[n][0].since is not None]
            for name in deltas:
                self._taken[name][1].close()
                self.notes.append(f"table {name} is written in full: not all ranks know what changed")
            told = self._ranks.gather(lambda: self._take(deltas, None))
        if any(t["tables"] != told[0]["tables"] for t in told):
            raise InvalidArgument(
                "ranks save different tables", remedy="give all of them tables of the same kinds at the same step"
            )
        for name in {n for t in told[: self._ranks.rank] for n in t["state"]}:
            self._values.pop(name, None)
            self._blobs.pop(name, None)

    def _take(self, names: Collection[str], onto: str | None) -> dict[str, Any]:
        if self._draft is None:
            self._draft = self._stack.enter_context(self._place.join(self._commit, self._directory))
        parent = self._history.manifest(onto) if onto is not None else None
        for table in sorted(self._tables, key=id):  # points are waited for: all in one order
            if table.name in names:
                entry, point, note = _take(self._draft, table, self._history, parent, self._part(table))
                self._stack.callback(point.close)
                self._taken[table.name] = entry, point
                self.notes.extend(filter(None, [note]))
        tables = {name: _told(entry) for name, (entry, _) in self._taken.items()}
        return {"tables": tables, "state": [*self._values, *self._blobs]}

    def write(self) -> str:
        """Write and publish it; the commit's id."""
        parts = self._ranks.gather(self._files)
        digest = self._ranks.gather(lambda: self._publish(parts))[0]
        for table in self._tables:
            table.store.changes.name(self._taken[table.name][1].mark, mark(digest, self._part(table)))
        return str(self._commit)

    def _part(self, table: TableLike) -> Part:
        return saved(table, self._ranks.rank, self._ranks.size)

    def _files(self) -> dict[str, Any]:
        draft, blobs = self._draft, self._blobs
        assert draft is not None
        entries = [_write_table(draft, t, *self._taken[t.name], self.saving, self._ranks) for t in self._tables]
        return {
            "tables": {t.name: asdict(entry) for t, entry in zip(self._tables, entries, strict=True)},
            "state": self._values,
            "state_files": {
                name: asdict(_write_bytes(draft, state_path(draft.directory, name), data))
                for name, data in blobs.items()
            },
        }

    def _publish(self, parts: list[Any]) -> str | None:
        if self._ranks.rank:
            return None
        assert self._draft is not None
        manifest = Manifest(
            version=VERSION,
            commit=self._draft.commit,
            parent=self._parent,
            step=int(self._step),
            tables={t.name: _merged([part["tables"][t.name] for part in parts]) for t in self._tables},
            state={name: value for part in parts for name, value in part["state"].items()},
            state_files={name: FileEntry(**file) for part in parts for name, file in part["state_files"].items()},
            directory=self._draft.directory,
        )
        data, digest = encode(manifest)
        self._draft.publish(data)
        return digest


def _told(entry: TableEntry) -> dict[str, Any]:
    """What all ranks must have the same of, to save one table."""
    return {name: value for name, value in asdict(entry).items() if name != "n_rows"}


def _merged(parts: list[dict[str, Any]]) -> TableEntry:
    """The entry of a table of which each rank has written a part."""
    files = {
        name: [FileEntry(**file) for part in parts for file in part[name]]
        for name in ("rows", "erased", "admission_files")
    }
    return TableEntry(**{**parts[0], **files, "n_rows": sum(part["n_rows"] for part in parts)})


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
            values[name] = json.loads(json.dumps(value, allow_nan=False))  # a copy: the caller's may change meanwhile
            same = values[name] == value
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise InvalidArgument(
                f"state {name!r} does not survive JSON",
                remedy="give bytes, or str, int, finite float, bool, None, lists and dicts with str keys",
            )
    return values, blobs


def _take(
    draft: Draft, table: TableLike, history: History, parent: Manifest | None, part: Part
) -> tuple[TableEntry, Point, str | None]:
    """A point of a table, what the manifest is to say of it, and why it holds all rows although a parent was named."""
    base, name = parent.tables.get(table.name) if parent is not None else None, table.name
    known = why = None
    if parent is not None:
        mine, marks = config(table.optimizer), [mark(digest, part) for digest in history.same(parent)]
        if base is None:
            why = f"it is not in commit {parent.commit}"
        elif any(mine.get(k) != base.optimizer.get(k) for k in ("name", "columns")):
            why = "its optimizer is another"
        elif (known := next(filter(table.store.changes.knows, marks), None)) is None:
            why = (
                f"it does not descend from commit {parent.commit}, or too much has changed since, or it has no metadata"
            )
    admission = table.admission

    def keep() -> tuple[int, dict[str, Any]]:
        counts = {} if admission is None else {k: np.array(column) for k, column in admission.state().items()}
        return int(table.step), counts

    point = table.store.point(known, keep, draft.spill)
    entry = TableEntry(
        dim=table.dim,
        n_state=table.optimizer.n_state(table.dim),
        dtype=table.dtype,
        key_dtype=table.key_dtype,
        optimizer=config(table.optimizer),
        initializer=config(table.initializer),
        step=point.kept[0],
        since=base.step if base is not None and point.changed else None,
        n_rows=point.n_rows - _n_copies(table, part),
        rows=[],
        erased=[],
        admission=None if admission is None else type(admission).__name__,
        admission_files=[],
        default=default_config(table.default),
        padding_key=None if table.padding_key is None else int(table.padding_key),
    )
    return entry, point, None if why is None else f"table {name} is written in full: {why}"


def _n_copies(table: TableLike, part: Part) -> int:
    """Rows that are there, but another rank's to write."""
    where = getattr(table, "placement", None)
    if isinstance(where, str):
        return 0 if part == EVERYTHING else len(table.store)
    if not isinstance(where, np.ndarray):
        return 0
    keys = np.unique(where)
    return int(np.count_nonzero(table.store.has(keys[~part.has(keys)])))


def _write_table(
    draft: Draft, table: TableLike, entry: TableEntry, point: Point, saving: Saving | None, ranks: Ranks
) -> TableEntry:
    """Write the files of a rank's part of a table; its entry with them."""
    name, part = table.name, saved(table, ranks.rank, ranks.size)
    directory, key_dtype = table_directory(draft.directory, name), entry.key_dtype
    path = f"{directory}/rows-{ranks.rank:05d}.parquet"
    chunks = point.scan() if saving is None else saving.paced(point.scan())
    if ranks.size > 1:
        chunks = _own(chunks, table, part, ranks)
    file = rows.write_rows(draft, path, chunks, name, key_dtype, entry.dim, entry.n_state)
    erased, admission = [], []
    if len(gone := point.erased[part.has(point.erased)]):
        path = f"{directory}/erased-{ranks.rank:05d}.parquet"
        erased.append(rows.write_keys(draft, path, gone, name, key_dtype))
    if entry.admission is not None:
        path = f"{directory}/admission-{ranks.rank:05d}.parquet"
        admission.append(rows.write_columns(draft, path, point.kept[1]))
    return dataclasses.replace(entry, rows=[file], erased=erased, admission_files=admission)


def _own(chunks: Iterable[Chunk], table: TableLike, part: Part, ranks: Ranks) -> Iterator[Chunk]:
    """What is the rank's to write; all of it but copies of replicated rows."""
    for chunk in chunks:
        own = part.has(chunk.key)
        lost = ~held(table, ranks.rank, ranks.size, chunk.key)
        if lost.any():
            raise InvalidArgument(
                f"rank {ranks.rank} of {ranks.size} holds key {chunk.key[lost][0]}, which another owns",
                table=table.name,
                remedy="give each rank the rows of its own keys, as load(shard=(rank, size)) does; "
                "where all ranks hold all rows, let one of them save",
            )
        yield chunk if own.all() else Chunk._make(column[own] for column in chunk)


def _write_bytes(draft: Draft, path: str, data: bytes) -> FileEntry:
    with draft.create(path) as sink:
        sink.write(data)
    return sink.entry(path)

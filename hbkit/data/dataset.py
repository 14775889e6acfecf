"""Datasets: Parquet or ORC files to batches, by an order that neither threads nor shards can change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hbkit import errors, ragged
from hbkit.data.ahead import prefetch
from hbkit.data.batch import Batch, Inputs, dense_inputs, join, pad
from hbkit.data.deduplicated import Deduplicated, declared, layout
from hbkit.data.files import DataFile
from hbkit.data.filter import RowFilter
from hbkit.data.hive import partitioned
from hbkit.data.orc import OrcFile
from hbkit.data.stream import Epoch, Shuffle, Stats, Unit
from hbkit.parquet import ColumnType, Field, File, list_files
from hbkit.parquet.source import SUFFIXES
from hbkit.ragged import Column, Ragged, Strings

if TYPE_CHECKING:
    import pyarrow.compute as pc

__all__ = ["Dataset"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class _Plan:
    """All that says which batches a dataset gives."""

    units: tuple[Unit, ...]
    fields: tuple[Field, ...]  # with dtype and rank settled over all files
    schema: Mapping[str, ColumnType]
    unsupported: Mapping[str, str]
    shard: tuple[int, int]
    n_reads: int
    n_decodes: int
    skip_bad: bool
    decoded_by: Mapping[str, str]
    filter: RowFilter | None = None
    shuffle: Shuffle | None = None
    batch_size: int | None = None
    remainder: Literal["keep", "drop", "pad"] = "keep"
    prefetch: int = 0
    n_passes: int | None = 1
    epoch: int = 0
    reshuffle: bool | None = None  # whether each iteration is the next epoch; False: all epochs have one order
    ops: tuple[Callable[[dict[str, Column]], Mapping[str, Column]], ...] = ()
    label: str | tuple[str, ...] | None = None
    weight: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return self.label if isinstance(self.label, tuple) else () if self.label is None else (self.label,)


class Dataset:
    """Rows of Parquet or ORC files as batches of columns.

    Make one with ``from_parquet`` or ``from_orc``, say what to do with chained calls (each gives a new dataset), and
    iterate. Every iteration is one epoch (or as many as ``repeat`` says), in an order that depends on the files, the
    filter, the seed, the epoch and the batch size alone: batch ``b`` of the global order goes to shard ``b % m`` of
    ``(i, m)``.

    Notes
    -----
    Calls may come in any order: a filter always sees stored columns, ``map`` always sees finished batches. One
    dataset may be iterated several times at once; ``state_dict`` then follows the batch delivered last.

    Memory: the bytes of a row group's columns and what is decoded of them at once, 65,536 rows in whole batches; one
    shuffle buffer of ``buffer_rows`` rows; and the batches prefetched. With threads, one more slab or shuffle buffer is
    made ahead. With ``num_parallel_reads`` above 1, one more than that many row groups are decoded whole; under
    ``on_error="skip"``, one.
    """

    def __init__(self, plan: _Plan, stats: Stats | None = None, resume: dict[str, Any] | None = None) -> None:
        self._plan = plan
        self._stats = stats or Stats()
        self._resume = resume
        self._delivered: dict[str, Any] | None = None
        self._n_epochs = 0  # that iterations were given, where each is the next one

    @classmethod
    def from_parquet(
        cls,
        paths: Paths,
        fields: Sequence[str | Field] | None = None,
        shard: tuple[int, int] = (0, 1),
        num_parallel_reads: int = 1,
        num_parallel_decodes: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        hive: bool = False,
        deduplicated: Mapping[str, Sequence[str]] | None = None,
        ignore_case: bool = False,
    ) -> Self:
        """A dataset over the rows of Parquet files.

        Parameters
        ----------
        paths : str, path, or a list of them
            Files, globs, directories (searched to any depth) or URIs; a list keeps its order, the files of a glob
            or directory are sorted by name.
        fields : sequence of str or Field, optional
            Columns to read, members of structures and maps by their path (``user.age``); None takes all that can be
            read (``stats()["unsupported"]`` names the others).
        shard : (int, int)
            ``(i, m)`` gives the batches ``i, i + m, i + 2 m, ...``.
        num_parallel_reads : int
            Row groups decoded at once.
        num_parallel_decodes : int
            More than 1 decodes the columns of a row group in parallel.
        on_error : "raise" or "skip"
            "skip" drops a file or row group whose bytes are damaged, counts it in ``stats()`` and logs it. Every
            shard then decodes every row group, so that all agree on the rows that are left.
        hive : bool
            Directories ``key=value`` become columns, as in Spark: int64 where all values of a key are integers of at
            most 18 digits, else string; URL-decoded, ``__HIVE_DEFAULT_PARTITION__`` is null. A filter on them leaves
            whole files unread.
        deduplicated : mapping of str to sequence of str, optional
            Index column to the value columns that it restores, in files whose rows are blocks of samples; the rows are
            then samples. Files of ``write_deduplicated`` say so themselves.
        ignore_case : bool
            Find the fields' columns whatever the case of their letters; batches call them as the fields do.

        Raises
        ------
        NotFound
            No such file, or a directory or glob without Parquet files.
        Corrupt
            A file is damaged or no Parquet.
        UnknownColumn
            A field is in no file, or a file lacks it and the field has no default.
        SchemaMismatch, Unsupported, InvalidArgument
            The files disagree, or a field does not suit them.
        """
        return cls._open(
            paths,
            SUFFIXES,
            partial(File, ignore_case=ignore_case),
            fields,
            shard,
            num_parallel_reads,
            num_parallel_decodes,
            on_error,
            hive,
            deduplicated,
        )

    @classmethod
    def from_orc(
        cls,
        paths: Paths,
        fields: Sequence[str | Field] | None = None,
        shard: tuple[int, int] = (0, 1),
        num_parallel_reads: int = 1,
        num_parallel_decodes: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        hive: bool = False,
        deduplicated: Mapping[str, Sequence[str]] | None = None,
    ) -> Self:
        """A dataset over the rows of ORC files; all is as ``from_parquet`` says, and stripes are its row groups.

        Raises
        ------
        HbkitError
            See ``from_parquet``.

        Notes
        -----
        pyarrow decodes a stripe, all columns in one thread; a filter prunes none. A damaged footer is an error, but
        some damage inside a stripe crashes or stalls pyarrow's reader, which nothing here can prevent: read ORC files
        from sources that are trusted. Parquet files have no such risk.
        """
        return cls._open(
            paths,
            (".orc",),
            OrcFile,
            fields,
            shard,
            num_parallel_reads,
            num_parallel_decodes,
            on_error,
            hive,
            deduplicated,
        )

    @classmethod
    def _open(
        cls,
        paths: Paths,
        suffixes: Sequence[str],
        open_file: Callable[[str], DataFile],
        fields: Sequence[str | Field] | None,
        shard: tuple[int, int],
        num_parallel_reads: int,
        num_parallel_decodes: int,
        on_error: Literal["raise", "skip"],
        hive: bool,
        deduplicated: Mapping[str, Sequence[str]] | None,
    ) -> Self:
        i, m = shard
        _require(
            isinstance(i, int) and isinstance(m, int) and 0 <= i < m, f"shard is {shard}", "use (i, m), 0 <= i < m"
        )
        _positive(num_parallel_reads=num_parallel_reads, num_parallel_decodes=num_parallel_decodes)
        _require(on_error in ("raise", "skip"), f"on_error is {on_error!r}", "use 'raise' or 'skip'")
        stats = Stats()
        each = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        _require(bool(each), "paths is empty", "name at least one file")
        blocks = None if deduplicated is None else layout(deduplicated)
        files: list[DataFile] = []
        for path in [name for p in each for name in list_files(p, suffixes)]:
            try:
                file = open_file(path)
                indices = blocks or declared(file)
                files.append(Deduplicated(file, indices) if indices else file)
            except errors.Corrupt as e:
                if on_error == "raise":
                    raise
                last = e
                stats.skip("files", e)
        if not files:
            raise last
        if hive:
            files = partitioned(files)
        settled, schema, unsupported = _settle(files, fields)
        units = [(file, g) for file in files for g in range(len(file.row_group_rows))]
        plan = _Plan(
            units=tuple(Unit(k, file, g) for k, (file, g) in enumerate(units)),
            fields=tuple(settled),
            schema=schema,
            unsupported=unsupported,
            shard=(i, m),
            n_reads=num_parallel_reads,
            n_decodes=num_parallel_decodes,
            skip_bad=on_error == "skip",
            decoded_by={name: _decoded_by(files, name) for name in schema},
        )
        return cls(plan, stats)

    def _with(self, **changes: Any) -> Self:
        return type(self)(replace(self._plan, **changes), self._stats.child(), self._resume)

    def filter(self, expr: pc.Expression) -> Self:
        """Keep the rows where a ``pyarrow.compute`` expression over stored columns is true.

        Row groups whose statistics rule every row out are not read. The columns need not be among the fields. A
        second filter narrows the first.

        Raises
        ------
        InvalidArgument, UnknownColumn, SchemaMismatch
            It is no boolean expression over the files' columns.
        """
        row_filter = RowFilter(expr)
        if self._plan.units:
            row_filter.check(self._plan.units[0].file)
        return self._with(filter=row_filter if self._plan.filter is None else self._plan.filter & row_filter)

    def shuffle(self, seed: int, buffer_rows: int) -> Self:
        """Permute row groups, then rows within windows of ``buffer_rows`` rows.

        A pure function of (seed, epoch, window). Every shard that has rows of a window decodes the window.
        """
        _require(isinstance(seed, int) and seed >= 0, f"seed is {seed!r}", "use an integer of 0 or more")
        _positive(buffer_rows=buffer_rows)
        return self._with(shuffle=Shuffle(seed, buffer_rows))

    def shuffle_batch(
        self,
        n: int,
        drop_remainder: bool = False,
        buffer_size: int | None = None,
        seed: int | None = None,
        reshuffle_each_iteration: bool = True,
    ) -> Self:
        """``shuffle`` and ``batch`` as HybridBackend calls them: rows shuffled within ``buffer_size``, n by default.

        No seed means seed 0, so that all shards agree on the order. Each iteration is the next epoch, with an order of
        its own; without ``reshuffle_each_iteration``, all epochs have one order. (Of worker processes each counts its
        own iterations, and new ones begin anew: there, say ``set_epoch``.)
        """
        out = self.shuffle(0 if seed is None else seed, n if buffer_size is None else buffer_size)
        return out.batch(n, drop_remainder=drop_remainder)._with(reshuffle=bool(reshuffle_each_iteration))

    def batch(
        self, n: int, remainder: Literal["keep", "drop", "pad"] = "keep", *, drop_remainder: bool = False
    ) -> Self:
        """Batches of n rows; the last one of an epoch is kept shorter, dropped, or padded.

        Padding rows are zeros or empty; ``Batch.n_rows`` says how many are real. ``drop_remainder=True`` is another
        way to say "drop".
        """
        _positive(n=n)
        remainder = "drop" if drop_remainder else remainder
        _require(remainder in ("keep", "drop", "pad"), f"remainder is {remainder!r}", "use 'keep', 'drop' or 'pad'")
        return self._with(batch_size=n, remainder=remainder)

    def prefetch(self, k: int) -> Self:
        """Make up to k batches ahead in a background thread; 0 makes none."""
        _require(isinstance(k, int) and k >= 0, f"k is {k!r}", "use a number of batches")
        return self._with(prefetch=k)

    def repeat(self, n: int | None = None) -> Self:
        """Let an iteration be n epochs, one after another with the epoch counted up; None: without end."""
        if n is not None:
            _positive(n=n)
        return self._with(n_passes=n)

    def map(self, fn: Callable[[dict[str, Column]], Mapping[str, Column]]) -> Self:
        """Replace the columns of each batch by ``fn(columns)``, which must keep the number of rows."""
        _require(callable(fn), f"fn is a {type(fn).__name__}", "give a function of a dict of columns")
        return self._with(ops=(*self._plan.ops, fn))

    def select(self, names: Sequence[str]) -> Self:
        """Keep these columns, in this order; before any ``map``, the others are not decoded."""
        wanted = [names] if isinstance(names, str) else list(names)
        for kept in (*self._plan.labels, self.weight):
            _require(kept is None or kept in wanted, f"{kept!r} is the label or weight", "select it too")
        if self._plan.ops:
            return self._with(ops=(*self._plan.ops, partial(_selected, wanted)))
        by_name = {f.name: f for f in self._plan.fields}
        fields = tuple(_named(by_name, n) for n in wanted)
        return self._with(fields=fields, schema={n: self._plan.schema[n] for n in wanted})

    def supervised(self, label: str | Sequence[str], weight: str | None = None) -> Self:
        """Name the column to predict, or several, and optionally the one that weighs rows; all stay in the batches.

        Raises
        ------
        UnknownColumn, SchemaMismatch
            A named column does not exist, or is not one number a row.
        InvalidArgument
            There is no label.
        """
        label = label if isinstance(label, str) else tuple(label)
        _require(bool(label), "no label", "name a column")
        for name in (*((label,) if isinstance(label, str) else label), weight):
            if name is not None and not self._plan.ops:  # a map may still make it
                kind = _named(self._plan.schema, name)
                if kind.ragged_rank or kind.pad_to is not None or kind.dtype == "string":
                    raise errors.SchemaMismatch(
                        "a label or weight must be one number a row",
                        remedy="set Field(ragged_rank=0), with null='default' if values are absent",
                        column=name,
                    )
        return self._with(label=label, weight=weight)

    def set_epoch(self, e: int) -> Self:
        """The dataset whose next iteration is epoch e: another e, another shuffle."""
        _require(isinstance(e, int) and e >= 0, f"epoch is {e!r}", "use 0, 1, ...")
        out = self._with(epoch=e)
        if out._resume is not None and out._resume["epoch"] != e:
            out._resume = None
        return out

    @property
    def schema(self) -> dict[str, ColumnType]:
        """Types of the decoded columns by name, before any ``map``."""
        return dict(self._plan.schema)

    @property
    def batch_size(self) -> int | None:
        """Rows of a full batch; None before ``batch``."""
        return self._plan.batch_size

    @property
    def label(self) -> str | tuple[str, ...] | None:
        """Name of the column to predict; a tuple of those that were named as a sequence."""
        return self._plan.label

    @property
    def weight(self) -> str | None:
        """Name of the column that weighs rows."""
        return self._plan.weight

    @property
    def n_rows(self) -> int:
        """Rows that one epoch delivers to this shard; before ``batch``, to all shards.

        With a filter, the filtered columns are read once to count. Row groups that turn out bad when they are decoded
        are counted all the same.
        """
        total = self._n_rows(set())
        if self._plan.batch_size is None:
            return total
        n, (i, m) = self._plan.batch_size, self._plan.shard
        full, rest = divmod(total, n)
        mine = (full + m - 1 - i) // m * n
        return mine + (rest if full % m == i and self._plan.remainder != "drop" else 0)

    def _n_rows(self, skipped: set[int]) -> int:
        """Rows of an epoch of all shards, without the row groups that turned out bad."""
        epoch = replace(self._epoch(0, skipped), stats=Stats())
        return sum(epoch.count(u) for u in self._plan.units)

    def stats(self) -> dict[str, Any]:
        """Counts over all iterations of this dataset so far.

        Keys: ``n_batches`` and ``n_rows`` delivered; ``n_row_groups_read``, ``n_row_groups_pruned`` (no row left
        by the filter), ``n_row_groups_skipped`` and ``n_files_skipped`` (damaged; ``skipped`` has the reasons);
        ``decoded_by``: column to its decoder, "native" where it is hbkit's own; ``unsupported``: column to why it
        cannot be read.
        """
        names = "batches", "rows", "row_groups_read", "row_groups_pruned", "row_groups_skipped", "files_skipped"
        return {
            **{f"n_{name}": self._stats[f"n_{name}"] for name in names},
            "skipped": list(self._stats.skipped),
            "decoded_by": {f.name: self._plan.decoded_by[f.name] for f in self._plan.fields},
            "unsupported": dict(self._plan.unsupported),
        }

    def inputs(self, batch: Batch, features: Collection[str] = ()) -> Inputs:
        """What a model takes of a batch besides the keys in `features`, padded to the batch size.

        Raises
        ------
        InvalidArgument
            A remaining column is no number (leave it out with ``select``), or the label or weight is not one a row.
        UnknownColumn
            The batch lacks the label or weight.
        """
        n, size = batch.n_rows, self.batch_size or len(next(iter(batch.values()), ()))
        labels, weight = self._plan.labels, self.weight
        used = {*labels, weight, *features}

        def single(names: Sequence[str], otherwise: float) -> npt.NDArray[np.float32]:
            for name in names:
                if name not in batch:
                    raise errors.UnknownColumn(
                        "a column is not in the batch", column=name, remedy=f"the batch has {', '.join(batch)}"
                    )
            columns = {name: batch[name] for name in names} or {"": np.full(n, otherwise)}
            out = dense_inputs(columns, n, size)
            if out.shape[1] != len(columns):
                raise errors.InvalidArgument(
                    f"{out.shape[1]} values a row",
                    column=", ".join(names),
                    remedy="labels and weights are single numbers",
                )
            return out

        label = single(labels, 0)
        return Inputs(
            dense_inputs({name: column for name, column in batch.items() if name not in used}, n, size),
            label if isinstance(self.label, tuple) else label[:, 0],
            single([] if weight is None else [weight], 1)[:, 0],
            n,
            batch.cursor,
        )

    def no_rows(self) -> Batch:
        """A batch without rows, of the columns that batches have: what a rank gives that is out of data."""
        plan = self._plan
        size = plan.batch_size or 0 if plan.remainder == "pad" else 0
        columns = {name: pad(_no_rows(kind), size) for name, kind in plan.schema.items()}
        for op in plan.ops:
            columns = _checked(op(columns), size)
        return Batch(columns, 0, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where to continue: the cursor of the batch delivered last, a small JSON dict."""
        return dict(self._delivered or self._resume or self._cursor(self._plan.epoch, 0, 0, set()))

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Let the next iteration continue at a cursor; the one call that changes the dataset itself.

        Shards may be dealt anew: all shards that stopped after the same number of batches have the same cursor, and
        any ``shard=(i, m)`` continues from it.

        Raises
        ------
        InvalidArgument
            The cursor is damaged or of other data, another filter, shuffle or batch size.
        """
        state = dict(state)
        now = self._cursor(0, 0, 0, set())
        _require(state.keys() == now.keys(), "this is no cursor of a dataset", "pass what state_dict() gave")
        for key in ("version", "data", "shuffle", "batch_size"):
            _require(
                state[key] == now[key],
                f"the cursor's {key} is {state[key]}, the dataset's {now[key]}",
                "build the dataset as it was when the cursor was taken",
            )
        bad = state["skipped"]
        numbers = [state["epoch"], state["pass"], state["row"], *(bad if isinstance(bad, list) else [-1])]
        _require(
            all(isinstance(x, int) and x >= 0 for x in numbers) and state["row"] % (self._plan.batch_size or 1) == 0,
            "the cursor is damaged",
            "pass what state_dict() gave",
        )
        self._resume, self._delivered = state, None
        return self

    def _cursor(self, epoch: int, done: int, row: int, skipped: set[int]) -> dict[str, Any]:
        plan = self._plan
        data = [[u.file.n_rows, u.file.row_group_rows[u.row_group]] for u in plan.units]
        text = json.dumps([data, str(plan.filter.expr) if plan.filter else None])
        return {
            "version": 2,  # 1 shuffled in another order
            "data": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
            "shuffle": list(plan.shuffle) if plan.shuffle else None,
            "batch_size": plan.batch_size,
            "epoch": epoch,
            "pass": done,
            "row": row,
            "skipped": sorted(skipped),
        }

    def _epoch(self, number: int, skipped: set[int]) -> Epoch:
        plan = self._plan
        return Epoch(
            units=plan.units,
            fields=plan.fields,
            batch_size=plan.batch_size or 1,
            shard=plan.shard,
            filter=plan.filter,
            shuffle=plan.shuffle,
            epoch=0 if plan.reshuffle is False else number,
            n_reads=plan.n_reads,
            n_decodes=plan.n_decodes,
            skip_bad=plan.skip_bad,
            skipped=skipped,
            stats=self._stats,
        )

    def __iter__(self) -> Iterator[Batch]:
        """As `batches`; an adapter's dataset yields its framework's tensors instead."""
        return self.batches()

    def batches(self, worker: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches of NumPy columns from the start of the epoch, or from where ``load_state_dict`` said, once.

        Parameters
        ----------
        worker : (int, int)
            ``(k, w)``: only what worker k of w reads of this shard. Batches taken from the workers in turn, beginning
            with worker 0, are those of one, in order, with the same cursors.
        """
        _require(self._plan.batch_size is not None, "the dataset has no batch size", "call .batch(n) first")
        _require(0 <= worker[0] < worker[1], f"worker is {worker}", "use (k, w), 0 <= k < w")
        return self._deliver(self._begin(), worker)

    def _begin(self) -> dict[str, Any]:
        """Where an iteration that begins now starts; the next one does not."""
        start = self._resume or self._cursor(self._plan.epoch + self._n_epochs, 0, 0, set())
        self._resume, self._delivered = None, start
        if self._plan.reshuffle:
            self._n_epochs = start["epoch"] + 1 - self._plan.epoch
        return start

    def _deliver(self, cursor: dict[str, Any], worker: tuple[int, int]) -> Iterator[Batch]:
        batches = self._batches(cursor, *worker)
        if self._plan.prefetch:
            batches = prefetch(batches, self._plan.prefetch)
        try:
            for batch in batches:
                self._delivered = batch.cursor
                self._stats.add("n_batches")
                self._stats.add("n_rows", batch.n_rows)
                yield batch
        finally:
            batches.close()

    def _batches(self, cursor: dict[str, Any], k: int, w: int) -> Generator[Batch, None, None]:
        plan, n, (i, m) = self._plan, self._plan.batch_size or 1, self._plan.shard
        number, done, row, skipped = cursor["epoch"], cursor["pass"], cursor["row"], set(cursor["skipped"])
        here = self._cursor(number, done, row, skipped)
        turn = k  # whose batches of the pass these are: every w-th of the shard, from the one that is k's turn
        while plan.n_passes is None or done < plan.n_passes:
            empty = row == 0
            first = row // n // m
            shard = i + m * ((first + turn) % w), m * w
            for b, parts, n_rows in replace(self._epoch(number, skipped), shard=shard).batches(row):
                if n_rows < n and plan.remainder == "drop":
                    continue
                empty = False
                columns = join(parts)
                if plan.remainder == "pad":
                    columns = {name: pad(c, n) for name, c in columns.items()}
                for op in plan.ops:
                    columns = _checked(op(columns), n if plan.remainder == "pad" else n_rows)
                # the row after this round of all shards: then every shard's cursor is the same
                after = {"epoch": number, "pass": done, "row": (b // m + 1) * m * n, "skipped": sorted(skipped)}
                yield Batch(columns, n_rows, {**here, **after})
            if w > 1 and plan.n_passes != 1:
                full, rest = divmod(self._n_rows(skipped), n)
                n_batches = (full + (rest > 0 and plan.remainder != "drop") + m - 1 - i) // m
                turn, empty = (turn - max(n_batches - first, 0)) % w, n_batches == 0
            if empty and plan.n_passes is None:
                return  # nothing for this shard: without this, repeat() would spin for ever
            number, done, row = number + 1, done + 1, 0

    def __repr__(self) -> str:
        plan = self._plan
        n_files = len({id(u.file) for u in plan.units})
        return (
            f"Dataset({n_files} files, columns={list(plan.schema)}, shard={plan.shard}, batch_size={plan.batch_size})"
        )


def _settle(
    files: Sequence[DataFile], fields: Sequence[str | Field] | None
) -> tuple[list[Field], dict[str, ColumnType], dict[str, str]]:
    """The fields with a dtype and rank that suit all files, the schema they give, and what cannot be read."""
    unsupported = {name: kind.unsupported for f in files for name, kind in f.schema.items() if kind.unsupported}
    if fields is None:
        names = dict.fromkeys(name for f in files for name in f.schema)
        fields = [name for name in names if name not in unsupported]
    wanted = [f if isinstance(f, Field) else Field(f) for f in fields]
    schema: dict[str, ColumnType] = {}
    settled: list[Field] = []
    for field in wanted:
        _require(field.name not in schema, f"field {field.name!r} is named twice", "name it once")
        found = [(f, f.find(field.name)) for f in files]
        have = [(f.path, field.output(f.schema[name], f.path)) for f, name in found if name is not None]
        if not have:
            known = ", ".join(dict.fromkeys(name for f in files for name in f.schema))
            raise errors.UnknownColumn(
                f"column {field.name!r} is not in the files", remedy=f"columns are {known}", file=files[0].path
            )
        lacking = next((f.path for f, name in found if name is None), None)
        if lacking is not None and field.default is None and field.null != "empty":
            raise errors.UnknownColumn(
                f"column {field.name!r} is in {have[0][0]} but not in this file",
                remedy="set Field(default=...) or leave it out",
                file=lacking,
                column=field.name,
            )
        path, kind = have[0]
        for other_path, other in have[1:]:
            dtype = _common(kind, other)
            if dtype is None:
                raise errors.SchemaMismatch(
                    f"{path} has {_describe(kind)}, {other_path} has {_describe(other)}",
                    remedy="set Field(dtype=...), or read the files apart",
                    column=field.name,
                )
            kind = replace(kind, dtype=dtype)
        schema[field.name] = kind
        rank = kind.ragged_rank if kind.pad_to is None else 1
        settled.append(replace(field, dtype=None if field.hash_to else kind.dtype, ragged_rank=rank))
    return settled, schema, unsupported


def _decoded_by(files: Sequence[DataFile], name: str) -> str:
    return ", ".join(dict.fromkeys(f.decoded_by(found) for f in files if (found := f.find(name)) is not None))


def _common(a: ColumnType, b: ColumnType) -> str | None:
    """The dtype that holds both columns' values, or None."""
    if (a.ragged_rank, a.pad_to, a.logical) != (b.ragged_rank, b.pad_to, b.logical):
        return None
    if a.dtype == b.dtype:
        return a.dtype
    if "string" in (a.dtype, b.dtype) or "bool" in (a.dtype, b.dtype):
        return None
    x, y = np.dtype(a.dtype), np.dtype(b.dtype)
    wide = np.promote_types(x, y)
    return wide.name if (x.kind == "f") == (y.kind == "f") == (wide.kind == "f") else None


def _describe(kind: ColumnType) -> str:
    return "list " * kind.ragged_rank + (kind.logical or kind.dtype)


def _no_rows(kind: ColumnType) -> Column:
    values: Any = Strings.from_list([]) if kind.dtype == "string" else np.empty(0, kind.dtype)
    if kind.pad_to is not None:
        return np.empty((0, kind.pad_to), kind.dtype)
    return Ragged(values, (np.zeros(1, np.int64),) * kind.ragged_rank) if kind.ragged_rank else values


def _checked(columns: Mapping[str, Column], n_rows: int) -> dict[str, Column]:
    _require(isinstance(columns, Mapping), f"map's fn gave a {type(columns).__name__}", "return a dict of columns")
    for name, column in columns.items():
        have = ragged.n_rows(column)
        _require(have == n_rows, f"map's fn gave {name!r} {have} rows of {n_rows}", "keep the number of rows")
    return dict(columns)


def _selected(names: Sequence[str], columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _named(columns, name) for name in names}


def _named(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise errors.UnknownColumn(f"column {name!r} is not in the dataset", remedy=f"columns are {list(columns)}")
    return columns[name]


def _positive(**numbers: int) -> None:
    for name, n in numbers.items():
        _require(isinstance(n, int) and n > 0, f"{name} is {n!r}", "use a positive integer")


def _require(ok: bool, problem: str, remedy: str) -> None:
    if not ok:
        raise errors.InvalidArgument(problem, remedy=remedy)

"""Anything to Parquet: read, reshape a few columns, split the rows, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data import formats
from hbkit.data.output import ROW_GROUP_ROWS, Output, writers

__all__ = ["Converted", "Written", "convert"]

PARTS = {2: ("train", "test"), 3: ("train", "valid", "test")}
SPLITS_BY = ("random", "order")


class Progress(Protocol):
    """What shows the bytes that were read."""

    def update(self, n: int) -> None:
        """``n`` bytes more."""


class _Silent:
    def update(self, n: int) -> None:
        pass


def _silent(description: str, total: int) -> AbstractContextManager[Progress]:
    return nullcontext(_Silent())


@dataclass(frozen=True)
class Written:
    """One file that was written."""

    path: str
    n_rows: int
    nbytes: int


@dataclass(frozen=True)
class Converted:
    """What was read and what was written."""

    format: str
    nbytes: int
    n_rows: int
    schema: pa.Schema
    files: list[Written]


def convert(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    format: str = "auto",
    sep: str | None = None,
    header: bool | None = None,
    label: str | None = None,
    positive: float | None = None,
    lists: Mapping[str, str] | None = None,
    scalars: Sequence[str] = (),
    unsorted: bool = False,
    split: str | None = None,
    split_by: str = "random",
    seed: int = 0,
    row_group_rows: int = ROW_GROUP_ROWS,
    compression: str = "zstd",
    overwrite: bool = False,
    progress: Callable[[str, int], AbstractContextManager[Progress]] = _silent,
) -> Converted:
    """Convert files of one format to Parquet.

    Parameters
    ----------
    inputs : sequence of str or path
        Files, or one directory for MovieLens; for Parquet also directories, globs and URIs. They become one data set,
        in this order.
    out : str or path
        One file that ends in ``.parquet``, or a directory, which gets ``part-00000.parquet``, or with a split
        ``train.parquet``, ``valid.parquet`` and ``test.parquet``.
    format : str
        One of ``hbkit.data.formats.FORMATS``; "auto" looks at what the first file holds.
    sep, header, lists
        Of CSV: see ``formats.Csv``.
    label : str, optional
        The column that is the label: it is renamed to ``label``, comes first, is a scalar, and may hold no nulls.
    positive : float, optional
        A label of at least this becomes 1 and any other 0: 1 for labels of -1 and 1, 4 for ratings. Takes the column
        ``label`` where no ``label`` is given.
    scalars : sequence of str
        List columns whose lists hold at most one value, to become scalars (an empty list is a null).
    unsorted : bool
        Of libsvm: take indices in any order.
    split : str, optional
        Proportions such as "8:1:1" (train, valid, test) or "3:1" (train, test).
    split_by : "random" or "order"
        "random" decides for each row by Philox(seed) of its number, so the sizes meet the proportions nearly and
        neither block sizes nor threads matter; "order" cuts exactly and keeps the rows' order.
    seed : int
        In [0, 2**64).
    row_group_rows, compression
        Of the files that are written.
    overwrite : bool
        Replace Parquet files that are at ``out``.
    progress : function of (description, total bytes)
        Gives a context manager of something with ``update(n_bytes)``.

    Raises
    ------
    NotFound, UnknownColumn, InvalidArgument
        A file or column that is asked for is not there, or an argument is out of range.
    Corrupt
        A line or file breaks its format; names the file and, where it can, the line or byte.
    NullFound, SchemaMismatch, Unsupported, StorageError

    Notes
    -----
    Streams: memory holds a few blocks, and one row group for each file that is written. A failed conversion leaves
    nothing behind.
    """
    if row_group_rows < 1:
        raise errors.InvalidArgument(f"row groups of {row_group_rows} rows", remedy="give a positive number")
    output = Output(out, overwrite)
    shares = _shares(split)
    if shares is not None and output.is_file:
        raise errors.InvalidArgument("a split makes several files", remedy="name a directory", file=output.path)
    if split_by not in SPLITS_BY:
        raise errors.InvalidArgument(f"cannot split by {split_by!r}", remedy=f"use one of {', '.join(SPLITS_BY)}")
    if not 0 <= seed < 2**64:
        raise errors.InvalidArgument(f"seed {seed}", remedy="use 0 to 2**64 - 1")
    paths = [os.fspath(path) for path in inputs]
    if format == "auto":
        format = formats.detect(paths[0])
    source = _open(paths, format, sep, header, lists, unsorted)
    if source.must_scan or (shares is not None and split_by == "order" and source.n_rows is None):
        with progress("first pass", source.nbytes) as bar:
            source.scan(bar.update)
    reshape = _Reshape(source, scalars, label, positive)
    parts = _Parts(shares, split_by, seed, source.n_rows)
    names = [f"{part}.parquet" for part in parts.names] if shares is not None else ["part-00000.parquet"]
    with output, writers(output, names, reshape.schema, row_group_rows, compression) as files:
        n_rows = 0
        with progress("convert", source.nbytes) as bar:
            for batch in source.batches(bar.update):
                batch = reshape(batch, n_rows)
                for file, rows in zip(files, parts.of(n_rows, batch), strict=True):
                    file.write(rows)
                n_rows += batch.num_rows
            metadata = {
                "hbkit.format": format,
                "hbkit.source": ", ".join(os.path.basename(os.path.normpath(path)) for path in source.files[:10]),
            }
            written = []
            for i, (file, name) in enumerate(zip(files, names, strict=True)):
                nbytes = file.finish(metadata | parts.metadata(i))
                written.append(Written(output.final(name), file.n_rows, nbytes))
    return Converted(format, source.nbytes, n_rows, reshape.schema, written)


def _open(
    paths: list[str],
    format: str,
    sep: str | None,
    header: bool | None,
    lists: Mapping[str, str] | None,
    unsorted: bool,
) -> formats.Input:
    if format not in ("csv", "tsv"):
        for option, given in (("--sep", sep), ("--header", header), ("--list", lists or None)):
            if given is not None:
                raise errors.InvalidArgument(
                    f"{option} is for csv and tsv, and this is {format}",
                    remedy="leave it out, or name the --format",
                    file=paths[0],
                )
    if sep is not None and (len(sep) != 1 or not sep.isascii()):
        raise errors.InvalidArgument(f"separator {sep!r}", remedy="use one ASCII character")
    match format:
        case "csv":
            return formats.Csv(paths, sep, header, lists)
        case "tsv":
            return formats.Csv(paths, sep or "\t", header, lists)
        case "libsvm":
            return formats.LibSvm(paths, unsorted)
        case "libffm":
            return formats.LibFfm(paths)
        case "slot":
            return formats.Slot(paths)
        case "sequence":
            return formats.Sequences(paths)
        case "criteo":
            return formats.Criteo(paths)
        case "aliccp":
            return formats.AliCcp(paths)
        case "tfrecord":
            return formats.TfRecord(paths)
        case "movielens":
            if len(paths) > 1:
                raise errors.InvalidArgument("several inputs", remedy="name the one MovieLens directory", file=paths[1])
            return formats.MovieLens(paths[0])
        case "parquet":
            return formats.ParquetFiles(paths)
    raise errors.InvalidArgument(f"unknown format {format!r}", remedy=f"use one of {', '.join(formats.FORMATS)}")


class _Reshape:
    """Lists to scalars, and the label to the front."""

    def __init__(
        self, source: formats.Input, scalars: Sequence[str], label: str | None, positive: float | None
    ) -> None:
        schema = source.schema
        self._file = source.files[0] if len(source.files) == 1 else None
        self._positive = positive
        self._label = label or source.label or ("label" if positive is not None else None)
        for name in [*scalars, *([self._label] if self._label else [])]:
            if name not in schema.names:
                there = ", ".join(schema.names[:8]) + (", ..." if len(schema.names) > 8 else "")
                raise errors.UnknownColumn(
                    f"no such column; there are {there}", remedy="correct the name", file=self._file, column=name
                )
        for name in scalars:
            if not _is_list(schema.field(name).type):
                raise errors.InvalidArgument(
                    "the column is a scalar already", remedy="leave it out of --scalar", file=self._file, column=name
                )
        self._scalars = set(scalars)
        if self._label and _is_list(schema.field(self._label).type):
            self._scalars.add(self._label)
        if self._label not in (None, "label") and "label" in schema.names:
            raise errors.InvalidArgument(
                "there is another column named label", remedy="rename it first", file=self._file, column=self._label
            )
        types = {field.name: field.type.value_type if field.name in self._scalars else field.type for field in schema}
        if self._label:
            kind = types.pop(self._label)
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise errors.InvalidArgument(
                    f"a label is a number, and this is {kind}",
                    remedy="name another --label",
                    file=self._file,
                    column=self._label,
                )
            whole = positive is not None or pa.types.is_integer(kind)
            types = {self._label: pa.int64() if whole else kind, **types}
        self._order = [schema.names.index(name) for name in types]
        self.schema = pa.schema([("label" if name == self._label else name, kind) for name, kind in types.items()])

    def __call__(self, batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        columns = []
        for i, field in zip(self._order, self.schema, strict=True):
            name, column = batch.schema.names[i], batch.column(i)
            place = {"file": self._file, "column": name}
            if name in self._scalars:
                column = self._scalar(column, first_row, place)
            if name == self._label:
                if column.null_count:
                    row = first_row + pc.index(column.is_null(), True).as_py()
                    raise errors.NullFound("the label is missing", remedy="leave the row out", **place, row=row)
                if self._positive is not None:
                    column = pc.greater_equal(column, self._positive)
                column = column.cast(field.type)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    @staticmethod
    def _scalar(column: Any, first_row: int, place: dict[str, Any]) -> Any:
        n = pc.fill_null(pc.list_value_length(column), 0).to_numpy(False)
        if n.max(initial=0) > 1:
            row = int(np.argmax(n > 1))
            raise errors.InvalidArgument(
                f"a list of {n[row]} values is no scalar",
                remedy="leave the column out of --scalar",
                **place,
                row=first_row + row,
            )
        return column.flatten().take(pa.array(np.cumsum(n) - 1, mask=n == 0))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _shares(split: str | None) -> npt.NDArray[np.float64] | None:
    """Cumulative shares of the parts, the last 1."""
    if split is None:
        return None
    try:
        weights = np.array([float(w) for w in split.split(":")])
    except ValueError:
        weights = np.array([])
    if len(weights) not in PARTS or not np.isfinite(weights).all() or (weights <= 0).any():
        raise errors.InvalidArgument(
            f"cannot split by {split!r}", remedy="give two or three positive proportions, as in 8:1:1"
        )
    shares: npt.NDArray[np.float64] = np.cumsum(weights) / weights.sum()
    shares[-1] = 1.0
    return shares


class _Parts:
    """Which rows go to which file."""

    def __init__(self, shares: npt.NDArray[np.float64] | None, by: str, seed: int, n_rows: int | None) -> None:
        self._shares = shares
        self.names = PARTS[len(shares)] if shares is not None else ()
        self._by, self._seed = by, seed
        if shares is not None and by == "order":
            assert n_rows is not None
            self._ends = [0, *(round(n_rows * share) for share in shares)]

    def of(self, first_row: int, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        """The rows of a batch that go to each file."""
        if self._shares is None:
            return [batch]
        n = batch.num_rows
        if self._by == "order":
            cuts = [min(max(end - first_row, 0), n) for end in self._ends]
            return [batch.slice(a, b - a) for a, b in pairwise(cuts)]
        part = np.searchsorted(self._shares, _uniform(self._seed, first_row, n), side="right")
        return [batch.filter(pa.array(part == i)) for i in range(len(self.names))]

    def metadata(self, i: int) -> dict[str, str]:
        """What the file of part ``i`` says of itself."""
        if self._shares is None:
            return {}
        share = np.diff(self._shares, prepend=0)[i]
        how = f"by random, seed {self._seed}" if self._by == "random" else "by order"
        return {"hbkit.split": f"{self.names[i]}, {share:.6g} of the rows, {how}"}


def _uniform(seed: int, first: int, n: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that belong to the rows ``first .. first + n``, however the rows are cut into batches."""
    skip = first % 4  # Philox gives four words at a time
    words = np.random.Philox(key=seed).advance(first // 4).random_raw(n + skip)[skip:]
    u: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) / 2**53
    return u

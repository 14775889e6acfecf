"""TFRecord files of tf.train.Example messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hbkit import errors
from hbkit._ext import tfrecord
from hbkit.data.formats import input as _input
from hbkit.data.formats.input import Advance, Batches, Input, list_array, natural, opened

__all__ = ["TfRecord"]

RECORD_NBYTES = 64 << 20
MAX_FEATURES = 10_000
CELLS = 1 << 24  # rows x features that are decoded at once
LISTS = {0: "no list", tfrecord.BYTES: "bytes_list", tfrecord.FLOAT: "float_list", tfrecord.INT64: "int64_list"}
ROW, FEATURE, KIND, N_VALUES = range(4)  # columns of what tfrecord.features gives

Table = npt.NDArray[np.int64]


class TfRecord(Input):
    """TFRecord files of ``tf.train.Example``: a column for each feature, in the order of their names.

    ``int64_list`` becomes int64, ``float_list`` float32 (also where no record has a value) and ``bytes_list`` string,
    or binary where any value is not UTF-8. A feature with exactly one value in every record of all files is a scalar,
    any other a list, empty where the feature is absent.

    Files of ``ExampleListWithContext`` give one row for each inner example, beside the features of its context, with
    the number of its list as ``qid``.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files)
        self._nested: bool | None = None
        self._own, self._context = _Features(), _Features()

    def scan(self, advance: Advance) -> None:
        for part in self._parts(advance):
            if self._nested is None and len(part.bounds):
                self._nested = _is_nested(part)
            own, _, context = self._messages(part)
            for features, bounds in ((self._own, own), (self._context, context)):
                features.see(part, bounds)
        columns, contexts = self._own.schema(), self._context.schema()
        if not columns and not contexts:
            raise errors.Corrupt("no record has any feature", remedy="leave the file out", file=self.files[0])
        for name in sorted(columns.keys() & contexts.keys())[:1]:
            raise errors.Unsupported(
                "a feature of the examples and of their context has this name",
                remedy="rename one",
                file=self.files[0],
                column=name,
            )
        columns |= contexts
        names = sorted(columns, key=natural)
        if self._nested and "qid" not in columns:
            columns["qid"] = pa.int64()
            names.insert(0, "qid")
        self.schema = pa.schema([(name, columns[name]) for name in names])
        self.n_rows = self._own.n_rows

    def batches(self, advance: Advance) -> Batches:
        n_lists = 0
        for part in self._parts(advance):
            own, message, context = self._messages(part)
            step = max(1, CELLS // len(self.schema))
            if self._nested:  # each row repeats its context
                step = max(1, min(step, _input.BLOCK_NBYTES // max(1, np.diff(context).max(initial=0))))
            for i in range(0, len(own), step):
                columns = self._own.columns(part, own[i : i + step])
                if self._nested:
                    which = message[i : i + step]
                    once = self._context.columns(part, context[which[0] : which[-1] + 1])
                    columns |= {name: column.take(pa.array(which - which[0])) for name, column in once.items()}
                    columns.setdefault("qid", pa.array(n_lists + which))
                yield pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
            n_lists += len(part.bounds)

    def _messages(self, part: _Part) -> tuple[Table, Table, Table]:
        """The Examples that are rows, the number of the list that each is in, and the Examples that are contexts."""
        if not self._nested:
            return part.bounds, part.bounds[:0, 0], part.bounds[:0]
        with _located(part.path, part.at):
            return tfrecord.nested(part.block, part.bounds)

    def _parts(self, advance: Advance) -> Iterator[_Part]:
        for path in self.files:
            at, rest = 0, b""
            with opened(path, advance) as stream:
                while data := stream.read(_input.BLOCK_NBYTES):
                    block = rest + data
                    with _located(path, at):
                        bounds, used = tfrecord.records(block, RECORD_NBYTES)
                    yield _Part(path, at, block, bounds)
                    at, rest = at + used, block[used:]
            if rest:
                raise errors.Corrupt("the record is cut off", remedy="fetch the file again", file=path, byte=at)


@dataclass(frozen=True)
class _Part:
    """Some records of a file.

    Attributes
    ----------
    path : str
    at : int
        Where the block begins in the file; in a gzip file, in what is packed there.
    block : bytes
    bounds : int64[n, 2]
        Where the data of each record begin and end in the block.
    """

    path: str
    at: int
    block: bytes
    bounds: Table

    def place(self, start: int, name: bytes | None = None) -> dict[str, Any]:
        """Where a message is that starts in the block, for errors."""
        column = None if name is None else name.decode(errors="replace")
        return {"file": self.path, "byte": self.at + int(start), "column": column}


@contextlib.contextmanager
def _located(path: str, at: int) -> Iterator[None]:
    """Adds the file to what is raised about a block that begins at the byte ``at``."""
    try:
        yield
    except errors.Corrupt as e:
        byte = at + int(str(e.place["byte"]))
        raise errors.Corrupt(e.problem, remedy=e.remedy, file=path, byte=byte) from None


def _is_nested(part: _Part) -> bool:
    """Whether records are ExampleListWithContext: by the first one that cannot be both."""
    for start, end in part.bounds:
        record = np.array([[start, end]])
        fails: list[errors.Corrupt] = []
        for nested in (False, True):
            try:
                own, _, context = tfrecord.nested(part.block, record) if nested else (record, None, record[:0])
                for bounds in (own, context):
                    tfrecord.features(part.block, bounds, {})
            except errors.Corrupt as e:
                fails.append(e)
                nests = not nested
        if len(fails) == 2:
            raise errors.Unsupported(
                f"the records are neither tf.train.Example nor ExampleListWithContext ({fails[0].problem})",
                remedy="write one tf.train.Example for each row",
                **part.place(start),
            )
        if fails:
            return nests
    return False


class _Features:
    """The features of Examples, by name: the kinds of their lists, and which are scalars."""

    def __init__(self) -> None:
        self.n_rows = 0
        self._names: dict[bytes, int] = {}
        self._kind = self._n_single = np.zeros(0, np.int64)  # of each feature; rows with exactly one value
        self._text = np.zeros(0, bool)  # all of its strings are UTF-8

    def see(self, part: _Part, bounds: Table) -> None:
        """The first pass over some Examples."""
        entries, cuts = self._entries(part, bounds)
        self.n_rows += len(bounds)
        single = entries[entries[:, N_VALUES] == 1, FEATURE]
        self._n_single = self._n_single + np.bincount(single, minlength=len(self._names))
        for i in np.flatnonzero((self._kind == tfrecord.BYTES) & self._text).tolist():
            try:
                self._values(part, i, entries[cuts[i] : cuts[i + 1]]).validate(full=True)
            except pa.ArrowInvalid:
                self._text[i] = False

    def schema(self) -> dict[str, pa.DataType]:
        """The types of what ``columns`` gives, after all Examples were seen."""
        single = self._n_single == self.n_rows
        return {
            name.decode(): self._type(i) if single[i] else pa.list_(self._type(i)) for name, i in self._names.items()
        }

    def columns(self, part: _Part, bounds: Table) -> dict[str, Any]:
        """The second pass: an array of each feature."""
        entries, cuts = self._entries(part, bounds)
        columns = {}
        for name, i in self._names.items():
            lists = entries[cuts[i] : cuts[i + 1]]
            column = self._values(part, i, lists)
            if self._n_single[i] < self.n_rows:
                n = np.zeros(len(bounds) + 1, np.int64)
                n[lists[:, ROW] + 1] = lists[:, N_VALUES]
                column = list_array(column, np.cumsum(n))
            columns[name.decode()] = column
        return columns

    def _type(self, i: int) -> pa.DataType:
        if self._kind[i] == tfrecord.BYTES:
            return pa.string() if self._text[i] else pa.binary()
        return pa.int64() if self._kind[i] == tfrecord.INT64 else pa.float32()

    def _values(self, part: _Part, i: int, lists: Table) -> Any:
        n = int(lists[:, N_VALUES].sum())
        if self._kind[i] == tfrecord.BYTES:
            splits, data = tfrecord.bytes_values(part.block, lists, n)
            return pa.Array.from_buffers(self._type(i), n, [None, pa.py_buffer(splits), pa.py_buffer(data)])
        values = tfrecord.int64_values if self._kind[i] == tfrecord.INT64 else tfrecord.float_values
        return pa.array(values(part.block, lists, n))

    def _entries(self, part: _Part, bounds: Table) -> tuple[Table, Table]:
        """What ``tfrecord.features`` gives, ordered by feature, and where those of each feature begin."""
        with _located(part.path, part.at):
            entries = tfrecord.features(part.block, bounds, self._names)
        if len(self._names) > MAX_FEATURES:
            raise errors.Unsupported(
                f"more than {MAX_FEATURES} features", remedy="write them as lists of keys and values", file=part.path
            )
        names = list(self._names)
        more = len(names) - len(self._kind)
        self._kind, self._n_single = np.pad(self._kind, (0, more)), np.pad(self._n_single, (0, more))
        self._text = np.pad(self._text, (0, more), constant_values=True)

        kind, feature = entries[:, KIND], entries[:, FEATURE]
        for i in range(len(names) - more, len(names)):
            try:
                names[i].decode()
            except UnicodeDecodeError:
                start = bounds[entries[np.argmax(feature == i), ROW], 0]
                raise errors.Corrupt(
                    "the feature's name is not UTF-8", remedy="rename it", **part.place(start, names[i])
                ) from None
        fresh = np.flatnonzero((kind > 0) & (self._kind[feature] == 0))[::-1]  # backwards, so that the first one stays
        self._kind[feature[fresh]] = kind[fresh]
        for i in np.flatnonzero((kind > 0) & (kind != self._kind[feature]))[:1]:
            name = names[feature[i]]
            raise errors.SchemaMismatch(
                f"{LISTS[kind[i]]} here, and {LISTS[self._kind[feature[i]]]} in another record",
                remedy="write each feature with one type",
                **part.place(bounds[entries[i, ROW], 0], name),
            )
        entries = entries[np.argsort(feature.astype(np.int16), kind="stable")]  # of 16 bits: a radix sort
        row, feature = entries[:, ROW], entries[:, FEATURE]
        for i in np.flatnonzero((row[1:] == row[:-1]) & (feature[1:] == feature[:-1]))[:1]:
            raise errors.Corrupt(
                "the feature is there twice in one record",
                remedy="write it once",
                **part.place(bounds[row[i], 0], names[feature[i]]),
            )
        return entries, np.searchsorted(feature, np.arange(len(names) + 1))

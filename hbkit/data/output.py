"""Parquet files being written: out of sight until all of them are whole, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from hbkit import errors

__all__ = ["COMPRESSIONS", "ROW_GROUP_ROWS", "Output", "Writer", "writers"]

ROW_GROUP_ROWS = 131_072
COMPRESSIONS = ("zstd", "snappy", "none")
_BUFFER_NBYTES = 256 << 20  # a row group of very wide rows is closed early


class Output:
    """The files of one command: a directory of Parquet files, or one ``.parquet`` file.

    As a context manager it keeps what is written in a hidden directory beside the final place (so a rename is
    enough) and moves it there when the block ends without an error; otherwise nothing is left behind.

    Parameters
    ----------
    out : str or path
        A directory, made if absent, or the path of one file that ends in ``.parquet``.
    overwrite : bool
        Replace what is there: all Parquet files of the directory, or the file.

    Raises
    ------
    InvalidArgument
        ``out`` exists, is not empty, and ``overwrite`` is False.
    StorageError
        The operating system refused.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = os.fspath(out)
        self.is_file = self.path.endswith(".parquet") and not os.path.isdir(self.path)
        self._directory = (os.path.dirname(self.path) or ".") if self.is_file else self.path
        self._hidden = os.path.join(self._directory, f".hbkit-{os.getpid()}")
        self._names: list[str] = []
        with _storage(self.path):
            if self.is_file:
                taken = os.path.exists(self.path)
            elif os.path.exists(self.path) and not os.path.isdir(self.path):
                raise errors.InvalidArgument(
                    "a file stands where a directory is to be made",
                    remedy="name another place, or a file that ends in .parquet",
                    file=self.path,
                )
            else:
                taken = os.path.isdir(self.path) and bool(os.listdir(self.path))
        if taken and not overwrite:
            raise errors.InvalidArgument(
                "the output exists already", remedy="name another place or pass --overwrite", file=self.path
            )

    def __enter__(self) -> Output:
        with _storage(self.path):
            self._made = not os.path.isdir(self._directory)
            os.makedirs(self._hidden)
        return self

    def add(self, name: str) -> str:
        """The path under which the file ``name`` is to be written; it will be moved to ``final(name)``."""
        self._names.append(os.path.basename(self.path) if self.is_file else name)
        return os.path.join(self._hidden, self._names[-1])

    def final(self, name: str) -> str:
        """Where the file ``name`` will stand."""
        return self.path if self.is_file else os.path.join(self.path, name)

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with _storage(self.path):
                    self._publish()
        finally:
            shutil.rmtree(self._hidden, ignore_errors=True)
            if self._made and kind is not None:
                with contextlib.suppress(OSError):
                    os.rmdir(self._directory)

    def _publish(self) -> None:
        for name in self._names:
            os.replace(os.path.join(self._hidden, name), os.path.join(self._directory, name))
        if not self.is_file:  # what an earlier run left would be read as part of this data
            for name in os.listdir(self.path):
                if name.endswith(".parquet") and name not in self._names:
                    os.unlink(os.path.join(self.path, name))


class Writer:
    """One Parquet file, written in row groups of a fixed number of rows whatever the sizes of the batches.

    Parameters
    ----------
    path : str
    schema : pyarrow.Schema
    row_group_rows : int
    compression : "zstd", "snappy" or "none"
    """

    def __init__(
        self, path: str, schema: pa.Schema, row_group_rows: int = ROW_GROUP_ROWS, compression: str = "zstd"
    ) -> None:
        if row_group_rows < 1:
            raise errors.InvalidArgument(f"row groups of {row_group_rows} rows", remedy="give a positive number")
        if compression not in COMPRESSIONS:
            raise errors.InvalidArgument(
                f"unknown compression {compression!r}", remedy=f"use one of {', '.join(COMPRESSIONS)}"
            )
        self.path = path
        self.n_rows = 0
        self._rows = row_group_rows
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._buffered = 0
        self._nbytes = 0
        with _storage(path):
            self._sink = pa.OSFile(path, "wb")
            self._writer = pq.ParquetWriter(self._sink, schema, compression=compression)

    def write(self, batch: pa.RecordBatch) -> None:
        """Take the rows of a batch; they are on disk when a row group is full."""
        while batch.num_rows:
            part = batch.slice(0, self._rows - self._buffered)
            batch = batch.slice(part.num_rows)
            self._batches.append(part)
            self._buffered += part.num_rows
            self._nbytes += part.nbytes
            if self._buffered == self._rows or self._nbytes > _BUFFER_NBYTES:
                self.flush()

    def flush(self) -> None:
        """End the row group here, so that no rows are held in memory."""
        if not self._buffered:
            return
        with _storage(self.path):
            table = pa.Table.from_batches(self._batches, self._schema)
            self._writer.write_table(table, row_group_size=self._rows)
        self.n_rows += self._buffered
        self._batches, self._buffered, self._nbytes = [], 0, 0

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write what is buffered and the footer, with these key-value pairs; returns the file's size in bytes."""
        self.flush()
        with _storage(self.path):
            self._writer.add_key_value_metadata(dict(metadata))
            self._writer.close()
            self._sink.close()
            return os.path.getsize(self.path)

    def abort(self) -> None:
        """Close the file as it is; does nothing after ``finish``."""
        if not self._sink.closed:
            self._batches = []
            with contextlib.suppress(Exception):
                self._writer.close()
            with contextlib.suppress(Exception):
                self._sink.close()


@contextlib.contextmanager
def writers(
    output: Output, names: list[str], schema: pa.Schema, row_group_rows: int, compression: str
) -> Iterator[list[Writer]]:
    """Writers of some files of an output, closed whatever happens."""
    opened: list[Writer] = []
    try:
        for name in names:
            opened.append(Writer(output.add(name), schema, row_group_rows, compression))
        yield opened
    finally:
        for writer in opened:
            writer.abort()


@contextlib.contextmanager
def _storage(path: str) -> Iterator[None]:
    """Turns the operating system's refusals into StorageError."""
    try:
        yield
    except errors.HbkitError:
        raise
    except OSError as e:
        raise errors.StorageError(
            f"cannot write: {e.strerror or e}", remedy="free space there or write elsewhere", file=path
        ) from e

"""Parquet, to be reshaped, split or cut into other row groups."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from hbkit import errors
from hbkit.data.formats.input import Advance, Batches, Input
from hbkit.parquet import File, list_files

__all__ = ["ParquetFiles"]

BATCH_ROWS = 65_536


class ParquetFiles(Input):
    """Parquet files of one schema."""

    must_scan = False

    def __init__(self, paths: Sequence[str]) -> None:
        files = [file for path in paths for file in list_files(path)]
        self._readers = [File(path) for path in files]
        self.files = files
        self.nbytes = sum(reader.source.nbytes for reader in self._readers)
        self.n_rows = sum(reader.n_rows for reader in self._readers)
        self.schema = self._readers[0].arrow_schema.remove_metadata()
        for reader in self._readers:
            if not reader.arrow_schema.equals(self.schema, check_metadata=False):
                raise errors.SchemaMismatch(
                    f"the columns differ from those of {files[0]}", remedy="convert these files apart", file=reader.path
                )
            for leaf in reader.footer.leaves:
                if leaf.closed:
                    raise errors.Unsupported(leaf.closed, remedy="rewrite the file", file=reader.path, column=leaf.name)

    def scan(self, advance: Advance) -> None:
        advance(self.nbytes)

    def batches(self, advance: Advance) -> Batches:
        for reader in self._readers:
            done = 0
            try:
                stream = pq.ParquetFile(reader.source.file)
                for batch in stream.iter_batches(BATCH_ROWS):
                    yield batch.replace_schema_metadata(None)
                    before, done = done, done + batch.num_rows
                    size, n = reader.source.nbytes, reader.n_rows
                    advance(size * done // n - size * before // n)
            except (pa.ArrowException, OSError) as e:
                if isinstance(e, errors.HbkitError):
                    raise
                raise errors.Corrupt(
                    f"the data cannot be decoded ({e})", remedy="fetch or write the file again", file=reader.path
                ) from e

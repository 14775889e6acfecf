"""CSV, TSV and raw Criteo logs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from hbkit import errors
from hbkit.data.formats.input import (
    BLOCK_NBYTES,
    Advance,
    Batches,
    Input,
    Malformed,
    all_true,
    cast,
    casts,
    head,
    list_array,
    listed,
    opened,
)

__all__ = ["Criteo", "Csv"]

SEPARATORS = ("\t", ",", ";", "|")
NULLS = ("", "\\N")
NUMBER_NULLS = (*NULLS, "NA", "N/A", "n/a", "NULL", "null", "None", "NaN", "nan")
# A leading zero makes a name (zip codes, hashed ids), not a number.
INTEGER = r"^-?(0|[1-9][0-9]*)$"
NUMBER = r"^-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"


class _Kind:
    """The narrowest type that holds all cells seen: int64, uint64, float64, else string."""

    def __init__(self) -> None:
        self._int64 = self._uint64 = self._float64 = True
        self._seen = self._fraction = False

    def see(self, cells: Any) -> None:
        if not (self._int64 or self._uint64 or self._float64):
            return
        cells = pc.ascii_trim_whitespace(cells)
        cells = cells.filter(pc.invert(pc.is_in(cells, pa.array(NUMBER_NULLS))))
        if not len(cells):
            return
        self._seen = True
        if all_true(pc.match_substring_regex(cells, INTEGER)):
            self._int64 = self._int64 and self._fits(cells, pa.int64())
            self._uint64 = self._uint64 and self._fits(cells, pa.uint64())
        else:
            self._int64 = self._uint64 = False
            self._fraction = True
            numbers = all_true(pc.match_substring_regex(cells, NUMBER))
            self._float64 = self._float64 and numbers
        # A hashed id such as 25e83498 looks like a number but is none.
        self._float64 = self._float64 and self._fits(cells, pa.float64())

    @staticmethod
    def _fits(cells: Any, kind: pa.DataType) -> bool:
        try:
            numbers = pc.cast(cells, kind)
        except pa.ArrowInvalid:
            return False
        return all_true(pc.is_finite(numbers))

    def type(self) -> pa.DataType:
        """float64 also where no cell had a value; digits that no integer type holds stay strings."""
        if self._seen and self._int64:
            return pa.int64()
        if self._seen and self._uint64:
            return pa.uint64()
        return pa.float64() if self._float64 and (self._fraction or not self._seen) else pa.string()


def _typed(cells: Any, kind: pa.DataType) -> Any:
    """Text as a type, missing cells as nulls."""
    numeric = kind != pa.string()
    text = pc.ascii_trim_whitespace(cells) if numeric else cells
    missing = pc.is_in(text, pa.array(NUMBER_NULLS if numeric else NULLS))
    return cast(pc.if_else(missing, None, text), kind, "cell")


class Csv(Input):
    """Delimited text, with or without a header, types inferred from all of its rows.

    Columns become int64, uint64, float64 or string, whichever is the first to hold every cell; an empty cell is
    null (in numeric columns NA, NULL, NaN and the like too). Multi-valued columns become lists of the same types,
    and there a missing cell is an empty list and a missing element is left out. Quotes have a meaning except where
    the separator is a tab.

    Parameters
    ----------
    sep : str, optional
        One character; without it the one that the first lines agree on.
    header : bool, optional
        Whether the first line holds names; without it, yes if no cell of it is empty or a number. Without a header
        the columns are called f0, f1, ...
    lists : mapping of str to str
        Multi-valued columns and what separates their elements.
    """

    def __init__(
        self,
        files: Sequence[str],
        sep: str | None = None,
        header: bool | None = None,
        lists: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(files)
        self._lists = dict(lists or {})
        heads = []
        for path in self.files:
            lines = head(path)
            if not lines:
                raise errors.Corrupt("the file is empty", remedy="leave it out", file=path)
            self._sep = sep or _separator(lines)
            first = next(csv.reader(lines, **self._dialect()))
            is_header = header
            if is_header is None:
                is_header = len(set(first)) == len(first) and not any(
                    c in NULLS or casts(c, pa.float64()) for c in first
                )
            heads.append((is_header, first if is_header else [f"f{i}" for i in range(len(first))]))
            if heads[-1] != heads[0]:
                raise errors.SchemaMismatch(
                    f"columns are {listed(heads[-1][1])}, and {listed(heads[0][1])} in {self.files[0]}",
                    remedy="convert these files apart",
                    file=path,
                )
        self.header, self.names = heads[0]
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise errors.Unsupported("two columns have the same name", remedy="rename one", file=path, column=twice)
        for name in self._lists:
            if name not in self.names:
                raise errors.UnknownColumn(
                    f"no such column; there are {listed(self.names)}",
                    remedy="correct --list",
                    file=self.files[0],
                    column=name,
                )

    def _dialect(self) -> dict[str, Any]:
        if self._sep == "\t":
            return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        return {"delimiter": self._sep}

    def scan(self, advance: Advance) -> None:
        self.n_rows = 0
        kinds = {name: _Kind() for name in self.names}
        for path in self.files:
            for _, batch in self._text(path, advance):
                self.n_rows += batch.num_rows
                for name, cells in zip(self.names, batch.columns, strict=True):
                    if name in self._lists:
                        cells = self._elements(cells, self._lists[name]).flatten()
                    kinds[name].see(cells)
        types = {name: kind.type() for name, kind in kinds.items()}
        self.schema = pa.schema([(n, pa.list_(t) if n in self._lists else t) for n, t in types.items()])

    def batches(self, advance: Advance) -> Batches:
        for path in self.files:
            for row, batch in self._text(path, advance):
                columns = []
                for field, cells in zip(self.schema, batch.columns, strict=True):
                    try:
                        columns.append(self._column(field, cells))
                    except Malformed as e:
                        raise errors.Corrupt(
                            e.problem, remedy=e.remedy, file=path, line=row + e.at, column=field.name
                        ) from e
                yield pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _column(self, field: pa.Field, cells: Any) -> Any:
        if field.name not in self._lists:
            return _typed(cells, field.type)
        parts = self._elements(cells, self._lists[field.name])
        values = _typed(parts.flatten(), field.type.value_type)
        n_kept = np.concatenate([[0], np.cumsum(values.is_valid().to_numpy(False))])
        return list_array(values.drop_null(), n_kept[parts.offsets.to_numpy() - parts.offsets[0].as_py()])

    @staticmethod
    def _elements(cells: Any, sep: str) -> Any:
        return pc.split_pattern(cells, sep) if sep.strip() else pc.ascii_split_whitespace(cells)

    def _text(self, path: str, advance: Advance) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of string cells, each with the number of its first row in the file (the header is row 1)."""
        wrong: list[Any] = []

        def reject(row: Any) -> str:
            wrong.append(row)
            return "error"

        tab = self._sep == "\t"
        names = None if self.header else self.names
        with opened(path, advance) as stream:
            quotes = _Quotes(stream)
            try:
                reader = pacsv.open_csv(
                    pa.PythonFile(quotes, mode="r"),
                    read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_NBYTES, column_names=names),
                    parse_options=pacsv.ParseOptions(
                        delimiter=self._sep,
                        quote_char=False if tab else '"',
                        newlines_in_values=not tab,
                        invalid_row_handler=reject,
                    ),
                    convert_options=pacsv.ConvertOptions(
                        column_types={name: pa.string() for name in self.names}, strings_can_be_null=False
                    ),
                )
                row, last = 1 + self.header, ""
                for batch in reader:
                    yield row, batch
                    row += batch.num_rows
                    last = batch.column(batch.num_columns - 1)[-1].as_py() if batch.num_rows else last
                if not tab and quotes.n % 2 and "\n" in last:  # the reader takes the rest of the file as one cell
                    raise pa.ArrowInvalid("a quote is left open")
            except pa.ArrowInvalid as e:
                if wrong:
                    raise errors.Corrupt(
                        f"{wrong[0].actual_columns} cells, not {wrong[0].expected_columns}",
                        remedy="correct the line, or name its --sep or --format",
                        file=path,
                        line=wrong[0].number,
                    ) from e
                if "Empty CSV" in str(e):
                    return
                remedy = "re-encode the file as UTF-8" if "UTF8" in str(e) else "close the quote, or name the --format"
                raise errors.Corrupt(f"not valid CSV: {e}", remedy=remedy, file=path) from e


class _Quotes(io.RawIOBase):
    """A stream that counts the quotes that pass."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self.n = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.n += data.count(b'"')
        return data


class Criteo(Csv):
    """Raw Criteo click logs: tab-separated ``label, i1..i13, c1..c26`` without a header, empty where missing."""

    must_scan = False
    label = "label"
    NAMES = ("label", *(f"i{i}" for i in range(1, 14)), *(f"c{i}" for i in range(1, 27)))

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files, sep="\t", header=False)
        if len(self.names) != len(self.NAMES):
            raise errors.SchemaMismatch(
                f"{len(self.names)} columns, and raw Criteo data has 40", remedy="use --format tsv", file=self.files[0]
            )
        self.names = list(self.NAMES)
        kinds = [pa.int64()] + [pa.float64()] * 13 + [pa.string()] * 26
        self.schema = pa.schema(list(zip(self.names, kinds, strict=True)))

    def scan(self, advance: Advance) -> None:
        self.n_rows = sum(batch.num_rows for path in self.files for _, batch in self._text(path, advance))


def _separator(lines: list[str]) -> str:
    """The separator that stands equally often in all lines; else the one that the first line has most of."""
    counts = {}
    for sep in SEPARATORS:
        n = [len(row) for row in csv.reader(lines, delimiter=sep)]
        if n[0] > 1 and len(set(n)) == 1:
            return sep
        counts[sep] = n[0]
    best = max(counts, key=lambda sep: counts[sep])
    return best if counts[best] > 1 else ","

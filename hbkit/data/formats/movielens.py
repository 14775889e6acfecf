"""MovieLens-1M."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data.formats.input import (
    Advance,
    Batches,
    Input,
    Malformed,
    all_true,
    line_blocks,
    opened,
    parsed,
    whole_numbers,
)
from hbkit.data.formats.parquet import ParquetFiles

__all__ = ["MovieLens"]


class MovieLens(Input):
    """MovieLens-1M: a directory of ``ratings.dat`` (or ``ratings.parquet``), ``users.dat`` and ``movies.dat``.

    A rating of 4 or 5 is a click, of 1 or 2 none, and those of 3 are left out. The columns are ``label``, ``user``,
    ``item``, ``gender``, ``age``, ``occupation`` and the movie's ``genres``, a list of strings.
    """

    must_scan = False
    schema = pa.schema(
        [
            *((name, pa.int64()) for name in ("label", "user", "item")),
            ("gender", pa.string()),
            *((name, pa.int64()) for name in ("age", "occupation")),
            ("genres", pa.list_(pa.string())),
        ]
    )

    def __init__(self, directory: str) -> None:
        def find(*names: str) -> str:
            for name in names:
                if os.path.isfile(path := os.path.join(directory, name)):
                    return path
            raise errors.NotFound(
                f"no {' or '.join(names)} in the directory", remedy="name the MovieLens-1M directory", file=directory
            )

        self._ratings, self._users, self._movies = (
            find("ratings.dat", "ratings.parquet"),
            find("users.dat"),
            find("movies.dat"),
        )
        super().__init__([self._ratings])
        users = [(int(u), g, int(a), int(o)) for u, g, a, o, _ in _records(self._users, 5, (0, 2, 3))]
        movies = [(int(m), g.split("|")) for m, _, g in _records(self._movies, 3, (0,))]
        self._user = [pa.array(column) for column in zip(*users, strict=True)]
        self._movie = pa.array([m for m, _ in movies]), pa.array([g for _, g in movies], pa.list_(pa.string()))

    def scan(self, advance: Advance) -> None:
        self.n_rows = sum(batch.num_rows for batch in self.batches(advance))

    def batches(self, advance: Advance) -> Batches:
        for user, item, rating in self._triples(advance):
            keep = pc.not_equal(rating, 3)
            user, item, rating = user.filter(keep), item.filter(keep), rating.filter(keep)
            u, m = pc.index_in(user, self._user[0]), pc.index_in(item, self._movie[0])
            for key, found, path in ((user, u, self._users), (item, m, self._movies)):
                if found.null_count:
                    lost = key.filter(found.is_null())[0]
                    raise errors.Corrupt(
                        f"{lost} is rated in {self._ratings} but not listed", remedy="fetch the data again", file=path
                    )
            label = pc.cast(pc.greater_equal(rating, 4), pa.int64())
            columns = [label, user, item, *(column.take(u) for column in self._user[1:]), self._movie[1].take(m)]
            yield pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _triples(self, advance: Advance) -> Iterator[tuple[Any, Any, Any]]:
        """User, movie and rating, int64."""
        if self._ratings.endswith(".parquet"):
            for batch in ParquetFiles([self._ratings]).batches(advance):
                try:
                    columns = [batch[name].cast(pa.int64()) for name in ("user_id", "movie_id", "rating")]
                except KeyError as e:
                    raise errors.UnknownColumn(
                        "no such column", remedy="ratings.parquet needs user_id, movie_id and rating",
                        file=self._ratings, column=e.args[0],
                    ) from e  # fmt: skip
                if any(column.null_count for column in columns):
                    raise errors.NullFound("a rating has nulls", remedy="leave the row out", file=self._ratings)
                yield columns[0], columns[1], columns[2]
            return
        for line, lines in line_blocks(self._ratings, advance):
            batch = parsed(self._ratings, line, lines, self._parse)
            yield batch[0], batch[1], batch[2]

    @staticmethod
    def _parse(lines: pa.StringArray) -> pa.RecordBatch:
        lines = pc.ascii_trim_whitespace(lines)
        parts = pc.split_pattern(lines, "::")
        if not all_true(pc.equal(pc.list_value_length(parts), 4)):
            raise Malformed("the line is not user::movie::rating::timestamp")
        flat = parts.flatten()
        columns = [
            whole_numbers(flat.take(pa.array(np.arange(i, len(flat), 4))), pa.int64(), what)
            for i, what in enumerate(("user", "movie", "rating"))
        ]
        return pa.RecordBatch.from_arrays(columns, ["user", "item", "rating"])


def _records(path: str, n_fields: int, numbers: tuple[int, ...]) -> Iterator[list[str]]:
    """The ``::``-separated records of one of MovieLens's small files, which are in Latin-1."""
    with opened(path) as stream:
        text = stream.read().decode("latin-1")
    for i, line in enumerate(text.splitlines(), start=1):
        fields = line.split("::")
        if len(fields) != n_fields or not all(fields[j].isdecimal() for j in numbers):
            raise errors.Corrupt(
                f"the line is not {n_fields} fields between '::'", remedy="fetch the data again", file=path, line=i
            )
        yield fields

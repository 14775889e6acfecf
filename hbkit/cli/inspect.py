"""``hbkit inspect``: what is in a file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from hbkit.cli import console
from hbkit.cli.snapshot import show_log
from hbkit.parquet.footer import CODECS, ENCODINGS

if TYPE_CHECKING:
    from hbkit.parquet import File

__all__ = ["inspect"]

_MANIFEST = re.compile(r"c[0-9]+\.json")  # of a commit
LENGTH_ROWS = 1_000_000  # list lengths are counted over the row groups that begin before this row


@dataclass
class _Column:
    """What the footers say of one column, summed over files."""

    type: str
    nbytes: int = 0
    n_nulls: int | None = 0
    decoders: set[str] = field(default_factory=set)
    codecs: set[str] = field(default_factory=set)
    encodings: set[str] = field(default_factory=set)


@click.command()
@click.argument("path", type=click.Path())
def inspect(path: str) -> None:
    """Show what is in PATH: a Parquet file, a directory or glob of them, or a snapshot.

    For Parquet: the columns (members of structures and maps by dotted names) with the type they are read as, what
    decodes them, bytes, nulls, codecs, encodings and list lengths, and what hbkit wrote into the metadata. For a
    snapshot: its commits.
    """
    if os.path.isdir(path) and any(_MANIFEST.fullmatch(name) for name in os.listdir(path)):
        show_log(path)
    else:
        _parquet(path)


def _parquet(path: str) -> None:
    from hbkit.parquet import File, list_files

    files = [File(name) for name in list_files(path)]
    n_rows = sum(file.n_rows for file in files)
    groups = [rows for file in files for rows in file.row_group_rows]
    facts: dict[str, object] = {
        "files": len(files),
        "rows": n_rows,
        "row groups": f"{console.count(len(groups))}, of {_span(groups)} rows" if groups else 0,
        "size": console.size(sum(file.source.nbytes for file in files)),
    }
    pairs = [{k: v for k, v in file.metadata.items() if k.startswith("hbkit.")} for file in files]
    for name in dict.fromkeys(name for file in pairs for name in file):
        values = list(dict.fromkeys(file[name] for file in pairs if name in file))
        facts[name] = values[0] if len(values) == 1 else f"{len(values)} different values"
    console.summary(path, facts)

    columns: dict[str, _Column] = {}
    for file in files:
        _add(columns, file)
    lengths, n_read = _lengths(files)
    rows = [
        (
            name,
            c.type,
            c.nbytes,
            "?" if c.n_nulls is None else c.n_nulls,
            " ".join(sorted(c.decoders)) or "-",
            " ".join(sorted(c.codecs)) or "-",
            " ".join(sorted(c.encodings)) or "-",
            lengths.get(name, "-"),
        )
        for name, c in columns.items()
    ]
    header = ("column", "type", "bytes", "nulls", "decoder", "codec", "encodings", "list lengths (min mean max)")
    console.note("")
    console.table("", header, rows)
    if lengths and n_read < n_rows:
        console.note(f"List lengths are of the first {console.count(n_read)} rows.")


def _add(columns: dict[str, _Column], file: File) -> None:
    """Sum up one file's column chunks."""
    for name, kind in file.schema.items():
        text = "list<" * kind.ragged_rank + (kind.logical or kind.dtype) + ">" * kind.ragged_rank
        column = columns.setdefault(name, _Column(text))
        if column.type != text:
            column.type = "differs between the files"
        if kind.unsupported:
            column.type = f"unreadable: {kind.unsupported}"
            column.n_nulls = None
            continue
        column.decoders.add(file.decoded_by(name))
        for chunk in file.chunks(name):
            column.nbytes += chunk.nbytes
            column.codecs.add(CODECS[chunk.codec])
            column.encodings.update(ENCODINGS.get(e, f"encoding {e}") for e in chunk.encodings)
            # In a list column the footer counts empty lists among the nulls.
            if kind.ragged_rank or chunk.n_nulls is None:
                column.n_nulls = None
            elif column.n_nulls is not None:
                column.n_nulls += chunk.n_nulls


def _lengths(files: list[File]) -> tuple[dict[str, str], int]:
    """Least, mean and greatest length of the lists of each ragged column, and the number of rows looked at."""
    from hbkit import Ragged
    from hbkit.parquet import Field

    seen: dict[str, list[int]] = {}  # min, sum, max
    n_read = 0
    for file in files:
        names = [n for n, kind in file.schema.items() if kind.ragged_rank and not kind.unsupported]
        for g, n in enumerate(file.row_group_rows):
            if n_read >= LENGTH_ROWS or not names:
                break
            n_read += n
            for name in names if n else ():
                column = file.read_row_group(g, [Field(name, null="empty")])[name]
                if isinstance(column, Ragged):
                    length = column.lengths()
                    least, total, most = seen.get(name, [int(length.min()), 0, 0])
                    seen[name] = [
                        min(least, int(length.min())),
                        total + int(length.sum()),
                        max(most, int(length.max())),
                    ]
    return {name: f"{a} {total / n_read:.1f} {b}" for name, (a, total, b) in seen.items()}, n_read


def _span(groups: list[int]) -> str:
    low, high = min(groups), max(groups)
    return console.count(low) if low == high else f"{console.count(low)} to {console.count(high)}"

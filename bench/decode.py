"""Decoding Parquet columns beside other readers, in nanoseconds a value.

``python bench/decode.py --data DIR --make ../shared/workloads/decode.py [--peers PYTHON] [--only lists_none,flat200]``

DIR holds the files that ``workloads/decode.py DIR`` writes; ``--make`` names that script, to write them if they are
absent. PYTHON is an interpreter that has the peers (`bench/README.md`), where this one has not. `contest.py` says how
times are taken. Caveats:

- Values are list elements, or rows times columns. Files are in the page cache: this is decoding, not reading disks.
- hbkit gives NumPy arrays, row splits in int64, and no nulls: it fills those of flat_null with 0. Peers give Arrow or
  their own arrays, row splits in int32, and a bitmap beside nulls; polars gives strings as views (pointers into the
  pages) rather than as offsets and bytes. Peers are not made to convert that: "polars as offsets" is for information.
- Files stay open between passes for hbkit and for pyarrow's batches: mapping a file costs as much as decoding some of
  them. polars and DuckDB open it in every pass, so that polars also gets the bytes in memory ("from memory").
- Batches are dropped as the next ones come, so that their memory is used again; "columns" are kept whole.
- "to ids": 64-bit hashes of the strings. pyarrow hashes no strings; polars' and DuckDB's hashes are not XXH64.
- The goal beside a ratio is what hbkit set itself for batches of 65,536 rows against the best peer, on one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import contest

Passes = Callable[[], Iterable[Any]]  # each call is one pass over the file, in pieces

ROWS = 65_536
WORKLOADS = {  # file, goal
    "lists_none": ("lists_none", 9.0),
    "lists_dict_snappy": ("lists_dict_snappy", 8.0),
    "lists_snappy": ("lists_snappy", 4.5),
    "lists_plain_snappy": ("lists_plain_snappy", 4.0),
    "lists_zstd": ("lists_zstd", 2.7),
    "flat200": ("flat200", 5.5),
    "flat_float": ("flat_float", 3.5),
    "flat_null": ("flat_null", 4.0),
    "strings_dict": ("strings_dict", 1.7),
    "strings_dict_ids": ("strings_dict", 4.0),
    "strings_plain": ("strings_plain", 2.0),
    "strings_plain_ids": ("strings_plain", 2.0),
}
OURS = ("hbkit batches", "hbkit batches of 4096", "hbkit columns")
HASHING = ("polars", "duckdb")


def fields(path: str, ids: bool) -> list[Any]:
    """All columns, as hbkit is asked for them."""
    from hbkit.data import Dataset, Field

    kinds = Dataset.from_parquet(path).schema.items()
    how = {"hash_to": "int64"} if ids else {"null": "default", "default": 0} if "flat_null" in path else {}
    return [Field(name, **how) for name, _ in kinds]


def hbkit_batches(path: str, ids: bool, threads: int, rows: int = ROWS) -> Passes:
    from hbkit.data import Dataset

    ds = Dataset.from_parquet(path, fields(path, ids), num_parallel_decodes=threads).batch(rows)
    return lambda: ds


def hbkit_batches_of_4096(path: str, ids: bool, threads: int) -> Passes:
    return hbkit_batches(path, ids, threads, 4096)


def hbkit_columns(path: str, ids: bool, threads: int) -> Passes:
    from hbkit.parquet import read_columns

    columns = fields(path, ids)
    return lambda: iter([read_columns(path, columns)])


def pyarrow_table(path: str, ids: bool, threads: int) -> Passes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(threads)
    return lambda: iter([pq.read_table(path, use_threads=threads > 1, memory_map=True)])


def pyarrow_batches(path: str, ids: bool, threads: int) -> Passes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(threads)
    file = pq.ParquetFile(path, memory_map=True)
    return lambda: file.iter_batches(ROWS, use_threads=threads > 1)


def _lazy(path: str, ids: bool) -> Any:
    import polars as pl

    frame = pl.scan_parquet(path)
    return frame.select(pl.all().hash(0)) if ids else frame


def polars(path: str, ids: bool, threads: int) -> Passes:
    import polars as pl

    if ids:
        return lambda: iter([pl.read_parquet(path).select(pl.all().hash(0))])
    return lambda: iter([pl.read_parquet(path)])


def polars_from_memory(path: str, ids: bool, threads: int) -> Passes:
    import io

    import polars as pl

    data = Path(path).read_bytes()
    if ids:
        return lambda: iter([pl.read_parquet(io.BytesIO(data)).select(pl.all().hash(0))])
    return lambda: iter([pl.read_parquet(io.BytesIO(data))])


def polars_streaming(path: str, ids: bool, threads: int) -> Passes:
    return lambda: iter([_lazy(path, ids).collect(engine="streaming")])


def polars_batches(path: str, ids: bool, threads: int) -> Passes:
    return lambda: _lazy(path, ids).collect_batches(chunk_size=ROWS, maintain_order=True, engine="streaming")


def polars_as_offsets(path: str, ids: bool, threads: int) -> Passes:
    import polars as pl

    return lambda: iter([pl.read_parquet(path).to_arrow(compat_level=pl.CompatLevel.oldest())])


def _query(path: str, ids: bool, threads: int) -> Any:
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"set threads={threads}")
    return lambda: connection.sql(f"select {'hash(columns(*))' if ids else '*'} from '{path}'")


def duckdb_table(path: str, ids: bool, threads: int) -> Passes:
    query = _query(path, ids, threads)
    return lambda: iter([query().to_arrow_table(ROWS)])


def duckdb_batches(path: str, ids: bool, threads: int) -> Passes:
    query = _query(path, ids, threads)
    return lambda: query().to_arrow_reader(ROWS)


def duckdb_numpy(path: str, ids: bool, threads: int) -> Passes:
    query = _query(path, ids, threads)
    return lambda: iter([query().fetchnumpy()])


def fastparquet(path: str, ids: bool, threads: int) -> Passes:
    from fastparquet import ParquetFile

    return lambda: iter([ParquetFile(path).to_pandas()])


def n_values(piece: Any) -> int:
    """Values in what any contender gives: list elements, or rows times columns."""
    if isinstance(piece, dict):  # hbkit, and DuckDB's arrays
        return sum(len(getattr(column, "values", column)) for column in piece.values())
    if hasattr(piece, "get_columns"):  # polars
        return sum(int(c.list.len().sum()) if hasattr(c.dtype, "inner") else len(c) for c in piece.get_columns())
    if hasattr(piece, "iloc"):  # pandas
        return piece.size
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = (pa.types.is_list, pa.types.is_large_list)
    return sum(len(pc.list_flatten(c)) if any(f(c.type) for f in lists) else len(c) for c in piece.columns)


def contenders(workload: str) -> list[str]:
    """Who can do a workload; the slow ways of strings and lists, by Python objects, are left out."""
    peers = ["pyarrow table", "pyarrow batches", "polars", "polars from memory", "polars streaming", "polars batches"]
    peers += ["duckdb table", "duckdb batches"]
    if workload.endswith("_ids"):
        peers = [p for p in peers if p.startswith(HASHING)] + ["duckdb numpy"]
    elif workload.startswith("flat"):
        peers += ["duckdb numpy", "fastparquet"]
    elif workload.startswith("strings"):
        peers += ["polars as offsets"]
    return [*OURS, *peers]


def main() -> None:
    """Print a table of one line for each workload, and each workload's figures as a JSON line."""
    ap = contest.arguments(__doc__)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--make", type=Path, help="workloads/decode.py")
    ap.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    ap.add_argument("--only", default=",".join(WORKLOADS), help="workloads, with commas between")
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(a.threads)
        file, _ = WORKLOADS[a.only]
        make = globals()[a.contender.replace(" ", "_")]
        contest.best(make(str(a.data / f"{file}.parquet"), a.only.endswith("_ids"), a.threads), n_values)
        return
    only = a.only.split(",")
    if a.make and not all((a.data / f"{WORKLOADS[w][0]}.parquet").exists() for w in only):
        subprocess.run([sys.executable, a.make, a.data], check=True)
    peers = contest.versions(a.peers, ("pyarrow", "polars", "duckdb", "fastparquet"))
    contest.machine(threads=a.threads, clock=a.clock, rounds=a.rounds, **peers)
    print(f"\nns/value{'':12}batches  of 4096  columns    best peer{'':16} ratios to it              goal", flush=True)
    for workload in only:
        options = "--only", workload, "--data", str(a.data), "--threads", str(a.threads)
        commands = {
            name: contest.itself(sys.executable if name in OURS else a.peers, __file__, name, *options)
            for name in contenders(workload)
        }
        figures = contest.take_turns(commands, a.rounds)
        others = [name for name in figures if name not in OURS]
        goal = WORKLOADS[workload][1]
        n = figures[OURS[0]][0]["n"]
        ns = {name: round(contest.median(figures, name, a.clock) / n * 1e9, 3) for name in figures}
        ratios = {name: round(contest.ratio(figures, name, others, a.clock), 2) for name in OURS}
        fastest = min(others, key=ns.get)
        print(
            f"{workload:18}" + "".join(f"{ns[o]:9.2f}" for o in OURS) + f"{ns[fastest]:9.2f} {fastest:18}"
            + "".join(f"{ratios[o]:7.2f}x" for o in OURS) + f"{goal:9.1f}x",
            flush=True,
        )  # fmt: skip
        print(json.dumps({"workload": workload, "values": n, "goal": goal, "ratio": ratios, "ns": ns}), flush=True)


if __name__ == "__main__":
    main()

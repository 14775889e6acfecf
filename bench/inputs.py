"""The same click log as Parquet, TFRecord and CSV: bytes on disk, and samples/s of what reads each.

``python bench/inputs.py DATA [--rounds 3] [--clock cpu]``

DATA holds clicks.parquet, clicks.tfrecord and clicks.csv of ``../shared/workloads/clicks.py --tfrecord --csv``. A pass
reads 13 float32, 26 int64 and the label of all rows once, in batches of 4,096, by one thread; `contest.py` says how
times are taken. Caveats:

- hbkit trains from Parquet. TFRecord and CSV pass `hbkit.data.convert` once, which reads every column and writes
  Parquet: its figure is of both.
- tf.data parses TFRecord batch by batch with ``parse_example``, and CSV with ``CsvDataset``, as Keras users do; its
  threads are as many as it chooses among one core's. Under ``--clock cpu`` the CPU time of all of them counts.
- Parquet's and TFRecord's files hold a list column too, which CSV does not: its part of Parquet's is shown.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import contest

DENSE, SPARSE = [f"d{i}" for i in range(13)], [f"s{i}" for i in range(26)]
BATCH = 4096
CONTENDERS = ("hbkit parquet", "hbkit tfrecord", "hbkit csv", "pyarrow parquet", "tf.data tfrecord", "tf.data csv")


def passes(name: str, data: Path) -> Callable[[], Iterable[Any]]:
    """Batches of one way to read, or what was written."""
    who, form = name.split()
    path = str(data / f"clicks.{form}")
    if who == "hbkit" and form == "parquet":
        import hbkit

        return lambda: hbkit.data.Dataset.from_parquet(path, fields=[*DENSE, *SPARSE, "label"]).batch(BATCH)
    if who == "hbkit":
        from hbkit.data.convert import convert

        def converted() -> Iterable[Any]:
            with tempfile.TemporaryDirectory(dir=data) as out:
                yield convert([path], out, format=form, compression="snappy")

        return converted
    if who == "pyarrow":
        import pyarrow.parquet as pq

        columns = [*DENSE, *SPARSE, "label"]
        return lambda: pq.ParquetFile(path).iter_batches(BATCH, columns=columns, use_threads=False)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if form == "csv":
        kinds = [tf.float32] * 13 + [tf.int64] * 26 + [tf.float32]
        return lambda: tf.data.experimental.CsvDataset(path, kinds, header=True).batch(BATCH)
    spec = {name: tf.io.FixedLenFeature([], tf.float32) for name in [*DENSE, "label"]}
    spec |= {name: tf.io.FixedLenFeature([], tf.int64) for name in SPARSE}
    return lambda: tf.data.TFRecordDataset(path).batch(BATCH).map(lambda raw: tf.io.parse_example(raw, spec))


def n_rows(piece: Any) -> int:
    """Rows of what a pass yields."""
    if hasattr(piece, "n_rows"):
        return int(piece.n_rows)
    if hasattr(piece, "num_rows"):
        return int(piece.num_rows)
    return len(piece["label"] if isinstance(piece, dict) else piece[0])


def main() -> None:
    """Print bytes of each file, and samples/s of each contender."""
    ap = contest.arguments(__doc__)
    ap.add_argument("data", type=Path)
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(1)
        contest.best(passes(a.contender, a.data), n_rows, least=1)
        return
    import pyarrow.parquet as pq

    contest.machine(clock=a.clock, rounds=a.rounds, **contest.versions(sys.executable, ("pyarrow", "tensorflow-cpu")))
    footer = pq.ParquetFile(a.data / "clicks.parquet").metadata
    columns = [footer.row_group(g).column(i) for g in range(footer.num_row_groups) for i in range(footer.num_columns)]
    lists = sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("hist"))
    sizes = {form: os.path.getsize(a.data / f"clicks.{form}") for form in ("parquet", "tfrecord", "csv")}
    print(json.dumps({"nbytes": sizes, "of Parquet in the list column": lists, "rows": footer.num_rows}))
    commands = {name: contest.itself(sys.executable, __file__, name, str(a.data)) for name in CONTENDERS}
    found = contest.take_turns(commands, a.rounds)
    for name in found:
        rate = footer.num_rows / contest.median(found, name, a.clock)
        over = contest.ratio(found, "hbkit parquet", [name], a.clock)
        print(f"{name:18}{rate:14,.0f} samples/s   Parquet through hbkit is {over:6.1f} times as fast")
    print(json.dumps({name: round(footer.num_rows / contest.median(found, name, a.clock)) for name in found}))


if __name__ == "__main__":
    main()

"""HybridBackend's published comparison, run again: 200 int64 columns of 0..99, on one thread, in rows a second.

``python bench/hybridbackend.py --peers PYTHON [--rows 400000]``

HybridBackend reported reading 259 times as fast as tensorflow-io's Parquet reader and 22 times as fast as CSV through
tf.data. It builds only with TensorFlow 1.15, so it is its peers that run here, on the same data and machine as hbkit,
and its two ratios are what hbkit must exceed. PYTHON is an interpreter with TensorFlow 2.16 and tensorflow-io
(`bench/README.md`). `contest.py` says how times are taken. Caveats:

- Files are in the page cache. Parquet is what pyarrow writes when asked for nothing else: snappy, dictionaries.
- The peers are sampled: CSV reads a tenth of the rows, tensorflow-io a hundredth. Their cost is by the row, and what
  they need to start a pass is not counted against them: their clock starts at the first batch.
- CSV is read in two ways, lines parsed by the batch, as HybridBackend's benchmark did, and CsvDataset; the better
  counts. tensorflow-io knows one way: rows one by one, batched by tf.data.
- "hbkit" ends in NumPy arrays and "hbkit.tensorflow" in tensors, as the peers do.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contest

N_COLUMNS, BATCH = 200, 65_536
OURS = ("hbkit", "hbkit.tensorflow")
GOALS = {"tensorflow-io": 259.0, "csv": 22.0}
PEERS = {"tensorflow-io": ("tensorflow-io",), "csv": ("csv lines", "csv dataset")}


def write(out: Path, rows: int) -> None:
    """The same rows as Parquet for hbkit, and fewer of them for the peers."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    table = pa.table({f"c{i}": rng.integers(0, 100, rows) for i in range(N_COLUMNS)})
    pq.write_table(table, out / "flat.parquet", row_group_size=100_000)
    pq.write_table(table.slice(0, rows // 100), out / "sample.parquet")
    pacsv.write_csv(table.slice(0, rows // 10), out / "sample.csv", pacsv.WriteOptions(include_header=False))


def hbkit_passes(name: str, data: Path) -> Callable[[], Any]:
    """Batches of all columns, on one thread."""
    if name == "hbkit":
        from hbkit import data as adapter
    else:
        from hbkit.tensorflow import data as adapter
    return lambda: adapter.Dataset.from_parquet(data / "flat.parquet").batch(BATCH)


def peer_passes(name: str, data: Path) -> Callable[[], Any]:
    """The peers' batches, also on one thread."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    zeros = [tf.constant(0, tf.int64)] * N_COLUMNS
    # Small batches, so that a sample has many of them: larger ones are no faster.
    if name == "tensorflow-io":
        import tensorflow_io as tfio

        ds = tfio.IODataset.from_parquet(str(data / "sample.parquet")).batch(256)
    elif name == "csv lines":
        ds = tf.data.TextLineDataset(str(data / "sample.csv")).batch(2048)
        ds = ds.map(lambda lines: tf.io.decode_csv(lines, zeros))
    else:
        ds = tf.data.experimental.CsvDataset(str(data / "sample.csv"), zeros).batch(2048)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    ds = ds.with_options(options)
    return lambda: iter(ds)


def one(name: str, data: Path) -> None:
    """A contender's process: its best rate, as JSON."""
    passes = (hbkit_passes if name in OURS else peer_passes)(name, data)
    rates: dict[str, list[float]] = {"wall": [], "cpu": []}
    began = time.perf_counter()
    while len(rates["wall"]) < 4 or (time.perf_counter() - began < 2 and name in OURS):
        clocks, rows = (time.perf_counter(), time.process_time()), 0
        for k, batch in enumerate(passes()):
            if name not in OURS and k == 0:
                clocks = time.perf_counter(), time.process_time()
                continue
            first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
            rows += len(first)
        rates["wall"].append((time.perf_counter() - clocks[0]) / rows)
        rates["cpu"].append((time.process_time() - clocks[1]) / rows)
    print(json.dumps({clock: min(r[1:]) for clock, r in rates.items()}))


def main() -> None:
    """Print a table of both ratios, and the figures as JSON."""
    ap = contest.arguments(__doc__)
    ap.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    ap.add_argument("--rows", type=int, default=400_000)
    ap.add_argument("--data", type=Path, help="keep the files here, instead of writing them for this run")
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(1)
        one(a.contender, a.data)
        return
    contest.machine(clock=a.clock, rounds=a.rounds, **contest.versions(a.peers, ("tensorflow-cpu", "tensorflow-io")))
    with tempfile.TemporaryDirectory() as scratch:
        data = a.data or Path(scratch)
        data.mkdir(parents=True, exist_ok=True)
        write(data, a.rows)
        commands = {
            name: contest.itself(sys.executable if name in OURS else a.peers, __file__, name, "--data", str(data))
            for name in (*OURS, *(way for ways in PEERS.values() for way in ways))
        }
        figures = contest.take_turns(commands, a.rounds)
    rates = {name: round(1 / contest.median(figures, name, a.clock)) for name in figures}
    ratios = {}
    print(f"\n{'':18}{'rows/s':>12}" + "".join(f"{'over ' + p:>22}" for p in PEERS))
    for name in figures:
        cells = []
        for peer, ways in PEERS.items() if name in OURS else ():
            ratios[f"{name} over {peer}"] = r = round(contest.ratio(figures, name, ways, a.clock), 1)
            cells.append(f"{r:.1f}x (goal {GOALS[peer]:.0f}x)")
        print(f"{name:18}{rates[name]:12,}" + "".join(f"{c:>22}" for c in cells))
    print(json.dumps({"rows_s": rates, "ratio": ratios, "goal": GOALS}))


if __name__ == "__main__":
    main()

"""From a file that appears to its effect in another process, and what a reader pays for a delta.

``python bench/follow.py DIRECTORY [--rows 1000000] [--files 20] [--publish-every 1s] [--reader-rows 5000000]``

A trainer (``hbkit train --follow``, PyTorch, a DLRM) learns a table of so many rows of dim 16 from one file. Then files
of 10,000 rows are renamed into its directory one by one, at random moments, each with one key that is new. This process
follows the snapshot (`hbkit.snapshot.follow`, polling every 0.1 s) and looks for that key in its own table every 2 ms.
Caveats:

- "published" is the time of the manifest, "seen" when the key has a row here: between them is the follower alone.
- The trainer looks at its directory every 0.2 s and commits as soon as the interval since the last commit is over, so
  half an interval and 0.1 s are what waiting alone takes in the middle.
- The reader's part has no trainer: a table is saved, 1% of its rows are changed and saved as a delta, a
  `hbkit.serving.Reader` refreshes; "anew" opens another one, which is what a refresh that reads the whole chain does.
  Lookups of the refreshed reader and of the new one take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hbkit.embedding import Adagrad, Table
from hbkit.serving import Reader
from hbkit.snapshot import follow, save
from hbkit.store.line import Chunk

DIM, FILE_ROWS, BATCH = 16, 10_000, 8192
POLL = 0.1


def write(into: Path, name: str, keys: Any, rng: Any) -> None:
    """A file that appears at once."""
    columns = {"y": rng.integers(0, 2, len(keys)), "x": rng.random(len(keys), np.float32), "user": keys}
    pq.write_table(pa.table(columns), into.parent / name)
    os.rename(into.parent / name, into / name)


def end_to_end(path: Path, n_rows: int, n_files: int, interval: str) -> None:
    """Print how long files take."""
    rng, into, out = np.random.default_rng(0), path / "in", path / "model"
    into.mkdir(parents=True)
    write(into, "first.parquet", rng.permutation(n_rows), rng)
    options = {"label": "y", "model": "dlrm", "dim": DIM, "batch-size": BATCH, "publish-every": interval}
    command = [sys.executable, "-m", "hbkit.cli", "train", "--follow", into, "--save", out]
    command += [x for name, value in options.items() for x in (f"--{name}", value)]
    trainer = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    table, stop = Table("user", DIM, key_dtype="int64", optimizer=Adagrad(lr=0.05)), threading.Event()
    follower = follow(out, [table])
    thread = threading.Thread(target=follower.run, args=(POLL, stop))
    thread.start()
    try:
        while len(table) < n_rows:
            assert trainer.poll() is None and thread.is_alive()
            time.sleep(0.1)
        time.sleep(2)
        seen, published = [], []
        for i in range(n_files):
            time.sleep(random.random() * 2)
            new = n_rows + i
            keys = rng.integers(0, n_rows, FILE_ROWS)
            keys[rng.integers(FILE_ROWS)] = new
            write(into, f"{i:05d}.parquet", keys, rng)
            since, asked = time.time(), np.array([new])
            while not table.store.has(asked)[0]:
                assert trainer.poll() is None and thread.is_alive()
                time.sleep(0.002)
            seen.append(time.time() - since)
            published.append((out / f"{follower.commit}.json").stat().st_mtime - since)
    finally:
        stop.set()
        thread.join()
        trainer.terminate()
        assert trainer.wait() == 0
    print(f"{n_files} files of {FILE_ROWS:,} rows, a table of {n_rows:,} rows, published every {interval}:")
    for what, seconds in (("published", published), ("seen", seen)):
        print(f"  {what:9}  median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s")


def readers(path: Path, n_rows: int) -> None:
    """Print what a delta costs a reader."""
    rng, table = np.random.default_rng(0), Table("t", DIM, optimizer=Adagrad())

    def put(keys: Any, step: int) -> None:
        for first in range(0, len(keys), 65_536):
            key = keys[first : first + 65_536]
            lines = rng.random((len(key), DIM), np.float32)
            table.store.put(Chunk(key, np.ones_like(key), np.full_like(key, step), lines, lines))
        table.step = step

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    put(np.arange(n_rows), 1)
    save(path, [table], 1)
    before, started = resident(), time.perf_counter()
    reader = Reader(path)
    print(f"a reader of {n_rows:,} rows: {time.perf_counter() - started:.2f} s, {resident() - before:.0f} MiB")
    walls, cpus = [], []
    for step in range(2, 32):
        new = n_rows + step * n_rows // 1000
        put(np.append(np.unique(rng.integers(0, n_rows, n_rows // 110)), np.arange(new, new + n_rows // 1000)), step)
        save(path, [table], step, base="latest")
        wall, cpu = time.perf_counter(), time.process_time()
        reader.refresh()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    print(
        f"  a delta of 1%: median {statistics.median(walls):.3f} s ({statistics.median(cpus):.3f} s of CPU), worst"
        f", which makes room, {max(walls):.2f} s; {resident() - before:.0f} MiB after {len(walls)}"
    )
    started = time.perf_counter()
    anew = Reader(path)
    print(f"  anew: {time.perf_counter() - started:.2f} s")
    for n in (1, 1000, 100_000):
        keys, best = rng.integers(0, n_rows, n), {"refreshed": 1e9, "anew": 1e9}
        for _ in range(20):
            for name, which in (("refreshed", reader), ("anew", anew)):
                started = time.perf_counter()
                for _ in range(max(1, 10_000 // n)):
                    which.lookup("t", keys)
                best[name] = min(best[name], (time.perf_counter() - started) / max(1, 10_000 // n))
        print(f"  lookup of {n:,} keys: " + ", ".join(f"{name} {x * 1e6:.1f} us" for name, x in best.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--publish-every", default="1s")
    parser.add_argument("--reader-rows", type=int, default=5_000_000)
    args = parser.parse_args()
    for part, run in (
        ("online", lambda path: end_to_end(path, args.rows, args.files, args.publish_every)),
        ("reader", lambda path: readers(path, args.reader_rows)),
    ):
        path = args.directory / f"hbkit-follow-{part}"
        shutil.rmtree(path, ignore_errors=True)
        run(path)
        shutil.rmtree(path)


if __name__ == "__main__":
    main()

"""Lines that a store in host memory gives a tier above and takes back, beside a copy of as many bytes.

``python bench/below.py [--rows 1000000] [--lines 270000] [--dim 128] [--dtype float32] [--rounds 7]``

A table with Adam (lines of 3 * dim floats); `--lines` random rows of it are read in parts as a device tier brings them
(16 MiB each), and written back so. A figure is the median over rounds, CPU time that of all threads; a ratio is the
median over rounds of the time beside the copy's in the same round, wall and CPU.

Caveats:

- "copy" is memcpy from one array to another, by as many threads; both have been written before.
- "gather, metadata" and "put" are what a tier had to use instead, without what it copied beside.
- Rows narrower than float32 are fewer bytes in the table than outside.
- Takes rows * dim * 12 bytes and three times the lines' bytes of memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from hbkit._ext.segment import retained
from hbkit._ext.share import n_threads
from hbkit.embedding import Adam, Table
from hbkit.parquet.threads import Threads
from hbkit.store import host_memory
from hbkit.store.line import Chunk

PART_NBYTES = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--lines", type=int, default=270_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    store = Table("t", args.dim, optimizer=Adam(), dtype=args.dtype, store=host_memory()).store
    n, width, dim = min(args.lines, args.rows), store.layout.width, args.dim
    some = rng.standard_normal((65_536, width)).astype(np.float32)
    for first in range(0, args.rows, len(some)):
        keys = np.arange(first, min(args.rows, first + len(some))) * 7919
        store.write(keys, some[: len(keys)], np.ones(len(keys), np.int64), np.ones(len(keys), np.int64))

    keys = rng.permutation(args.rows)[:n] * 7919
    lines, other = retained((n, width)), retained((n, width))  # which begin with a cache line, as pinned memory does
    lines[:], other[:] = 1, 1
    freq, last_step = np.ones(n, np.int64), np.full(n, 2)
    at, part = np.arange(n), max(1, PART_NBYTES // (4 * width))
    threads = Threads(n_threads())
    parts = [slice(first, min(n, first + part)) for first in range(0, n, part)]

    def leased() -> object:
        return store.reserve(keys, freq)

    def copy() -> None:
        for p in parts:
            near, far = lines[p], other[p]
            cuts = [slice(len(near) * i // 8, len(near) * (i + 1) // 8) for i in range(8)]
            threads.each(lambda s, near=near, far=far: np.copyto(near[s], far[s]), cuts)

    def read() -> None:
        lease = leased()
        for p in parts:
            store.read(lease, at[p], lines[p], freq[p], last_step[p])

    def gather() -> None:
        for p in parts:
            lease = store.reserve(keys[p], freq[p])
            store.gather(lease, lines[p])
            freq[p], last_step[p] = store.metadata(keys[p])

    def write() -> None:
        for p in parts:
            store.write(keys[p], other[p], freq[p], last_step[p])

    def put() -> None:
        for p in parts:
            store.put(Chunk(keys[p], freq[p], last_step[p], other[p, :dim], other[p, dim:]))

    contenders: dict[str, Callable[[], object]] = {
        "copy": copy, "reserve": leased, "read": read, "gather, metadata": gather, "write": write, "put": put,
    }  # fmt: skip
    seconds = np.empty((args.rounds, len(contenders), 2))
    for i in range(-1, args.rounds):  # the first touches what is to be touched
        for j, call in enumerate(contenders.values()):
            begin = time.perf_counter(), time.process_time()
            call()
            seconds[i, j] = time.perf_counter() - begin[0], time.process_time() - begin[1]
    ratio = np.median(seconds / seconds[:, :1], axis=0)
    median = np.median(seconds, axis=0)
    print(f"{args.rows:,} rows of dim {dim} in {args.dtype}, {n:,} lines of {4 * width:,} bytes")
    for j, name in enumerate(contenders):
        wall, cpu = median[j]
        gbs = n * width * 4 / wall / 1e9
        print(f"{name:17} {1e3 * wall:7.1f} ms {gbs:6.1f} GB/s  {1e3 * cpu:7.1f} ms CPU   "
              f"{ratio[j, 0]:5.2f} {ratio[j, 1]:5.2f} of the copy")  # fmt: skip


if __name__ == "__main__":
    main()

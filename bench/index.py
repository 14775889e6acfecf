"""dedupe beside torch.unique and numpy.unique; find, insert and memory of an index of 20 million keys. One thread.

``python bench/index.py [--keys 20000000] [--tables 2] [--rounds 40] [--only dedupe|index]``

All contenders run in this one process and take turns; a figure is the best of the rounds, a ratio the median over
rounds of the ratio within a round, both in CPU time. Caveats:

- torch and NumPy sort (torch hashes, in some versions), and their result is in another order; NumPy's counts are not
  asked for. "dedupe" is all that `hbkit.shuffle.dedupe` gives, counts too. Peers allocate their results anew; hbkit
  takes them from its pool, so glibc is told to keep what is freed, which spares the peers the page faults.
- Keys are scattered over 64 bits, as hashes are: torch is faster on small integers in order of frequency, by a third.
- find rotates among the tables so that no cache holds their buckets; keys are drawn evenly. "beside" is two threads,
  each with half of the keys; on a machine that others use, CPU time shows at least whether they hinder each other.
- "insert" begins with an empty index: most of it is the kernel clearing new pages and shards that grow. "into room" is
  into an index made for that many keys, and "dense" such an index once it holds so many that a key costs 16 bytes, at
  load 0.8; the others have the load that growing left them with.
"""

from __future__ import annotations

import argparse
import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hbkit._ext import index as ext
from hbkit._ext import isa

BATCH, VOCABULARY, TURN = 65_536, 2_000_000, 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def scatter(values: np.ndarray) -> np.ndarray:
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)


def take_turns(contenders: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds a batch of every contender in every round.

    A turn is TURN batches, since the first finds caches full of another's data, and each round begins with another.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run = contenders[name]
            start = time.process_time()
            for j in range(i * TURN, (i + 1) * TURN):
                run(j)
            times[name].append((time.process_time() - start) / TURN)
    return {name: np.array(t[1:]) for name, t in times.items()}  # the first round warms up


def dedupe(rounds: int) -> None:
    rng = np.random.default_rng(0)
    zipf = np.cumsum(np.arange(1, VOCABULARY + 1) ** -1.05)
    laws = {
        "zipf 1.05": lambda: np.searchsorted(zipf, rng.random(BATCH) * zipf[-1]),
        "uniform": lambda: rng.integers(0, VOCABULARY, BATCH),
    }
    for law, draw in laws.items():
        batches = [scatter(draw()) for _ in range(16)]
        contenders = {
            "dedupe": lambda i, b=batches: ext.dedupe(b[i % 16]),
            "no counts": lambda i, b=batches: ext.dedupe(b[i % 16], "int64", False),
            "no counts, int32": lambda i, b=batches: ext.dedupe(b[i % 16], "int32", False),
            "numpy": lambda i, b=batches: np.unique(b[i % 16], return_inverse=True),
        }
        try:
            import torch
        except ImportError:
            print("torch is not installed")
        else:
            torch.set_num_threads(1)
            contenders["torch"] = lambda i, b=batches: torch.unique(torch.from_numpy(b[i % 16]), return_inverse=True)
        times = take_turns(contenders, rounds)
        for name, t in times.items():
            ratios = [f"{np.median(times[p] / t):5.1f}x {p}" for p in ("torch", "numpy") if p in times and p != name]
            print(f"{law:10} {name:18} {BATCH / t.min() / 1e6:6.1f} M keys/s  {'  '.join(ratios)}")


def beside(tables: list[ext.Index], batches: list[np.ndarray]) -> float:
    """CPU time of one thread that does all, by that of the slower of two that halve it."""

    def seconds(parts: int) -> float:
        spent = [0.0] * parts

        def run(part: int) -> None:
            out = np.empty(BATCH // parts, np.int64)
            start = time.thread_time()
            for i, keys in enumerate(batches):
                tables[i % len(tables)].find(keys[part * len(out) : (part + 1) * len(out)], out)
            spent[part] = time.thread_time() - start

        threads = [threading.Thread(target=run, args=(i,)) for i in range(parts)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return max(spent)

    return min(seconds(1) for _ in range(9)) / min(seconds(2) for _ in range(9))


def index(n_keys: int, n_tables: int, rounds: int) -> None:
    rng = np.random.default_rng(1)
    tables, most, seconds = [], 0.0, []
    for t in range(n_tables):
        table = ext.Index()
        for first in range(0, n_keys, BATCH):
            keys = scatter(np.arange(first, min(first + BATCH, n_keys)) + t * n_keys)
            start = time.process_time()
            table.find_or_insert(keys)
            seconds.append(time.process_time() - start)
            if len(table) > 1_000_000:
                most = max(most, table.nbytes / len(table))
        tables.append(table)
    print(
        f"insert     {n_tables * n_keys / sum(seconds) / 1e6:6.1f} M keys/s, longest batch {max(seconds) * 1e3:.1f} ms"
    )
    print(f"memory     {tables[0].nbytes / n_keys:6.2f} bytes a key, {most:.2f} at the most above a million keys")

    room, seconds = ext.Index(n_keys), []
    for first in range(0, n_keys * 4 // 5, BATCH):
        keys = scatter(np.arange(first, first + BATCH))
        start = time.process_time()
        room.find_or_insert(keys)
        seconds.append(time.process_time() - start)
    print(f"into room  {BATCH / np.median(seconds) / 1e6:6.1f} M keys/s in the median batch")
    dense = [room] + [ext.Index(n_keys) for _ in tables[1:]]
    for d in dense:
        while d.nbytes > 16.02 * len(d) and len(d) < 2 * n_keys:
            d.find_or_insert(scatter(np.arange(len(d), len(d) + BATCH)))
    print(f"dense      {dense[0].nbytes / len(dense[0]):6.2f} bytes a key with {len(dense[0])} keys")

    held = [scatter(rng.integers(0, n_keys, BATCH) + i % n_tables * n_keys) for i in range(rounds)]
    absent = [scatter(rng.integers(0, n_keys, BATCH) + n_tables * n_keys) for i in range(rounds)]
    within = [scatter(rng.integers(0, len(dense[0]), BATCH)) for i in range(rounds)]
    out = np.empty(BATCH, np.int64)
    times = take_turns(
        {
            "find": lambda i: tables[i % n_tables].find(held[i % rounds], out),
            "dense": lambda i: dense[i % n_tables].find(within[i % rounds], out),
            "absent": lambda i: tables[i % n_tables].find(absent[i % rounds], out),
        },
        rounds,
    )
    for name, t in times.items():
        print(f"{name:10} {BATCH / t.min() / 1e6:6.1f} M keys/s, {BATCH / np.median(t) / 1e6:.1f} in the median")
    print(f"beside     {beside(tables, held):6.2f}x by two threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=20_000_000)
    parser.add_argument("--tables", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", choices=("dedupe", "index"))
    args = parser.parse_args()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    print(f"instruction set {isa.name()}")
    if args.only != "index":
        dedupe(args.rounds)
    if args.only != "dedupe":
        index(args.keys, args.tables, args.rounds)


if __name__ == "__main__":
    main()

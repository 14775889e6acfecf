"""One table in host memory grown to very many keys: seconds, and bytes a key.

``python bench/scale.py [--keys 100000000] [--dim 16] [--rows 65536]``

Keys are distinct and in no order; each batch is a lookup that makes its rows. SGD, so that no state lies beside a row.
The peak is the process's own, interpreter and libraries included; "longest" is the slowest batch, in which the table
grows the most. Then as many lookups of random keys that are there.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import contest
import numpy as np

from hbkit.embedding import SGD, Table


def batch(first: int, n: int) -> np.ndarray:
    """Keys number first..first+n-1 of a fixed sequence of distinct ones: int64[n]."""
    # an odd multiplier is a bijection of 64 bits
    return (np.arange(first, first + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def main() -> None:
    """Print one JSON line for every tenth of the keys, and one at the end."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--keys", type=int, default=100_000_000)
    ap.add_argument("--dim", type=int, default=16)
    ap.add_argument("--rows", type=int, default=65_536)
    a = ap.parse_args()
    contest.machine(keys=a.keys, dim=a.dim)
    table = Table("scale", dim=a.dim, optimizer=SGD(lr=0.1))
    began, longest, told = time.perf_counter(), 0.0, 0
    for first in range(0, a.keys, a.rows):
        keys = batch(first, min(a.rows, a.keys - first))
        start = time.perf_counter()
        table.lookup(keys, train=True)
        longest = max(longest, time.perf_counter() - start)
        if len(table) * 10 // a.keys > told:
            told = len(table) * 10 // a.keys
            report(table, "made", time.perf_counter() - began, longest)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, a.keys, min(a.keys, 200 * a.rows), dtype=np.uint64)
    known = (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    began, longest = time.perf_counter(), 0.0
    for first in range(0, len(known), a.rows):
        start = time.perf_counter()
        table.lookup(known[first : first + a.rows])
        longest = max(longest, time.perf_counter() - start)
    report(table, f"{len(known):,} looked up", time.perf_counter() - began, longest)


def report(table: Table, what: str, seconds: float, longest: float) -> None:
    """Print where the table stands."""
    stats = table.stats()
    per_key = {k: round(v / len(table), 1) for k, v in stats.items() if k.endswith("_nbytes")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                "what": what, "keys": len(table), "seconds": round(seconds, 1), "longest_ms": round(longest * 1e3, 1),
                "bytes a key": per_key, "peak_gib": round(peak, 2),
            }
        ),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""One table grown to very many keys: seconds, and bytes a key.

``python bench/scale.py [--keys 100000000] [--dim 16] [--rows 65536]``, in host memory
``python bench/scale.py --keys 50000000 --ssd DIRECTORY [--budget 1GiB]``, on disk

Keys are distinct and in no order; each batch is a lookup that makes its rows. In host memory with SGD, so that no state
lies beside a row; on disk with Adagrad and without metadata. The peak is the process's own, "above" what it had before
the table was opened; "longest" is the slowest batch, in which the table grows the most. Then lookups of random keys
that are there; and on disk a commit, steps of training and another one.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import contest
import numpy as np

from hbkit.embedding import SGD, Adagrad, Collection, Table, lookahead
from hbkit.store import cached_ssd

STEPS = 10


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
    ap.add_argument("--ssd", type=Path)
    ap.add_argument("--budget", default="1GiB")
    a = ap.parse_args()
    contest.machine(keys=a.keys, dim=a.dim)
    if a.ssd is None:
        table = Table("scale", dim=a.dim, optimizer=SGD(lr=0.1))
    else:
        Table("warm", dim=a.dim, optimizer=Adagrad()).lookup(batch(0, a.rows), train=True)
        store = cached_ssd(a.ssd / "hbkit-scale", host_budget=a.budget)
        global _before
        _before = peak()
        table = Table("scale", dim=a.dim, optimizer=Adagrad(), store=store, metadata=False)
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
    numbers = rng.integers(0, a.keys, min(a.keys, (200 if a.ssd is None else 2 * STEPS) * a.rows), dtype=np.uint64)
    known = (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    began, longest = time.perf_counter(), 0.0
    for first in range(0, len(known), a.rows):
        start = time.perf_counter()
        table.lookup(known[first : first + a.rows])
        longest = max(longest, time.perf_counter() - start)
    report(table, f"{len(known):,} looked up", time.perf_counter() - began, longest)
    if a.ssd is not None:
        train(table, known[: STEPS * a.rows].reshape(STEPS, -1))
        table.close()
        shutil.rmtree(a.ssd / "hbkit-scale")


def train(table: Table, batches: np.ndarray) -> None:
    """A commit, as many steps as there are batches, and another one."""
    began = time.perf_counter()
    table.commit()
    report(table, "committed", time.perf_counter() - began, 0)
    collection, began = Collection([table], {"x": "scale"}), time.perf_counter()
    for _, staged in lookahead(({"x": keys} for keys in batches), collection, 4):
        staged.apply({"x": staged.outputs()["x"] * 0.1})
    report(table, f"{len(batches)} steps", time.perf_counter() - began, 0)
    began = time.perf_counter()
    table.commit()
    report(table, "committed", time.perf_counter() - began, 0)


def peak() -> float:
    """The most memory that the process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


_before = 0.0


def report(table: Table, what: str, seconds: float, longest: float) -> None:
    """Print where the table stands."""
    stats = table.stats()
    per_key = {k: round(v / len(table), 1) for k, v in stats.items() if k.endswith("_nbytes")}
    print(
        json.dumps(
            {
                "what": what, "keys": len(table), "seconds": round(seconds, 1), "longest_ms": round(longest * 1e3, 1),
                "bytes a key": per_key, "peak_gib": round(peak(), 2), "above_gib": round(peak() - _before, 2),
            }
        ),
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()

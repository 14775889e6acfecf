"""Calls that several threads share: a step over many tables, and over one, by numbers of threads.

``python bench/share.py [--threads 1,2] [--rows 4096] [--tables 26] [--dim 16] [--keys 200000] [--rounds 20]``

Every pass of a step, in wall and CPU time: "find" (distinct keys and their slots), "make" (new rows), "create" (stamp,
gather), "gather", "sum" with its look for NaN, "apply" (row-wise Adagrad). Keys are Zipf's (exponent 1.2). Then one
table with as many keys in one batch: `Table.lookup` and `Table.update`. Numbers of threads take turns within a round,
each with tables of its own; a figure is the least of the rounds, since what else runs on the machine only adds to it,
but for "make", whose rounds differ: it is the median. The last column is the wall time of the first number over the
last's.

Caveats:

- Threads gain nothing on a machine that is busy: a helper comes when the call is over. On Linux, root measures with
  ``chrt -f 10`` before the command.
- A figure of one step's pass alone: in training, frameworks' threads work in between.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hbkit._ext import share
from hbkit._ext.segment import retained
from hbkit.embedding import RowWiseAdagrad, Table
from hbkit.store.line import Int64s
from hbkit.store.together import Together


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    ap.add_argument("--rows", type=int, default=4096)
    ap.add_argument("--tables", type=int, default=26)
    ap.add_argument("--dim", type=int, default=16)
    ap.add_argument("--keys", type=int, default=200_000)
    ap.add_argument("--rounds", type=int, default=20)
    a = ap.parse_args()
    rng, rule = np.random.default_rng(0), RowWiseAdagrad(lr=0.05)
    tables = {n: [Table(f"t{i}", a.dim, optimizer=rule) for i in range(a.tables + 1)] for n in a.threads}
    outs = {n: retained((a.rows, a.tables * a.dim)) for n in a.threads}
    grads = rng.standard_normal((a.rows, a.tables * a.dim), np.float32)
    places, n_keys = [(0, i * a.dim) for i in range(a.tables)], a.rows * a.tables
    times: dict[str, dict[int, list[tuple[float, float]]]] = {}

    def timed(name: str, n: int, call: Callable[[], Any], count: int = n_keys) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        made = call()
        taken = (time.perf_counter() - wall) / count * 1e9, (time.process_time() - cpu) / count * 1e9
        times.setdefault(name, {}).setdefault(n, []).append(taken)
        return made

    def take_step(n: int, step: int, keys: list[Int64s]) -> None:
        share.use(n)
        *some, one = tables[n]
        batch = timed("find", n, lambda: Together([t.store for t in some], keys, places, [a.rows] * a.tables))
        timed("make", n, lambda: batch._make(list(range(a.tables))), max(sum(batch._batch.n_absent()), 1))
        timed("create", n, lambda: batch.create(step, [None] * a.tables, [outs[n]]))
        timed("gather", n, lambda: batch.gather([outs[n]]))
        timed("sum", n, lambda: batch.sum([grads]))
        timed("apply", n, lambda: batch.apply([rule] * a.tables, [rule.hyper(step)] * a.tables, step))
        together = np.concatenate(keys)
        one.lookup(together, train=True)
        timed("lookup", n, lambda: one.lookup(together))
        timed("update", n, lambda: one.update(together, grads.reshape(n_keys, a.dim)))

    for step in range(1, a.rounds + 1):
        keys = [rng.zipf(1.2, a.rows) % a.keys * 7919 for _ in range(a.tables)]
        for n in a.threads if step % 2 else reversed(a.threads):
            take_step(n, step, keys)

    print("threads:", *a.threads, "| ns a key, wall (CPU); make: ns a new row")
    for name, by_n in times.items():
        pick = statistics.median if name == "make" else min
        figures = [tuple(pick(column) for column in zip(*by_n[n], strict=True)) for n in a.threads]
        each = "  ".join(f"{wall:6.1f} ({cpu:.1f})" for wall, cpu in figures)
        print(f"{name:7}{each}   {figures[0][0] / figures[-1][0]:.2f}x")


if __name__ == "__main__":
    main()

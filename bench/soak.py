"""A table on SSD in use for a long time: whether memory stays within the budget, disk within bounds, files few.

``python bench/soak.py DIRECTORY [--minutes 60] [--budget 64MiB] [--rows 600000]``

Batches of keys whose favourites drift are trained with look-ahead; now and then the table evicts what was idle, is
committed, or is closed and opened again. Each line shows, of that moment: memory above that before the table was opened
(of the process, by the system), bytes on disk for each byte that lives, and open files. Fails where memory exceeds the
budget by more than 5%, disk twice the live bytes and a few segments, files a few hundred, or rows differ from those of
a table in memory that was trained alike.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hbkit.embedding import Adagrad, Collection, IdleSteps, Table, lookahead
from hbkit.store import cached_ssd, host_memory
from hbkit.store.cache import as_nbytes

BATCH, STEPS, DIM = 4096, 200, 16


def resident_nbytes() -> int:
    """Memory of this process, in bytes; what the allocator has free is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def batches(seed: int, n_rows: int) -> list[dict[str, np.ndarray]]:
    """STEPS batches of a window of keys that moves on with the seed."""
    rng = np.random.default_rng(seed)
    ranks = [(rng.pareto(0.6, BATCH) * 50).astype(np.int64) % n_rows for _ in range(STEPS)]
    return [{"x": (r * 2654435761 + seed // 10 * 40_000) % (2 * n_rows)} for r in ranks]


def train(table: Table, data: list[dict[str, np.ndarray]], ahead: int) -> None:
    """One pass."""
    collection = Collection([table], {"x": "t"})
    for _, staged in lookahead(data, collection, ahead):
        staged.apply({"x": staged.outputs()["x"] * 0.01 + 1e-3})


def contents(table: Table) -> int:
    """A number that any difference in rows, state or keys would change."""
    value = 0
    for chunk in table.store.scan():
        value = hash((value, *(np.ascontiguousarray(column).tobytes() for column in chunk)))
    return value


def main() -> None:
    """Run until the time is over; exit status 1 at the first failure."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("directory", type=Path)
    ap.add_argument("--minutes", type=float, default=60)
    ap.add_argument("--budget", default="64MiB")
    ap.add_argument("--rows", type=int, default=600_000)
    a = ap.parse_args()
    path, budget = a.directory / "hbkit-soak", as_nbytes(a.budget)
    shutil.rmtree(path, ignore_errors=True)

    def table(store: Any) -> Table:
        return Table("t", DIM, optimizer=Adagrad(), store=store, eviction=[IdleSteps(15 * STEPS)])

    twin = table(host_memory())
    end, seed = time.monotonic() + 60 * a.minutes, 0
    train(twin, batches(seed, a.rows), 8)
    contents(twin)
    twin.close()
    twin, before = table(host_memory()), 0
    ours: Table | None = None
    while time.monotonic() < end:
        if ours is None:
            before = resident_nbytes()
            ours = table(cached_ssd(path, host_budget=budget))
        data = batches(seed, a.rows)
        train(ours, data, 8)
        memory = resident_nbytes() - before  # before the twin grows
        stats, files = ours.stats(), len(os.listdir("/proc/self/fd"))
        train(twin, data, 0)
        before += resident_nbytes() - before - memory
        if ours.evict() != twin.evict():
            sys.exit("eviction differs from that in memory")
        if seed % 3 == 2:
            ours.commit()
        if seed % 10 == 9:
            if contents(ours) != contents(twin):
                sys.exit("rows differ from those in memory")
            ours.commit()
            ours.close()
            ours = None
        shown = {
            "pass": seed, "rows": stats["rows"], "memory_mib": round(memory / 2**20, 1),
            "of budget": round(memory / budget, 3), "counted": round(stats["host_nbytes"] / budget, 3),
            "space": round(stats["space_amplification"], 2), "writes": round(stats["write_amplification"], 2),
            "hit_rate": round(stats["hit_rate"], 3), "files": files,
        }  # fmt: skip
        print(json.dumps(shown), flush=True)
        if memory > 1.05 * budget:
            sys.exit(f"memory: {memory} of {budget} bytes")
        if stats["disk_nbytes"] > 2 * stats["live_nbytes"] + 2**26:
            sys.exit(f"disk: {stats['disk_nbytes']} bytes for {stats['live_nbytes']} that live")
        if files > 400:
            sys.exit(f"{files} open files")
        seed += 1
    shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()

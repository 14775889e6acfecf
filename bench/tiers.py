"""Training a table on SSD that is many times the cache, with and without look-ahead, beside one all in memory.

``python bench/tiers.py DIRECTORY [--rows 4000000] [--share 8] [--batch 4096] [--steps 300] [--rounds 3]``

Keys follow Zipf's law with exponent 1.05, scattered; dim 16 with Adagrad (128 bytes a line). The budget is such that
about 1/share of the rows are near. A step is what a user runs (`lookahead`: outputs, then apply) and some computing of
the step's own, without the GIL, as a framework's is, for so many milliseconds:

- "none": the disk alone decides. Rows a second from disk beside the disk's own random reads: 4 KiB at random places of
  the segment files past the system's cache, at the same depth.
- "alike": as long as a step without look-ahead waits for its rows.
- "covered": so long that the disk's random reads bring half as many rows again as are missed, so that look-ahead may
  hide all of it.

Contenders take turns within a round, each in this process, on the same rows; figures are medians over rounds, ratios
medians of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import contest
import numpy as np

from hbkit.embedding import Adagrad, Collection, Table, lookahead
from hbkit.store import cached_ssd, host_memory
from hbkit.store.disk import Disk, aligned

DIM, LINE, AHEAD, LOAD = 16, 128, 32, 65_536
BLOCK, DEPTH_READS = 4096, 20_000
WARM = 1 / 3  # of the steps, before the clock starts


def batches(n_keys: int, batch: int, steps: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Batches of one feature by Zipf's law."""
    share = np.cumsum(1 / np.arange(1, n_keys + 1) ** 1.05)
    place = np.random.default_rng(0).permutation(n_keys)
    rng = np.random.default_rng(seed + 1)
    return [{"x": place[np.searchsorted(share, rng.random(batch) * share[-1])]} for _ in range(steps)]


def table_of(store: Any, n_keys: int) -> Table:
    """A committed table of `n_keys` rows."""
    table = Table("t", DIM, optimizer=Adagrad(), store=store)
    for first in range(0, n_keys, LOAD):
        table.lookup(np.arange(first, min(n_keys, first + LOAD)), train=True)
    table.commit()
    return table


def compute(ms: float) -> None:
    """As long as a dense step that takes `ms`, without the GIL and on no core that hbkit could use."""
    if ms:
        time.sleep(ms / 1e3)


def train(table: Table, data: list[dict[str, np.ndarray]], ahead: int, ms: float) -> dict[str, float]:
    """Seconds a step, and what the store counted in them."""
    collection = Collection([table], {"x": "t"})
    n, warm, began, before = 0, int(len(data) * WARM), 0.0, {}
    for _, staged in lookahead(data, collection, ahead):
        if n == warm:
            began, before = time.perf_counter(), table.stats()
        rows = staged.outputs()["x"]
        compute(ms)
        staged.apply({"x": rows * 0.01})
        n += 1
    seconds = time.perf_counter() - began
    after = table.stats()
    counted = {k: after[k] - before[k] for k in ("misses", "hits", "ready_rows", "late_rows", "waited_s") if k in after}
    return {"seconds": seconds / (n - warm), **{k: v / (n - warm) for k, v in counted.items()}}


def raw_reads(directory: Path) -> float:
    """Random 4 KiB reads a second of the segment files, past the system's cache."""
    disk, rng = Disk(), np.random.default_rng()
    paths = [p for p in directory.rglob("segment-*") if p.stat().st_size >= BLOCK]
    handles = [disk.open(p, direct=True) for p in paths]
    try:
        which = rng.integers(0, len(paths), DEPTH_READS)
        blocks = np.array([p.stat().st_size // BLOCK for p in paths])[which]
        offsets = (rng.random(DEPTH_READS) * blocks).astype(np.int64) * BLOCK
        out, began = aligned(1000 * BLOCK), time.perf_counter()
        for first in range(0, DEPTH_READS, 1000):
            some = slice(first, first + 1000)
            lengths = np.full(1000, BLOCK)
            disk.read(np.array(handles, np.int32)[which[some]], offsets[some], lengths, out)
        return DEPTH_READS / (time.perf_counter() - began)
    finally:
        for handle in handles:
            disk.close(handle)
        disk.rest()


def main() -> None:
    """Print one JSON line for each contender of each round, and ratios at the end."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("directory", type=Path)
    ap.add_argument("--rows", type=int, default=4_000_000)
    ap.add_argument("--share", type=float, default=8)
    ap.add_argument("--batch", type=int, default=4096)
    ap.add_argument("--steps", type=int, default=300)
    ap.add_argument("--rounds", type=int, default=3)
    a = ap.parse_args()
    contest.machine(rows=a.rows, share=a.share, batch=a.batch, dim=DIM)
    path = a.directory / "hbkit-tiers"
    shutil.rmtree(path, ignore_errors=True)
    budget = int(a.rows * 25 + a.rows / a.share * 260 + 22 * 2**20)
    near = table_of(host_memory(), a.rows)
    table = table_of(cached_ssd(path, host_budget=budget), a.rows)
    print(json.dumps({"cache_lines": table.stats()["cache_lines"], "host_nbytes": table.stats()["host_nbytes"]}))
    ratios: dict[str, list[float]] = {}
    try:
        for i in range(a.rounds):
            draw = (batches(a.rows, a.batch, a.steps, 10 * i + k) for k in range(10))  # new keys for each run
            raw = raw_reads(path)
            none = [run("none", table, next(draw), ahead, 0, raw) for ahead in (0, AHEAD)]
            waits = none[0]["waited_s"] * 1e3
            alike = [run("alike", table, next(draw), ahead, waits, raw) for ahead in (0, AHEAD)]
            raw = raw_reads(path)
            ms = none[0]["misses"] / raw * 1.5e3
            covered = run("covered", table, next(draw), AHEAD, ms, raw)
            host = run("host", near, next(draw), 0, ms, raw)
            for name, ratio in (
                ("rows from disk, of its random reads", none[1]["misses"] / none[1]["seconds"] / raw),
                ("with look-ahead over without, alike", alike[0]["seconds"] / alike[1]["seconds"]),
                ("of all in memory, where the disk covers the misses", host["seconds"] / covered["seconds"]),
                ("rows ready when the step before ends", 1 - covered["late_rows"] / sum(asked_for(covered))),
            ):
                ratios.setdefault(name, []).append(ratio)
    finally:
        table.close()
        shutil.rmtree(path, ignore_errors=True)
    for name, found in ratios.items():
        print(json.dumps({name: round(statistics.median(found), 4), "rounds": [round(r, 4) for r in found]}))


def asked_for(found: dict[str, float]) -> tuple[float, float]:
    """Rows that were ready, and that were not."""
    return found["ready_rows"], found["late_rows"]


def run(what: str, table: Table, data: list[dict[str, np.ndarray]], ahead: int, ms: float, raw: float) -> Any:
    """`train`, printed."""
    found = train(table, data, ahead, ms)
    shown = {k: float(f"{v:.4g}") for k, v in found.items()}
    print(json.dumps({"what": what, "ahead": ahead, "ms": round(ms, 2), "raw_reads": round(raw), **shown}), flush=True)
    return found


if __name__ == "__main__":
    main()

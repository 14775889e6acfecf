"""End to end, from a Parquet file to batches of torch tensors, in rows a second: hbkit beside what users do without it.

``python bench/loaders.py --loaders ../shared/peers/loaders.py --data clicks.parquet [--peers PYTHON]``

LOADERS holds the peers' readers, each a function of (path, batch size, threads), and clicks.parquet is what
``workloads/clicks.py`` (``--make``) writes: 13 float32, 26 int64, label, and one list column. PYTHON has the peers and
torch (`bench/README.md`). `contest.py` says how times are taken. Caveats:

- Batches of 4,096 and of 65,536 rows, in file order and shuffled within windows of 65,536, on one and two threads. Only
  hbkit promises the same order whatever the threads; it also shuffles row groups.
- Hugging Face datasets copies the file into its own uncompressed Arrow cache before the clock starts, and maps that:
  it decodes nothing. So there are two ratios: to the best peer, and to the best one that reads Parquet.
- With two threads hbkit may read row groups or decode columns in parallel; the better way counts, as for peers.
- The goal for hbkit's second thread, 1.9 times one, needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import contest

WINDOW = 65_536
HBKIT = {1: ("hbkit",), 2: ("hbkit reads", "hbkit decodes")}
PEERS = {"in order": ("pyarrow", "polars", "duckdb", "datasets"), "shuffled": ("pyarrow_shuffled", "polars_shuffled")}
SECOND_THREAD = 1.9


def hbkit_passes(name: str, order: str, path: str, size: int, threads: int) -> Callable[[], Iterable[Any]]:
    """Batches of hbkit's Dataset for PyTorch."""
    from hbkit.torch import data

    how = {
        "hbkit": {},
        "hbkit reads": {"num_parallel_reads": threads},
        "hbkit decodes": {"num_parallel_decodes": threads},
    }

    def passes() -> Iterable[Any]:
        ds = data.Dataset.from_parquet(path, **how[name])
        return (ds.shuffle(0, WINDOW) if order == "shuffled" else ds).batch(size)

    return passes


def peer_passes(name: str, loaders: str, path: str, size: int, threads: int) -> Callable[[], Iterable[Any]]:
    """Batches of one of the readers in the file of peers."""
    import pyarrow as pa

    pa.set_cpu_count(threads)
    spec = importlib.util.spec_from_file_location("peers", loaders)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = getattr(module, f"read_{name}")
    return lambda: read(path, size, threads)


def main() -> None:
    """Print a line for each batch size, order and number of threads, and each contest's figures as JSON."""
    ap = contest.arguments(__doc__)
    ap.add_argument("--loaders", type=Path, required=True)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--make", type=Path, help="workloads/clicks.py")
    ap.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    ap.add_argument("--sizes", default="4096,65536", help="rows of a batch")
    ap.add_argument("--orders", default=",".join(PEERS))
    ap.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(a.threads)
        import torch

        torch.set_num_threads(a.threads)
        size = int(a.sizes)
        if a.contender.startswith("hbkit"):
            passes = hbkit_passes(a.contender, a.orders, str(a.data), size, a.threads)
        else:
            passes = peer_passes(a.contender, str(a.loaders), str(a.data), size, a.threads)
        contest.best(passes, lambda batch: len(batch["label"]))
        return
    if a.make and not a.data.exists():
        subprocess.run([sys.executable, a.make, a.data.parent], check=True)
    versions = contest.versions(a.peers, ("torch", "pyarrow", "polars", "duckdb", "datasets"))
    contest.machine(clock=a.clock, rounds=a.rounds, **versions)
    print(f"\n{'rows/s':28}{'hbkit':>12}{'best peer':>24}   ratio   of Parquet readers   second thread")
    with tempfile.TemporaryDirectory() as scratch:
        for size in a.sizes.split(","):
            for order in a.orders.split(","):
                contend(a, size, order, scratch)


def contend(a: argparse.Namespace, size: str, order: str, scratch: str) -> None:
    """One batch size and order, on one thread and on two in the same rounds."""
    counts = HBKIT if a.clock == "wall" else (1,)  # CPU time cannot tell what a second thread gains
    options = ["--loaders", str(a.loaders.resolve()), "--data", str(a.data.resolve()), "--sizes", size]
    commands = {
        f"{name} x{threads}": contest.itself(
            a.peers if name in PEERS[order] else sys.executable,
            __file__, name, *options, "--orders", order, "--threads", str(threads),
        )
        for threads in counts
        for name in (*HBKIT[threads], *PEERS[order])
    }  # fmt: skip
    figures = contest.take_turns(commands, a.rounds, scratch)  # datasets puts its cache into the working directory
    rates = {c: round(f[0]["n"] / contest.median(figures, c, a.clock)) for c, f in figures.items()}
    ratios = {}
    for threads in counts:
        mine = max((f"{name} x{threads}" for name in HBKIT[threads]), key=rates.get)
        peers = [f"{p} x{threads}" for p in PEERS[order] if f"{p} x{threads}" in figures]
        readers = [p for p in peers if not p.startswith("datasets")]
        fastest = max(peers, key=rates.get)
        ratios[mine] = {
            "best peer": round(contest.ratio(figures, mine, peers, a.clock), 2),
            "best Parquet reader": round(contest.ratio(figures, mine, readers, a.clock), 2),
        }
        second = ""
        if threads == 2:
            ratios[mine]["one thread"] = round(contest.ratio(figures, mine, ["hbkit x1"], a.clock), 2)
            second = f"{ratios[mine]['one thread']:.2f}x (goal {SECOND_THREAD}x)"
        print(
            f"{order}, {size} rows, x{threads}".ljust(28) + f"{rates[mine]:12,}{rates[fastest]:12,} {fastest:16}"
            f"{ratios[mine]['best peer']:6.2f}x{ratios[mine]['best Parquet reader']:19.2f}x   {second}",
            flush=True,
        )  # fmt: skip
    print(json.dumps({"order": order, "batch": int(size), "rows_s": rates, "ratio": ratios}), flush=True)


if __name__ == "__main__":
    main()

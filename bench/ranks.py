"""How much more two ranks get done than one, each with one core: DeepFM on synthetic clicks, through the pipeline.

``python bench/ranks.py [--ranks 2] [--wire float32] [--dim 16] [--batch 16384] [--steps 30] [--rounds 3]``

Each rank is a process over torch.distributed (Gloo), bound to a core of its own with all its threads, and takes its
part of one Parquet file: ``--batch`` rows a step and rank. Sizes take turns within a round; medians over rounds. A
machine whose cores share caches or memory gives two processes less than twice one's speed: ``alone`` runs as many
single ranks at the same time, which exchange nothing, and so is the ceiling. Where other work shares the cores, only
the time of a core says something.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM = 5


def work(a: argparse.Namespace) -> None:
    """One rank: the seconds that its steps took after the warm-up, and those of its core."""
    rank, size, core = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["CORE"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    import torch

    import hbkit.torch as hb
    from hbkit.data import Dataset
    from hbkit.embedding import Adagrad, Collection, Normal, Table

    torch.set_num_threads(1)
    schema = Dataset.from_parquet(a.data).schema
    sparse = [name for name, kind in schema.items() if kind.dtype == "int64" and name != "label"]
    dense = [name for name in schema if name not in (*sparse, "label")]
    ds = Dataset.from_parquet(a.data, ["label", *dense, *sparse], shard=(rank, size)).supervised("label").batch(a.batch)
    width = hb.models.DeepFM.row_dim(a.dim)
    tables = [Table(name, width, initializer=Normal(0, 0.01), optimizer=Adagrad(lr=0.05)) for name in sparse]
    embeddings = Collection(tables, stack=hb.models.DeepFM.stack(sparse))
    if size > 1:
        embeddings = hb.distributed.shard(embeddings, wire=a.wire, timeout=120)
    torch.manual_seed(0)
    trainer = hb.training.Trainer(hb.models.DeepFM(sparse, a.dim, len(dense)), embeddings)
    ends: list[tuple[float, float]] = []
    trainer.fit(ds, lambda n_rows, loss: ends.append((time.perf_counter(), time.process_time())))
    print(json.dumps([end - start for start, end in zip(ends[WARM - 1], ends[WARM + a.steps - 1], strict=True)]))
    sys.stdout.flush()
    os._exit(0)


def rate(a: argparse.Namespace, size: int, alone: bool) -> tuple[float, float]:
    """Rows a second of all processes together, and milliseconds of a core that a step of one takes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(size):
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CORE": str(rank)}
        env |= {"RANK": "0", "WORLD_SIZE": "1"} if alone else {"RANK": str(rank), "WORLD_SIZE": str(size)}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--data", a.data]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE))
    spent = [json.loads(p.communicate(timeout=a.limit)[0]) for p in processes]
    return sum(a.steps * a.batch / wall for wall, _ in spent), statistics.mean(cpu for _, cpu in spent) / a.steps * 1e3


def main() -> None:
    """Print a line for each number of ranks."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ranks", default="2")
    ap.add_argument("--wire", default="float32")
    ap.add_argument("--dim", type=int, default=16)
    ap.add_argument("--batch", type=int, default=16384)
    ap.add_argument("--steps", type=int, default=30)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--limit", type=float, default=240)
    ap.add_argument("--data", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if "RANK" in os.environ:
        work(a)
        return
    sizes = [int(n) for n in a.ranks.split(",")]
    figures: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as d:
        from hbkit.data.synth import synthesize

        a.data = str(Path(d) / "clicks.parquet")
        synthesize(a.data, max(sizes) * a.batch * (a.steps + WARM + 2), 0, "criteo")
        for _ in range(a.rounds):
            for size, alone in [(1, True), *((n, alone) for n in sizes for alone in (False, True))]:
                figures.setdefault((size, alone), []).append(rate(a, size, alone))
    one = figures[1, True]
    for (size, alone), measured in figures.items():
        gains = [rows / alone_rows for (rows, _), (alone_rows, _) in zip(measured, one, strict=True)]
        rows, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        print(
            f"{size} {'alone' if alone else 'ranks'}: {rows:10,.0f} rows/s, {statistics.median(gains):.2f} of one "
            f"({min(gains):.2f}-{max(gains):.2f}); {cpu:.1f} ms of a core a step"
        )


if __name__ == "__main__":
    main()

"""Saving a table while it is trained: a delta beside a full save, the pause, and what steps cost meanwhile.

``python bench/background.py DIRECTORY [--rows 5000000] [--rounds 3] [--law zipf]``

A table of dim 32 with Adagrad in host memory. Caveats:

- A step is `Table.lookup` in training of 26,624 keys (1,024 samples of 26 features) and `Table.update`, nothing else:
  a model between them would only hide what a save costs. Most keys of the "uniform" law are changed for the first time
  since the point, so that nearly every row of a step is set aside; by Zipf's law, few are.
- "wall" is the median step; "cpu" the training thread's own CPU time of a median step, which other work on the machine
  disturbs less: it has what setting aside costs, but not the waiting for locks and for Python's, nor for a core where
  there are fewer than two. Steps with and without a save take turns, one save a round.
- A save in the background rests three times as long as it works (`hbkit.snapshot.saving.REST`).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIM, SAMPLES, FEATURES = 32, 1024, 26


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, seconds, and CPU seconds of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the figures."""
    import numpy as np

    from hbkit.embedding import Adagrad, Table
    from hbkit.snapshot import save

    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("directory", type=Path)
    ap.add_argument("--rows", type=int, default=5_000_000)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--law", choices=("zipf", "uniform"), default="zipf")
    args = ap.parse_args()

    rng, n, batch = np.random.default_rng(0), args.rows, SAMPLES * FEATURES
    ids = np.arange(n) * 0x1E3779B97F4A7C15  # scattered
    share = np.cumsum(1 / np.arange(1, n + 1) ** 1.05) if args.law == "zipf" else np.arange(1, n + 1.0)
    order = rng.permutation(n)
    batches = [ids[order[np.searchsorted(share, rng.random(batch) * share[-1])]] for _ in range(64)]
    grads = rng.standard_normal((batch, DIM)).astype(np.float32)
    table = Table("t", DIM, optimizer=Adagrad(lr=0.05))
    for first in range(0, n, 200_000):
        table.lookup(ids[first : first + 200_000], train=True)
    done = 0

    def step() -> tuple[float, float]:
        nonlocal done
        keys, done = batches[done % len(batches)], done + 1
        wall, cpu = time.perf_counter(), time.thread_time()
        table.lookup(keys, train=True)
        table.update(keys, grads)
        return time.perf_counter() - wall, time.thread_time() - cpu

    for round_ in range(args.rounds):
        path = args.directory / f"background-{round_}"
        shutil.rmtree(path, ignore_errors=True)
        _, full, full_cpu = timed(lambda path=path: save(path, [table], done))
        changed = rng.permutation(ids)[: n // 100]
        for part in np.array_split(changed, 1 + len(changed) // batch):
            table.lookup(part, train=True)
            table.update(part, np.ones((len(part), DIM), np.float32))
        _, delta, delta_cpu = timed(lambda path=path: save(path, [table], done, base="latest"))
        print(f"full save {full:.2f} s, cpu {full_cpu:.2f}; delta of 1% {delta:.3f} s, cpu {delta_cpu:.3f}: ", end="")
        print(f"{delta / full:.1%} of it, cpu {delta_cpu / full_cpu:.1%}")

        alone = [step() for _ in range(64)]
        saving, pause, _ = timed(lambda path=path: save(path, [table], done, background=True))
        during = []
        while not saving.done:
            during.append(step())
        saving.wait()
        alone += [step() for _ in range(64)]
        wall, cpu = (statistics.median(column) for column in zip(*alone, strict=True))
        wall_, cpu_ = (statistics.median(column) for column in zip(*during, strict=True))
        total, total_ = sum(w for w, _ in alone) / len(alone), sum(w for w, _ in during) / len(during)
        print(f"  {args.law}: a step {wall * 1e3:.2f} ms, cpu {cpu * 1e3:.2f}; of {len(during)} during a save ", end="")
        print(f"{wall_ * 1e3:.2f} ms ({wall_ / wall - 1:+.1%}), cpu {cpu_ * 1e3:.2f} ({cpu_ / cpu - 1:+.1%}); ", end="")
        print(f"mean wall {total_ / total - 1:+.1%}, longest {max(during)[0] * 1e3:.1f} ms; ", end="")
        print(f"save() returned after {pause * 1e3:.1f} ms", flush=True)
        shutil.rmtree(path)


if __name__ == "__main__":
    main()

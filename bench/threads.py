"""Two threads in one table beside two processes with a table each: how much of a second core threads make use of.

``python bench/threads.py [--rounds 9] [--seconds 0.5] [--dim 16] [--batch 65536] [--keys 2000000]``

Threads look up evenly drawn keys with `Table.lookup`, or update them with `Table.update` (row-wise Adagrad), for some
time; what they get done is counted, in wall time. A round measures, one after the other: a reader alone, an updater
alone, two readers, a reader beside an updater; and the same pairs as one thread in each of two processes, which share
nothing but the machine: the ceiling. A speed-up is the sum of what each of the two gets done, as a share of what it
does alone; medians over rounds, within a round. On a machine whose cores are busy otherwise the ceiling is below 2, and
only the share of it says something about hbkit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

BATCHES = 16


def worker(pipe: Connection, seed: int, a: argparse.Namespace) -> None:
    """A process with a table: runs the threads it is asked for, and answers with the batches that each has done."""
    from hbkit._ext import share
    from hbkit.embedding import RowWiseAdagrad, Table

    share.use(1)  # it is the callers' threads that are counted
    rng = np.random.default_rng(seed)
    table = Table("t", a.dim, optimizer=RowWiseAdagrad(lr=0.05))
    scattered = rng.permutation(a.keys) * 0x9E3779B97F4A7C1 + seed
    for first in range(0, a.keys, a.batch):
        table.lookup(scattered[first : first + a.batch], train=True)
    batches = [[scattered[rng.integers(0, a.keys, a.batch)] for _ in range(BATCHES)] for _ in range(2)]
    grad = np.full((a.batch, a.dim), 1e-4, np.float32)

    def run(number: int, work: str, until: float, done: list[int]) -> None:
        while time.perf_counter() < until:
            keys = batches[number][done[number] % BATCHES]
            if work == "read":
                table.lookup(keys)
            else:
                table.update(keys, grad)
            done[number] += 1

    pipe.send("ready")
    while works := pipe.recv():
        done, until = [0, 0], time.perf_counter() + a.seconds
        threads = [threading.Thread(target=run, args=(i, w, until, done)) for i, w in enumerate(works)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        pipe.send([n / (time.perf_counter() - until + a.seconds) for n in done[: len(works)]])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--seconds", type=float, default=0.5)
    ap.add_argument("--dim", type=int, default=16)
    ap.add_argument("--batch", type=int, default=65_536)
    ap.add_argument("--keys", type=int, default=2_000_000)
    a = ap.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []
    for seed in (1, 2):
        here, there = context.Pipe()
        context.Process(target=worker, args=(there, seed, a), daemon=True).start()
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()

    def ask(*works: list[str]) -> list[float]:
        """Batches a second of each thread: those of the first list in one process, those of the second in another."""
        for pipe, work in zip(pipes, works, strict=False):
            pipe.send(work)
        return [rate for pipe, _ in zip(pipes, works, strict=False) for rate in pipe.recv()]

    pairs = {"two readers": ["read", "read"], "reader beside updater": ["read", "update"]}
    got: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    alone: dict[str, list[float]] = {"read": [], "update": []}
    for _ in range(a.rounds + 1):  # the first warms up
        one = {work: ask([work])[0] for work in alone}
        for work, rate in one.items():
            alone[work].append(rate)
        for name, works in pairs.items():
            speed_ups = [
                sum(rate / one[work] for rate, work in zip(rates, works, strict=True))
                for rates in (ask(works), ask(works[:1], works[1:]))
            ]
            got[name].append((speed_ups[0], speed_ups[1]))
    for pipe in pipes:
        pipe.send([])
    for work, rates in alone.items():
        print(f"{work} alone: {statistics.median(rates[1:]) * a.batch / 1e6:.1f} M keys/s")
    for name, rounds in got.items():
        threads, processes = zip(*rounds[1:], strict=True)
        share = statistics.median(t / p for t, p in rounds[1:])
        print(
            f"{name}: {statistics.median(threads):.2f}x, two processes {statistics.median(processes):.2f}x, "
            f"{share:.2f} of the ceiling"
        )


if __name__ == "__main__":
    main()

"""Whether 26 small tables cost more than one table that 26 features share: CPU time of a lookup and of a step.

``python bench/tables.py [--rounds 5] [--rows 64,256,1024,4096]``

Both collections look up the same keys in total, one a row and feature, dim 16, RowWiseAdagrad: 26 tables of 100,000
keys each, or one of 2.6 million. They take turns in one process. A ratio is the many tables' time over the one table's.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from hbkit.embedding import Collection, RowWiseAdagrad, Table

N_FEATURES, N_KEYS, N_BATCHES, DIM = 26, 100_000, 8, 16


def cpu_ms(collection: Collection, batches: list[dict[str, np.ndarray]], grads: dict[str, np.ndarray] | None) -> float:
    """Milliseconds a batch: of a step with `grads`, of a lookup without."""
    start = time.process_time()
    for batch in batches:
        if grads is None:
            collection.lookup(batch)
        else:
            staged = collection.stage(batch)
            staged.outputs()
            staged.apply(grads)
    return (time.process_time() - start) / len(batches) * 1e3


def main() -> None:
    """Print a line for each batch size, round and kind of work."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--rows", default="64,256,1024,4096")
    a = ap.parse_args()
    names = [f"f{i}" for i in range(N_FEATURES)]
    for rows in map(int, a.rows.split(",")):
        rng, rule = np.random.default_rng(0), RowWiseAdagrad(lr=0.05)
        many = Collection([Table(name, DIM, optimizer=rule) for name in names])
        one = Collection([Table("t", DIM, optimizer=rule)], dict.fromkeys(names, "t"))
        # More of the low keys, so that batches repeat some.
        own = [{f: (rng.random(rows) ** 3 * N_KEYS).astype(np.int64) for f in names} for _ in range(N_BATCHES)]
        apart = [{f: keys * N_FEATURES + i for i, (f, keys) in enumerate(batch.items())} for batch in own]
        grads = {f: rng.normal(size=(rows, DIM)).astype(np.float32) for f in names}
        pairs = ((many, own), (one, apart))
        for collection, batches in pairs:
            cpu_ms(collection, batches, grads)
        for _ in range(a.rounds):
            for what, given in (("lookup", None), ("step", grads)):
                times = [cpu_ms(collection, batches, given) for collection, batches in pairs]
                print(f"{rows} rows, {what}: {times[0]:.2f} and {times[1]:.2f} ms, ratio {times[0] / times[1]:.2f}")


if __name__ == "__main__":
    main()

"""What ranks send in a step: measured on loopback ranks beside the model of cost, then the model for 64 to 1,024 GPUs.

``python bench/scaling.py [--batch 2048] [--steps 3]``

The tables are Criteo's 26, of the sizes that MLPerf's DLRM caps at 40 million rows, with keys by Zipf's law
(``--skew``). The first part runs ranks as threads, with real messages, and counts bytes; the second calculates.
docs/scaling.md says what is assumed. No time is measured here.
"""

from __future__ import annotations

import argparse
import json
import threading

import numpy as np

from hbkit.embedding import SGD, Collection, Constant, Sharded, Table
from hbkit.embedding.placement import Load, Machine, measure, plan, traffic
from hbkit.shuffle import Loopback

ROWS = (40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209)
ROWS += (11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36)
DIM = 128
GPUS_A_NODE, NVLINK, INFINIBAND = 8, 450e9, 50e9  # bytes a second and GPU, each way: H100 by its data sheet, NDR 400
ATTAINED, MESSAGE, BLOCK = 0.7, 2e-6, 1e-7  # of the bandwidth; seconds
DENSE = 10e-3  # seconds of a step's dense part, for the last column


def ranks_of(n: int, rows: int, skew: float, rng: np.random.Generator) -> np.ndarray:
    """Draws from a Zipf law over `rows` keys, by inverting its integral: int64[n]."""
    top = rows ** (1 - skew)
    return np.minimum((1 + rng.random(n) * (top - 1)) ** (1 / (1 - skew)), rows).astype(np.int64) - 1


def load(rows: int, values: int, skew: float, top: int = 4096) -> Load:
    """What a batch of so many values asks of a table, expected."""
    each = min(rows, 1 << 16) + 1  # bins of one key, then of more
    edges = np.unique(np.concatenate([np.arange(1, each + 1), np.geomspace(each, rows + 1, 4000)]))
    share = np.diff(edges ** (1 - skew)) / ((rows + 1) ** (1 - skew) - 1)
    keys = np.diff(edges)
    presence = -np.expm1(values * np.log1p(-np.minimum(share / keys, 1 - 1e-12)))
    k = min(rows, top)
    scattered = np.random.default_rng(rows).permutation(min(rows, 1 << 20))[:k].astype(np.int64)
    return Load(DIM, float((presence * keys).sum()), rows, scattered, presence[:k])


def measured(n: int, wire: str, batches: list[list[dict[str, np.ndarray]]]) -> dict[str, float]:
    """Bytes a rank and step, the mean."""
    out: list[dict[str, int]] = [{}] * n

    def run(transport: Loopback) -> None:
        c = Sharded(collection(), transport, wire)
        before = c.traffic()
        for every in batches:
            staged = c.stage(every[transport.rank])
            staged.apply({f: np.ones_like(v) for f, v in staged.outputs().items()})
        out[transport.rank] = {kind: x - before.get(kind, 0) for kind, x in c.traffic().items()}

    threads = [threading.Thread(target=run, args=(t,)) for t in Loopback.group(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    kinds = ("keys", "rows", "gradients")
    sums = {f"{k}_{what}": sum(o.get(f"{k}_{what}", 0) for o in out) for k in kinds for what in ("nbytes", "messages")}
    return {k: x / n / len(batches) for k, x in sums.items()}


def collection() -> Collection:
    """The 26 tables."""
    tables = [Table(f"c{i}", DIM, optimizer=SGD(lr=0.1), initializer=Constant(0.0)) for i in range(len(ROWS))]
    return Collection(tables, {t.name: t.name for t in tables})


def gpus(n: int) -> Machine:
    """Links of a GPU among n: what leaves its node takes InfiniBand, at the same time as the rest takes NVLink."""
    away = max(n - GPUS_A_NODE, 0) / (n - 1)
    bandwidth = min(INFINIBAND / away if away else NVLINK, NVLINK / (1 - away) if away < 1 else NVLINK)
    return Machine(ATTAINED * min(bandwidth, NVLINK), MESSAGE, BLOCK)


def main() -> None:
    """Print two tables in Markdown, and the figures as JSON."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--batch", type=int, default=2048, help="rows a rank")
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--skew", type=float, default=1.05)
    a = ap.parse_args()
    print("| ranks | wire | messages | keys, MB | rows, MB | gradients, MB | measured over expected |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for n in (1, 2, 4, 8) if a.steps else ():
        rng = np.random.default_rng(n)
        batches = [
            [{f"c{i}": ranks_of(a.batch, r, a.skew, rng) for i, r in enumerate(ROWS)} for _ in range(n)]
            for _ in range(a.steps)
        ]
        loads = measure(collection(), [b for every in batches for b in every], {f"c{i}": r for i, r in enumerate(ROWS)})
        for wire in ("float32", "int8"):
            got, said = measured(n, wire, batches), traffic(loads, n, wire)
            kinds = [got[f"{k}_nbytes"] for k in ("keys", "rows", "gradients")]
            expected = said.keys + said.rows + said.gradients
            messages = sum(got[f"{k}_messages"] for k in ("keys", "rows", "gradients"))
            assert messages == said.messages
            ratio = sum(kinds) / expected if expected else 1.0
            print(
                f"| {n} | {wire} | {messages:.0f} | " + "".join(f"{x / 1e6:.3f} | " for x in kinds) + f"{ratio:.4f} |",
                flush=True,
            )
            print(json.dumps({"ranks": n, "wire": wire, **got, "expected": expected}))
    for values in (2048, 8192):
        loads = {f"c{i}": load(r, values, a.skew) for i, r in enumerate(ROWS)}
        unique = sum(x.unique for x in loads.values())
        print(f"\n{values} rows a GPU: {unique:,.0f} distinct keys in {26 * values:,} values\n")
        print("| GPUs | wire | MB a GPU | messages | by key, ms | planned, ms | replicated, whole, hot | of a step |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |")
        for n in (8, 64, 256, 1024):
            for wire in ("float32", "int8"):
                machine = gpus(n)
                found, plain = plan(loads, n, wire, machine), traffic(loads, n, wire)
                t, placed = found.traffic, list(found.placement.values())
                took = t.seconds(machine)
                how = ", ".join(str(sum(isinstance(p, kind) for p in placed)) for kind in (str, int, np.ndarray))
                print(
                    f"| {n:,} | {wire} | {(t.keys + t.rows + t.gradients) / 1e6:.1f} | {t.messages:,} | "
                    f"{plain.seconds(machine) * 1e3:.2f} | {took * 1e3:.2f} | {how} | {took / (took + DENSE):.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

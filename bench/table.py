"""A table of rows by key beside static arrays and another dynamic table: lookups and whole steps, ns a key.

``python bench/table.py [--peers PYTHON] [--tfra PYTHON] [--only step,pooled,16,zipf]``

A lookup turns a batch of 65,536 keys into rows ("single": a row a key; "pooled": the sum of each 4). A step is a lookup
in training, then the gradients of what was looked up: summed for each distinct key, and one update. Every table holds
2 M keys before it begins; 16 batches are gone through in turn. One thread; `contest.py` says how times are taken.
Caveats:

- hbkit does all that its users get: `Collection.stage`, ``outputs``, ``apply``, with row-wise Adagrad. Its keys are
  64-bit and scattered; those of PyTorch and FBGEMM are row numbers, so they hash nothing and know their size.
- torch is `EmbeddingBag(sparse=True)` (`Embedding` for single rows) with Adagrad, a sum a column: PyTorch has no
  row-wise one. FBGEMM is its table-batched embedding (TBE) with fused exact row-wise Adagrad; neither deduplicates in a
  lookup.
- TFRA is a cuckoo table of TensorFlow Recommenders Addons. Its step is unique, lookup, gradient sum, one subtraction
  and upsert: less than an optimizer does. Its lookup is the better of with and without unique.
- All contenders keep the memory they free (``MALLOC_MMAP_MAX_=0``), and PyTorch's arrays have huge pages
  (``THP_MEM_ALLOC_ENABLE=1``): no ratio comes from page faults.
- FBGEMM runs under ``--peers``, TFRA under ``--tfra`` (`bench/README.md`); who is not there is left out.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contest

BATCH, BAG, BATCHES = 65_536, 4, 16
WORKLOADS = list(itertools.product(("lookup", "step"), ("single", "pooled"), (16, 32, 128), ("zipf", "uniform")))
GOALS = {  # geometric mean over all workloads of one kind
    ("lookup", "fbgemm"): 1.0,
    ("lookup", "tfra"): 10.0,
    ("step", "fbgemm"): 1.5,
    ("step", "torch"): 8.0,
    ("step", "tfra"): 15.0,
}
RETAIN = ["env", "MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=1099511627776", "THP_MEM_ALLOC_ENABLE=1"]

Run = Callable[[Any, Any], Any]  # one batch of ids, and the gradient of what they give


def batches(law: str, n_keys: int) -> Any:
    """int64[BATCHES, BATCH] of 0..n_keys-1; by Zipf's law the frequent ones are anywhere."""
    import numpy as np

    rng = np.random.default_rng(0)
    if law == "uniform":
        return rng.integers(0, n_keys, (BATCHES, BATCH))
    share = np.cumsum(1 / np.arange(1, n_keys + 1) ** 1.05)
    return rng.permutation(n_keys)[np.searchsorted(share, rng.random((BATCHES, BATCH)) * share[-1])]


def scattered(ids: Any) -> Any:
    """Any 64-bit keys for ids: a product with an odd number."""
    import numpy as np

    return (ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def hbkit(work: str, form: str, dim: int, n_keys: int) -> Run:
    import numpy as np

    from hbkit.embedding import Collection, RowWiseAdagrad, Table

    c = Collection([Table("t", dim, optimizer=RowWiseAdagrad(lr=0.05))])
    for first in range(0, n_keys, BATCH):
        c.tables["t"].lookup(scattered(np.arange(first, min(first + BATCH, n_keys))), train=True)

    def run(ids: Any, grad: Any) -> Any:
        keys = ids if form == "single" else ids.reshape(-1, BAG)
        if work == "lookup":
            return c.lookup({"t": keys})
        staged = c.stage({"t": keys})
        out = staged.outputs()
        staged.apply({"t": grad})
        return out

    return run


def torch(work: str, form: str, dim: int, n_keys: int) -> Run:
    import torch

    torch.set_num_threads(1)
    if form == "single":
        module: Any = torch.nn.Embedding(n_keys, dim, sparse=True)
    else:
        module = torch.nn.EmbeddingBag(n_keys, dim, sparse=True, mode="sum")
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.05)

    def run(ids: Any, grad: Any) -> Any:
        keys = ids if form == "single" else ids.reshape(-1, BAG)
        if work == "lookup":
            with torch.no_grad():
                return module(keys)
        optimizer.zero_grad()
        out = module(keys)
        out.backward(grad)
        optimizer.step()
        return out

    return run


def fbgemm(work: str, form: str, dim: int, n_keys: int) -> Run:
    import torch
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        OptimType,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    torch.set_num_threads(1)
    # Single rows as bags of one, as its own unpooled mode is not faster on a CPU.
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(n_keys, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        pooling_mode=PoolingMode.SUM,
    )
    splits = torch.arange(0, BATCH + 1, 1 if form == "single" else BAG)

    def run(ids: Any, grad: Any) -> Any:
        if work == "lookup":
            with torch.no_grad():
                return tbe(ids, splits)
        out = tbe(ids, splits)
        out.backward(grad)
        return out

    return run


def tfra(work: str, form: str, dim: int, n_keys: int, unique: bool = True) -> Run:
    import numpy as np
    import tensorflow as tf
    import tensorflow_recommenders_addons.dynamic_embedding as de

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    table = de.get_variable("t", tf.int64, tf.float32, dim=dim, devices=["/CPU:0"], init_size=2 * n_keys)
    for first in range(0, n_keys, BATCH):
        keys = scattered(np.arange(first, min(first + BATCH, n_keys)))
        table.upsert(tf.constant(keys), tf.random.normal((len(keys), dim)))

    def pooled(rows: Any) -> Any:
        return rows if form == "single" else tf.reduce_sum(tf.reshape(rows, (-1, BAG, dim)), 1)

    @tf.function
    def lookup(ids: Any) -> Any:
        if not unique:
            return pooled(table.lookup(ids))
        keys, at = tf.unique(ids)
        return pooled(tf.gather(table.lookup(keys), at))

    @tf.function
    def step(ids: Any, grad: Any) -> Any:
        keys, at = tf.unique(ids)
        rows = table.lookup(keys)
        out = pooled(tf.gather(rows, at))
        each = grad if form == "single" else tf.repeat(grad, BAG, 0)
        with tf.control_dependencies([out]):
            done = table.upsert(keys, rows - 0.05 * tf.math.unsorted_segment_sum(each, at, tf.size(keys)))
        with tf.control_dependencies([done]):
            return tf.identity(out)

    return (lambda ids, grad: lookup(ids)) if work == "lookup" else step


def tfra_values(work: str, form: str, dim: int, n_keys: int) -> Run:
    return tfra(work, form, dim, n_keys, unique=False)


def passes(name: str, work: str, form: str, dim: int, law: str, n_keys: int) -> Callable[[], Iterator[Any]]:
    """All batches through a contender, each with the same gradient."""
    import numpy as np

    ids = batches(law, n_keys)
    shape = (BATCH if form == "single" else BATCH // BAG, dim)
    grad: Any = (np.random.default_rng(1).normal(size=shape) * 1e-3).astype(np.float32)
    run = globals()[name](work, form, dim, n_keys)
    if name in ("hbkit", "tfra", "tfra_values"):
        ids = scattered(ids)
    inputs: list[Any] = list(ids)
    if name in ("torch", "fbgemm"):
        import torch

        inputs, grad = [torch.from_numpy(i) for i in ids], torch.from_numpy(grad)
    elif name != "hbkit":
        import tensorflow as tf

        inputs, grad = [tf.constant(i) for i in ids], tf.constant(grad)
    return lambda: (run(i, grad) for i in inputs)


def main() -> None:
    """Print a line for each workload with its figures as JSON, and the geometric means beside their goals."""
    ap = contest.arguments(__doc__)
    ap.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="has fbgemm_gpu")
    ap.add_argument("--tfra", metavar="PYTHON", help="has tensorflow_recommenders_addons")
    ap.add_argument("--only", default="", help="words that a workload must have all of: lookup|step,single|pooled,...")
    ap.add_argument("--keys", type=int, default=2_000_000)
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(1)
        work, form, dim, law = a.only.split(",")
        contest.best(passes(a.contender, work, form, int(dim), law, a.keys), lambda out: BATCH)
        return
    contest.machine(
        clock=a.clock,
        rounds=a.rounds,
        keys=a.keys,
        **contest.versions(sys.executable, ("torch",)),
        **contest.versions(a.peers, ("fbgemm-gpu-cpu",)),
    )
    pythons = {"hbkit": sys.executable, "torch": sys.executable, "fbgemm": a.peers}
    preload = []
    if a.tfra:
        pythons |= {"tfra": a.tfra, "tfra_values": a.tfra}
        cuda = (
            Path(a.tfra).absolute().parents[1].glob("lib/python*/site-packages/nvidia/cuda_runtime/lib/libcudart.so.12")
        )
        preload = [f"LD_PRELOAD={path}" for path in cuda]
    print(f"\nns/key{'':22}" + "".join(f"{p:>12}" for p in pythons), flush=True)
    ratios: dict[tuple[str, str], list[float]] = {}
    gone: set[str] = set()  # who failed once is not asked again
    for workload in WORKLOADS:
        words = [str(w) for w in workload]
        if not set(filter(None, a.only.split(","))) <= set(words):
            continue
        commands = {}
        for name, python in pythons.items():
            if name in gone or (name == "tfra_values" and workload[0] == "step"):
                continue
            extra = preload if name.startswith("tfra") else []
            options = "--only", ",".join(words), "--keys", str(a.keys)
            commands[name] = [*RETAIN, *extra, *contest.itself(python, __file__, name, *options)]
        figures = contest.take_turns(commands, a.rounds)
        gone |= commands.keys() - figures.keys()
        n = figures["hbkit"][0]["n"]
        ns = {p: round(contest.median(figures, p, a.clock) / n * 1e9, 1) for p in figures}
        got = {
            peer: contest.ratio(figures, "hbkit", [peer, "tfra_values"] if peer == "tfra" else [peer], a.clock)
            for peer in ("torch", "fbgemm", "tfra")
            if peer in figures
        }
        for peer, ratio in got.items():
            ratios.setdefault((str(workload[0]), peer), []).append(ratio)
        line = "".join(f"{ns[p]:12.1f}" if p in ns else f"{'-':>12}" for p in pythons)
        print(f"{' '.join(words):28}{line}   " + "  ".join(f"{p} {r:.2f}x" for p, r in got.items()))
        print(json.dumps({"workload": words, "ns": ns, "ratios": {p: round(r, 2) for p, r in got.items()}}), flush=True)
    print("\ngeometric means")
    for (work, peer), values in ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, values)))
        goal = GOALS.get((work, peer))
        print(f"{work:7} against {peer:7}{mean:7.2f}x" + (f"   (goal {goal:g}x)" if goal else ""))


if __name__ == "__main__":
    main()

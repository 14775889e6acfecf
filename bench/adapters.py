"""What a training step through hbkit.torch and hbkit.tensorflow costs beside the same step through the core.

``python bench/adapters.py [--dim 16,32] [--rows 65536]``

The step: look up four features of one key a row, each in a table of its own, and update by gradients that are given, so
that no model is in the way. `contest.py` says how times are taken. Caveats:

- Keys are Zipf-distributed (exponent 1.05) over 2 million, and have their rows before the clock starts. RowWiseAdagrad.
- Gradients are the frameworks' own tensors, as backward leaves them: in each leaf's ``grad`` in torch, in the arguments
  of ``apply`` in TensorFlow. Making them is the model's cost.
- Overhead is the adapter's time over the core's in the same round. The goal is 5% at the most.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import contest

GOAL = 1.05
N_KEYS, N_FEATURES, N_BATCHES = 2_000_000, 4, 10
CONTENDERS = ("core", "torch", "tensorflow")


def batches(rows: int) -> list[dict[str, Any]]:
    """Columns of keys, the same for each contender."""
    import numpy as np

    rng = np.random.default_rng(0)
    weight = np.arange(1, N_KEYS + 1, dtype=np.float64) ** -1.05
    cdf = np.cumsum(weight / weight.sum())
    keys = rng.permutation(N_KEYS).astype(np.int64)
    names = [f"f{i}" for i in range(N_FEATURES)]
    return [
        {f: keys[np.searchsorted(cdf, rng.random(rows)).clip(0, N_KEYS - 1)] for f in names} for _ in range(N_BATCHES)
    ]


def steps(name: str, dim: int, rows: int) -> Callable[[], Iterator[Any]]:
    """A pass takes a step with each batch."""
    import numpy as np

    from hbkit.embedding import Collection, RowWiseAdagrad, Table

    tables = [Table(f"f{i}", dim=dim, optimizer=RowWiseAdagrad(lr=0.01)) for i in range(N_FEATURES)]
    for table in tables:
        table.lookup(np.arange(N_KEYS, dtype=np.int64), train=True)
    collection, data = Collection(tables), batches(rows)
    ones = {table.name: np.full((rows, dim), 1e-3, np.float32) for table in tables}

    def core() -> Iterator[Any]:
        for batch in data:
            staged = collection.stage(batch)
            outputs = staged.outputs()
            staged.apply(ones)
            yield outputs

    def torch() -> Iterator[Any]:
        import torch

        import hbkit.torch as hb

        module = hb.nn.EmbeddingCollection(collection)
        grads = [torch.from_numpy(g) for g in ones.values()]
        for batch in data:
            outputs = module(batch)
            for leaf, grad in zip(outputs.values(), grads, strict=True):
                leaf.grad = grad
            module.apply()
            yield outputs

    def tensorflow() -> Iterator[Any]:
        import tensorflow as tf

        import hbkit.tensorflow as hb

        layer = hb.nn.EmbeddingCollection(collection)
        grads = {f: tf.constant(g) for f, g in ones.items()}
        for batch in data:
            outputs = layer(batch, training=True)
            layer.apply(grads)
            yield outputs

    return {"core": core, "torch": torch, "tensorflow": tensorflow}[name]


def main() -> None:
    """Print a line for each dim, and its figures as JSON."""
    ap = contest.arguments(__doc__)
    ap.add_argument("--dim", default="16,32")
    ap.add_argument("--rows", type=int, default=65_536)
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(1)
        contest.best(steps(a.contender, int(a.dim), a.rows), lambda outputs: len(outputs) * a.rows)
        return
    contest.machine(clock=a.clock, rounds=a.rounds, **contest.versions(sys.executable, ("torch", "tensorflow-cpu")))
    for dim in a.dim.split(","):
        options = "--dim", dim, "--rows", str(a.rows)
        commands = {name: contest.itself(sys.executable, __file__, name, *options) for name in CONTENDERS}
        figures = contest.take_turns(commands, a.rounds)
        rates = {c: round(f[0]["n"] / contest.median(figures, c, a.clock)) for c, f in figures.items()}
        over = {c: round(1 / contest.ratio(figures, c, ["core"], a.clock), 3) for c in CONTENDERS[1:] if c in figures}
        print(
            f"dim {dim}: "
            + ", ".join(f"{c} {r:,} keys/s" for c, r in rates.items())
            + f"; over the core {over}, goal {GOAL}"
        )
        print(json.dumps({"dim": int(dim), "rows": a.rows, "keys_s": rates, "over the core": over}), flush=True)


if __name__ == "__main__":
    main()

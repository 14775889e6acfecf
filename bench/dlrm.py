"""DLRM end to end from Parquet beside TorchRec, `torch.nn.EmbeddingBag` and Keras: samples/s.

``python bench/dlrm.py DATA --peers PYTHON [--dim 16,32] [--shared ../shared] [--only torch,torchrec] [--threads 2]``

DATA holds clicks.parquet, and clicks.tfrecord for Keras, of ``../shared/workloads/clicks.py``. The peers are the
scripts in ``../shared/peers``; PYTHON has TorchRec. `contest.py` says how contenders take turns. hbkit trains the same
model (under PyTorch the very class of the peer's script), with the same sizes, rates and batches, through
``hb.pipeline`` or ``hb.nn.attach``. Caveats:

- As in the peers, one pass of the whole comes first, then one of the data and embedding part alone: the dense model is
  replaced by a sum. "dense" is the dense model on constant inputs, which no reader or table can make faster. The first
  three steps of a pass are not timed.
- hbkit keeps every 64-bit key and makes its rows in the first pass; the peers take keys modulo 200,000 a feature, and
  have all rows before they begin.
- "wait" is the share of a pass's time in which the step waited for data or rows.
- Each process has its framework's threads (``--threads``), and hbkit's or the peer's own thread that decodes.
- Keras's peer is the best of TFRecord, TFRecord with XLA, and Parquet; hbkit's Keras is run with and without XLA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import contest

DENSE, SPARSE = [f"d{i}" for i in range(13)], [f"s{i}" for i in range(26)]
BATCH, UNTIMED, STEPS = 4096, 3, 30
PEERS = ("torch", "keras")
GOALS = [  # figure, of, over, goal
    ("sparse_samples_s", "torch", "torchrec", 3.5),
    ("sparse_samples_s", "torch", "embeddingbag", 6.0),
    ("samples_s", "torch", "torchrec", 1.6),
    ("samples_s", "keras", "keras-tfrecord", 3.0),
    ("sparse_samples_s", "keras", "torch", 0.95),
]


def rate(steps: Iterable[Any], step: Callable[[Any], Any]) -> tuple[float, float]:
    """Samples/s of ``step(s)`` over steps, and the share of the time that they were waited for."""
    n, began, waited = 0, 0.0, 0.0
    for i, s in enumerate(steps):
        if i == UNTIMED:
            n, began, waited = 0, time.perf_counter(), getattr(steps, "waited", 0.0)
        step(s)
        n += BATCH
    took = time.perf_counter() - began
    return n / took, (getattr(steps, "waited", 0.0) - waited) / took


def figures(samples: tuple[float, float], sparse: tuple[float, float], dense: float, loss: float) -> str:
    return json.dumps(
        {
            "samples_s": round(samples[0]),
            "sparse_samples_s": round(sparse[0]),
            "dense_samples_s": round(dense),
            "wait": round(samples[1], 4),
            "sparse_wait": round(sparse[1], 4),
            "loss": round(loss, 4),
        }
    )


def embeddings(hb: Any, dim: int) -> Any:
    from hbkit.embedding import Collection, RowWiseAdagrad, Table

    tables = [Table(name, dim, optimizer=RowWiseAdagrad(lr=0.05)) for name in SPARSE]
    return hb.nn.EmbeddingCollection(Collection(tables, stack={"sparse": SPARSE}))


def dataset(hb: Any, path: Path) -> Any:
    fields = [*DENSE, *SPARSE, "label"]
    return hb.data.Dataset.from_parquet(str(path), fields=fields).batch(BATCH, "drop").supervised("label")


def torch(path: Path, dim: int, threads: int, peer: Path) -> str:
    import torch

    import hbkit.torch as hb

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    spec: Any = importlib.util.spec_from_file_location("peer", peer)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    model, rows = module.Dense(dim), embeddings(hb, dim)
    optimizer, loss_fn = torch.optim.Adagrad(model.parameters(), lr=0.02), torch.nn.BCEWithLogitsLoss()
    last = 0.0

    def whole(s: Any) -> None:
        nonlocal last
        loss = loss_fn(model(s.dense, s.embeddings["sparse"]), s.label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        s.apply()
        last = loss.item()

    def sparse(s: Any) -> None:
        loss = loss_fn(s.embeddings["sparse"].sum((1, 2)) + s.dense.sum(1), s.label)
        loss.backward()
        s.apply()
        loss.item()

    x, e, y = torch.randn(BATCH, 13), torch.randn(BATCH, 26, dim, requires_grad=True), torch.zeros(BATCH)

    def dense(_: Any) -> None:
        loss_fn(model(x, e), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        e.grad = None

    samples = rate(hb.pipeline(dataset(hb, path), rows), whole)
    loss = last
    return figures(
        samples, rate(hb.pipeline(dataset(hb, path), rows), sparse), rate(range(STEPS + UNTIMED), dense)[0], loss
    )


def keras(path: Path, dim: int, threads: int, jit: bool) -> str:
    import keras
    import numpy as np
    import tensorflow as tf

    import hbkit.tensorflow as hb

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    keras.utils.set_random_seed(0)
    i, j = np.tril_indices(27, -1)

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            layer = keras.layers.Dense
            self.bottom = [layer(64, "relu"), layer(dim, "relu")]
            self.top = [layer(128, "relu"), layer(64, "relu"), layer(1)]

        def call(self, x: Any, e: Any) -> Any:
            for layer in self.bottom:
                x = layer(x)
            f = keras.ops.concatenate([keras.ops.expand_dims(x, 1), e["sparse"]], 1)
            dots = keras.ops.reshape(keras.ops.matmul(f, keras.ops.transpose(f, (0, 2, 1))), (-1, 27 * 27))
            h = keras.ops.concatenate([x, keras.ops.take(dots, i * 27 + j, axis=1)], 1)
            for layer in self.top:
                h = layer(h)
            return h

    class Clock(keras.callbacks.Callback):
        n, began, end = 0, 0.0, 0.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.end = time.perf_counter()
            if batch == UNTIMED - 1:
                self.n, self.began = 0, self.end
            else:
                self.n += BATCH

    model, rows, clock = Model(), embeddings(hb, dim), Clock()
    loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adagrad(0.05), loss_fn, jit_compile=jit)
    history = hb.nn.attach(model, rows).fit(dataset(hb, path), epochs=1, verbose=0, callbacks=[clock])

    @tf.function(jit_compile=jit)
    def sums(x: Any, e: Any, y: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(e)
            out = tf.reduce_sum(e, (1, 2)) + tf.reduce_sum(x, 1)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(y, out))
        return loss, tape.gradient(loss, e)

    def sparse(s: Any) -> None:
        loss, grad = sums(s.dense, s.embeddings["sparse"], s.label)
        s.apply({"sparse": grad})
        float(loss)

    @tf.function(jit_compile=jit)
    def fit(x: Any, e: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(e)
            loss = loss_fn(y, model(x, {"sparse": e}))
        grads = tape.gradient(loss, [*model.trainable_variables, e])
        model.optimizer.apply_gradients(zip(grads[:-1], model.trainable_variables, strict=True))
        return loss, grads[-1]

    x, e, y = tf.random.normal((BATCH, 13)), tf.random.normal((BATCH, 26, dim)), tf.zeros((BATCH, 1))
    return figures(
        (clock.n / (clock.end - clock.began), 0.0),
        rate(hb.pipeline(dataset(hb, path), rows), sparse),
        rate(range(STEPS + UNTIMED), lambda _: fit(x, e, y)[0].numpy())[0],
        history.history["loss"][-1],
    )


def main() -> None:
    """Print each contender's figures, and the ratios beside their goals."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--contender", help=argparse.SUPPRESS)
    ap.add_argument("data", type=Path)
    ap.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="has torchrec")
    ap.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    ap.add_argument("--dim", default="16,32")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", default="", help="contenders by name, with commas between")
    a = ap.parse_args()
    parquet, torch_peer, keras_peer = a.data / "clicks.parquet", *(a.shared / f"peers/dlrm_{n}.py" for n in PEERS)
    if a.contender:
        dim = int(a.dim)
        if a.contender == "torch":
            print(torch(parquet, dim, a.threads, torch_peer))
        else:
            print(keras(parquet, dim, a.threads, a.contender == "keras-jit"))
        return
    contest.machine(rounds=a.rounds, threads=a.threads, **contest.versions(sys.executable, ("torch", "tensorflow-cpu")))
    for dim in a.dim.split(","):
        options = "--dim", dim, "--threads", str(a.threads)
        ours = ("--shared", str(a.shared), *options, str(a.data))
        peer = [a.peers, str(torch_peer), str(parquet), *options, "--peer"]
        by_keras = [sys.executable, str(keras_peer)]
        commands = {
            "torch": contest.itself(sys.executable, __file__, "torch", *ours),
            "torchrec": [*peer, "torchrec"],
            "embeddingbag": [*peer, "embeddingbag"],
            "keras": contest.itself(sys.executable, __file__, "keras", *ours),
            "keras-jit": contest.itself(sys.executable, __file__, "keras-jit", *ours),
            "keras-tfrecord": [*by_keras, str(a.data / "clicks.tfrecord"), *options],
            "keras-tfrecord-jit": [*by_keras, str(a.data / "clicks.tfrecord"), *options, "--jit"],
            "keras-parquet": [*by_keras, str(parquet), *options],
        }
        only = a.only.split(",") if a.only else list(commands)
        found = contest.take_turns({name: commands[name] for name in only}, a.rounds)
        report(int(dim), found)


def report(dim: int, found: contest.Figures) -> None:
    """Medians of each contender, and of the ratios within rounds."""
    print(f"\ndim {dim}")
    for name, rounds in found.items():
        line = {k: statistics.median(r[k] for r in rounds) for k in rounds[0] if k.endswith(("_s", "wait"))}
        print(f"{name:20}{json.dumps(line)}")
    for figure, ours, other, goal in GOALS:
        if ours in found and other in found:
            each = [round(u[figure] / p[figure], 3) for u, p in zip(found[ours], found[other], strict=True)]
            print(f"{figure:18}{ours:>7} over {other:15}{statistics.median(each):6.2f}   (goal {goal:g})   {each}")
    for ours in ("torch", "keras", "keras-jit"):
        each = [round(u["samples_s"] / u["dense_samples_s"], 3) for u in found.get(ours, [])]
        if each:
            print(f"samples_s {ours:>15} over its dense alone   {statistics.median(each):6.2f}   (goal 0.9)   {each}")
    print(json.dumps({"dim": dim, "figures": found}), flush=True)


if __name__ == "__main__":
    main()

"""The same model over hbkit's tables and over the framework's own embeddings: losses and test AUC must agree.

``python bench/twin.py TRAIN.parquet TEST.parquet [--backend torch] [--model deepfm] [--optimizer adagrad] [--seed 0]``

Takes files as `hbkit convert --format movielens` writes them, or others whose columns `hbkit train` can choose by
itself. The twin knows every key of both files beforehand, starts from the same rows and dense weights, sees the same
batches, and is trained by the framework's dense optimizer: rows in `torch.nn.functional.embedding_bag` or `tf.gather`
of a `tf.Variable`. DIN's past behaviour are the last 20 items that the user clicked in earlier rows of the training
file; MMoE predicts the one label. The interval of the AUCs' difference is over test rows resampled alike, 1,000 times.

The twin's first 100 steps are trained again with the rows of each batch in other orders: what rounding alone does.
Caveats: Adagrad's first step divides a gradient by its own size, so where a gradient is next to nothing, its rounding
becomes a whole step; SGD's steps, and those of Adagrad whose sums start above zero (``--accumulator 0.1``), do not
amplify rounding. Keys that no training row has are zeros to hbkit when it evaluates, and initial values to the twin.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Mapping
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import hbkit
from hbkit.cli import building as cli
from hbkit.cli.columns import choose
from hbkit.data import Batch, Dataset
from hbkit.metrics import AUC

Array = np.ndarray
PAST = {"past": "item"}


class TorchTwin:
    """A torch model over embeddings of torch."""

    def __init__(self, model: Any, first: Mapping[str, Array], settings: Mapping[str, Any]) -> None:
        import torch

        from hbkit_torch.training import OPTIMIZERS

        self.torch, self.model, self.settings = torch, copy.deepcopy(model), settings
        self.rows = {name: torch.nn.Parameter(torch.from_numpy(rows)) for name, rows in first.items()}
        make = OPTIMIZERS[settings["optimizer"]]
        groups = [(self.model.parameters(), settings["dense_lr"]), (self.rows.values(), settings["lr"])]
        self.optimizer = make([{"params": list(parameters), "lr": lr} for parameters, lr in groups])  # type: ignore[call-arg]  # the base class's

    def logits(self, batch: Batch, codes: Mapping[str, Any]) -> Any:
        """Of one batch."""
        torch, out = self.torch, {}
        for f, column in codes.items():
            rows = self.rows[self.settings["sequences"].get(f, f)]
            if f in self.settings["sequences"]:
                from hbkit_torch.pipeline import Sequence

                mask = torch.arange(column.lengths().max(initial=1)) < torch.from_numpy(column.lengths())[:, None]
                padded = torch.from_numpy(column.to_padded(mask.shape[1]))
                out[f] = Sequence(torch.nn.functional.embedding(padded, rows) * mask[:, :, None], mask)
            else:
                flat = column if isinstance(column, np.ndarray) else column.values
                starts = np.arange(len(flat)) if flat is column else column.row_splits[0][:-1]
                bag = torch.nn.functional.embedding_bag
                out[f] = bag(torch.from_numpy(flat), rows, torch.from_numpy(starts), mode="mean")
        return self.model(torch.from_numpy(dense(batch, self.settings)), out)

    def step(self, batch: Batch, codes: Mapping[str, Any]) -> float:
        """Train on one batch; its loss."""
        self.model.train()
        label = self.torch.from_numpy(batch["label"])
        loss = self.torch.nn.functional.binary_cross_entropy_with_logits(self.logits(batch, codes), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def predict(self, batch: Batch, codes: Mapping[str, Any]) -> Array:
        """Logits of one batch."""
        self.model.eval()
        with self.torch.no_grad():
            found: Array = self.logits(batch, codes).numpy()
        return found


class TensorflowTwin:
    """A Keras model over variables of TensorFlow."""

    def __init__(self, model: Any, first: Mapping[str, Array], settings: Mapping[str, Any]) -> None:
        import keras
        import tensorflow as tf

        from hbkit_tensorflow.training import OPTIMIZERS

        _, again, _ = cli.build(dict(settings))  # from the same seed: the same weights
        self.tf, self.model, self.settings = tf, again.model, settings
        self.rows = {name: keras.Variable(rows) for name, rows in first.items()}
        self.optimizers = [OPTIMIZERS[settings["optimizer"]](settings[lr]) for lr in ("dense_lr", "lr")]

    def logits(self, batch: Batch, codes: Mapping[str, Any], training: bool) -> Any:
        """Of one batch."""
        tf, out = self.tf, {}
        for f, column in codes.items():
            rows = self.rows[self.settings["sequences"].get(f, f)].value
            if f in self.settings["sequences"]:
                from hbkit_tensorflow.pipeline import Sequence

                mask = np.arange(column.lengths().max(initial=1)) < column.lengths()[:, None]
                padded = tf.gather(rows, column.to_padded(mask.shape[1]))
                out[f] = Sequence(padded * mask[:, :, None].astype(np.float32), tf.constant(mask))
            elif isinstance(column, np.ndarray):
                out[f] = tf.gather(rows, column)
            else:
                segments = np.repeat(np.arange(batch.n_rows), column.lengths())
                out[f] = tf.math.unsorted_segment_mean(tf.gather(rows, column.values), segments, batch.n_rows)
        mode = {"training": training} if self.model._call_has_training_arg else {}
        return self.model(tf.constant(dense(batch, self.settings)), out, **mode)

    def step(self, batch: Batch, codes: Mapping[str, Any]) -> float:
        """Train on one batch; its loss."""
        tf, variables = self.tf, (self.model.trainable_variables, list(self.rows.values()))
        with tf.GradientTape() as tape:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(batch["label"], self.logits(batch, codes, True))
            loss = tf.reduce_mean(losses)
        grads = tape.gradient(loss, [[v.value for v in part] for part in variables])
        for optimizer, part, grad in zip(self.optimizers, variables, grads, strict=True):
            optimizer.apply_gradients([(tf.convert_to_tensor(g), v) for g, v in zip(grad, part, strict=True)])
        return float(loss)

    def predict(self, batch: Batch, codes: Mapping[str, Any]) -> Array:
        """Logits of one batch."""
        found: Array = self.logits(batch, codes, False).numpy()
        return found


def dense(batch: Batch, settings: Mapping[str, Any]) -> Array:
    """The dense inputs: float32[B, n_dense]."""
    columns = [batch[name] for name in settings["dense"]]
    return np.stack(columns, 1) if columns else np.zeros((batch.n_rows, 0), np.float32)


def with_past(train: str, test: str, to: str) -> tuple[str, str]:
    """Copies of both files with the column that DIN needs."""
    clicked: defaultdict[int, deque[int]] = defaultdict(lambda: deque(maxlen=20))
    for path in train, test:
        table = pq.read_table(path)
        past = []
        for user, item, label in zip(*(table[name].to_pylist() for name in ("user", "item", "label")), strict=True):
            past.append(list(clicked[user]))
            if label == 1 and path == train:
                clicked[user].append(item)
        pq.write_table(table.append_column("past", pa.array(past, pa.list_(pa.int64()))), f"{to}/{path == train}")
    return f"{to}/True", f"{to}/False"


def reordered(batch: Batch, rng: np.random.Generator) -> Batch:
    """The batch with its rows in another order: what it gives is apart by rounding alone."""
    order = rng.permutation(batch.n_rows)
    columns = {
        name: column[order] if isinstance(column, np.ndarray) else column.take(order) for name, column in batch.items()
    }
    return Batch(columns, batch.n_rows, batch.cursor)


def difference(label: Array, score: Array, other: Array, n: int = 1000) -> tuple[float, float, list[float]]:
    """AUC of both scores, and the 2.5% and 97.5% quantiles of their difference over rows resampled alike."""
    rng, found = np.random.default_rng(0), []
    for k in range(n + 1):
        weight = np.ones(len(label)) if k == 0 else rng.poisson(1.0, len(label)).astype(np.float64)
        pair = AUC(), AUC()
        for auc, scores in zip(pair, (score, other), strict=True):
            auc.update(label, scores, weight)
        found.append([auc.result() for auc in pair])
    first, second = found[0]
    apart = np.diff(np.array(found[1:]))[:, 0]
    return first, second, np.quantile(-apart, [0.025, 0.975]).round(5).tolist()


def start_sums_at(value: float, backend: str) -> None:
    """Let Adagrad's sums of squares start there, those of rows and weights, in both trainings."""
    adagrad: Any = hbkit.embedding
    adagrad.Adagrad = partial(hbkit.embedding.Adagrad, initial_accumulator=value)
    training = importlib.import_module(f"hbkit_{backend}.training")
    if backend == "torch":
        training.OPTIMIZERS["adagrad"] = partial(training.OPTIMIZERS["adagrad"], initial_accumulator_value=value)
    else:
        training.OPTIMIZERS["adagrad"] = partial(training.Adagrad, initial_accumulator_value=value, epsilon=1e-10)


def main() -> None:
    """Train both on the same batches; print one JSON line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("train")
    ap.add_argument("test")
    ap.add_argument("--backend", choices=cli.BACKENDS, default="torch")
    ap.add_argument("--model", choices=cli.MODELS, default="deepfm")
    ap.add_argument("--optimizer", choices=["adagrad", "sgd"], default="adagrad")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--batch-size", type=int, default=1024)
    ap.add_argument("--lr", type=float, default=0.05)
    ap.add_argument("--dense-lr", type=float, default=0.01)
    ap.add_argument("--accumulator", type=float, default=0.0, help="What Adagrad's sums of squares start with.")
    ap.add_argument("--orders", type=int, default=3, help="Other orders of the rows.")
    a = ap.parse_args()
    if a.backend == "torch":
        import torch

        torch.set_num_threads(1)
    if a.accumulator:
        start_sums_at(a.accumulator, a.backend)
    with tempfile.TemporaryDirectory() as d:
        past = PAST if a.model == "din" else {}
        paths = with_past(a.train, a.test, d) if past else (a.train, a.test)
        print(json.dumps(compare(a, *paths, past)))


def compare(a: argparse.Namespace, train: str, test: str, past: dict[str, str]) -> dict[str, Any]:
    """Both trainings; their figures."""
    columns = choose(Dataset.from_parquet(train).schema, {}, "label")
    options = {k: getattr(a, k) for k in ("model", "backend", "optimizer", "lr", "dense_lr", "seed", "batch_size")}
    settings = cli.settings_of(columns, sequences=past, dim=16, **options)
    _, trainer, collection = cli.build(settings)

    def dataset(path: str) -> Dataset:
        return Dataset.from_parquet(path, columns.fields).supervised("label").batch(a.batch_size)

    def keys(column: Any) -> Array:
        found: Array = column.values if isinstance(column, hbkit.Ragged) else column
        return found

    known: dict[str, Array] = {}
    for f, table in collection.features.items():
        found = [keys(b[f]) for p in (train, test) for b in dataset(p)]
        known[table] = np.unique(np.concatenate([*found, known.get(table, np.empty(0, np.int64))]))

    def codes(batch: Batch) -> dict[str, Any]:
        out = {}
        for f, table in collection.features.items():
            found = np.searchsorted(known[table], keys(batch[f]))
            ragged = isinstance(batch[f], hbkit.Ragged)
            out[f] = hbkit.Ragged(found, batch[f].row_splits) if ragged else found
        return out

    first = {name: table.initializer(name, known[name], table.dim) for name, table in collection.tables.items()}

    def twin() -> Any:
        make = {"torch": TorchTwin, "tensorflow": TensorflowTwin}[a.backend]
        return make(start, {name: rows.copy() for name, rows in first.items()}, settings)

    start = copy.deepcopy(trainer.model) if a.backend == "torch" else None
    whole, ours = twin(), []
    shuffled = dataset(train).shuffle(a.seed, cli.SHUFFLE_ROWS)
    trainer.fit(shuffled, on_step=lambda n_rows, loss: ours.append(loss))
    theirs = [whole.step(batch, codes(batch)) for batch in shuffled]
    rounding = []
    for seed in range(a.orders):
        again, rng = twin(), np.random.default_rng(seed)
        batches = (reordered(batch, rng) for batch in itertools.islice(shuffled, 100))
        losses = [again.step(batch, codes(batch)) for batch in batches]
        rounding.append(float(np.abs(np.array(losses) - theirs[: len(losses)]).max()))
    label, score, _ = (np.concatenate(part) for part in zip(*trainer.predict(dataset(test)), strict=True))
    other = np.concatenate([whole.predict(batch, codes(batch)) for batch in dataset(test)])
    auc, twin_auc, interval = difference(label, score, 1 / (1 + np.exp(-other)))
    apart = np.abs(np.array(ours) - theirs)
    return {
        "model": f"{a.model} ({a.backend}, {a.optimizer})",
        "steps": len(ours),
        "largest loss difference, first 100 steps": float(apart[:100].max()),
        "all steps": float(apart.max()),
        "twin's own, rows in other orders, first 100 steps": sorted(rounding),
        "test AUC": round(auc, 5),
        "twin's test AUC": round(twin_auc, 5),
        "difference, 95% interval": interval,
    }


if __name__ == "__main__":
    main()

"""The same model over hbkit's tables and over the framework's own embeddings: losses and test AUC must agree.

``python bench/twin.py TRAIN.parquet TEST.parquet [--backend torch] [--model deepfm] [--optimizer adagrad] [--seed 0]``

Takes files as `hbkit convert --format movielens` writes them. The twin knows every key of both files beforehand, starts
from the same rows and dense weights, sees the same batches, and is trained by the framework's dense optimizer: rows in
`torch.nn.functional.embedding_bag` or `tf.gather` of a `tf.Variable`. DIN's past behaviour are the last 20 items that
the user clicked in earlier rows of the training file; MMoE predicts the one label.

A third training is the twin's again with the rows of each batch in the other order: what rounding alone does.
Caveat: Adagrad's first step divides a gradient by its own size, so where a gradient is next to nothing, its rounding
becomes a whole step; SGD's steps do not amplify rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Mapping
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

        self.torch, self.model, self.settings = torch, copy.deepcopy(model), settings
        self.rows = {name: torch.nn.Parameter(torch.from_numpy(rows)) for name, rows in first.items()}
        make = {"adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}[settings["optimizer"]]
        groups = [(self.model.parameters(), settings["dense_lr"]), (self.rows.values(), settings["lr"])]
        self.optimizer = make([{"params": list(parameters), "lr": lr} for parameters, lr in groups])

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
        return self.model(torch.zeros(batch.n_rows, 0), out)

    def step(self, batch: Batch, codes: Mapping[str, Any]) -> float:
        """Train on one batch; its loss."""
        label = self.torch.from_numpy(batch["label"])
        loss = self.torch.nn.functional.binary_cross_entropy_with_logits(self.logits(batch, codes), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def predict(self, batch: Batch, codes: Mapping[str, Any]) -> Array:
        """Logits of one batch."""
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

    def logits(self, batch: Batch, codes: Mapping[str, Any]) -> Any:
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
        return self.model(tf.zeros((batch.n_rows, 0)), out)

    def step(self, batch: Batch, codes: Mapping[str, Any]) -> float:
        """Train on one batch; its loss."""
        tf, variables = self.tf, (self.model.trainable_variables, list(self.rows.values()))
        with tf.GradientTape() as tape:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(batch["label"], self.logits(batch, codes))
            loss = tf.reduce_mean(losses)
        grads = tape.gradient(loss, [[v.value for v in part] for part in variables])
        for optimizer, part, grad in zip(self.optimizers, variables, grads, strict=True):
            optimizer.apply_gradients([(tf.convert_to_tensor(g), v) for g, v in zip(grad, part, strict=True)])
        return float(loss)

    def predict(self, batch: Batch, codes: Mapping[str, Any]) -> Array:
        """Logits of one batch."""
        found: Array = self.logits(batch, codes).numpy()
        return found


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


def backwards(batch: Batch) -> Batch:
    """The batch with its rows in the other order: what it gives is apart by rounding alone."""
    order = np.arange(batch.n_rows)[::-1].copy()
    columns = {
        name: column[order] if isinstance(column, np.ndarray) else column.take(order) for name, column in batch.items()
    }
    return Batch(columns, batch.n_rows, batch.cursor)


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
    a = ap.parse_args()
    if a.backend == "torch":
        import torch

        torch.set_num_threads(1)
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
    make = {"torch": TorchTwin, "tensorflow": TensorflowTwin}[a.backend]
    twin, reverse = (make(trainer.model, {n: rows.copy() for n, rows in first.items()}, settings) for _ in range(2))
    ours: list[float] = []
    shuffled = dataset(train).shuffle(a.seed, cli.SHUFFLE_ROWS)
    trainer.fit(shuffled, on_step=lambda n_rows, loss: ours.append(loss))
    theirs = [twin.step(batch, codes(batch)) for batch in shuffled]
    again = [reverse.step(batch, codes(batch)) for batch in map(backwards, shuffled)]
    auc, twin_auc = AUC(), AUC()
    for label, score, _ in trainer.predict(dataset(test)):
        auc.update(label, score)
    for batch in dataset(test):
        twin_auc.update(batch["label"], twin.predict(batch, codes(batch)))
    apart, rounding = (np.abs(np.array(losses) - theirs) for losses in (ours, again))
    return {
        "model": f"{a.model} ({a.backend}, {a.optimizer})",
        "steps": len(ours),
        "largest loss difference, first 100 steps": float(apart[:100].max()),
        "all steps": float(apart.max()),
        "twin's own, rows backwards, first 100 steps": float(rounding[:100].max()),
        "twin's own, all steps": float(rounding.max()),
        "test AUC": round(float(auc.result()), 5),
        "twin's test AUC": round(float(twin_auc.result()), 5),
    }


if __name__ == "__main__":
    main()

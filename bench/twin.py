"""The same model over hbkit's tables and over plain `torch.nn.EmbeddingBag`: losses and test AUC must agree.

``python bench/twin.py TRAIN.parquet TEST.parquet [--model deepfm] [--seed 0] [--batch-size 1024] [--lr 0.05]``

Takes files as `hbkit convert --format movielens` writes them. The twin knows every key of both files beforehand, starts
from the same rows and dense weights, sees the same batches, and is trained by torch's dense Adagrad.
"""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np
import torch

import hbkit
import hbkit.torch as hb
from hbkit.cli import train as cli
from hbkit.cli.columns import choose
from hbkit.data import Dataset


def main() -> None:
    """Train both on the same batches; print one JSON line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("train")
    ap.add_argument("test")
    ap.add_argument("--model", choices=cli.MODELS, default="deepfm")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--batch-size", type=int, default=1024)
    ap.add_argument("--lr", type=float, default=0.05)
    a = ap.parse_args()
    torch.set_num_threads(1)
    columns = choose(Dataset.from_parquet(a.train).schema, {}, "label")
    options = {"model": a.model, "backend": "torch", "dim": 16, "optimizer": "adagrad", "lr": a.lr, "dense_lr": 0.01}
    settings = cli.settings_of(columns, seed=a.seed, batch_size=a.batch_size, **options)
    _, trainer, collection = cli.build(settings)
    model = copy.deepcopy(trainer.model)

    def dataset(path: str) -> Dataset:
        return Dataset.from_parquet(path, columns.fields).supervised("label").batch(a.batch_size)

    def keys(column: np.ndarray | hbkit.Ragged) -> np.ndarray:
        return column.values if isinstance(column, hbkit.Ragged) else column

    known = {
        f: np.unique(np.concatenate([keys(b[f]) for p in (a.train, a.test) for b in dataset(p)]))
        for f in collection.features
    }
    bags = torch.nn.ModuleDict()
    for f, table in collection.tables.items():
        first = torch.from_numpy(table.initializer(f, known[f], table.dim))
        bags[f] = torch.nn.EmbeddingBag.from_pretrained(first, freeze=False, mode="mean")
    optimizer = torch.optim.Adagrad(
        [{"params": model.parameters(), "lr": 0.01}, {"params": bags.parameters(), "lr": a.lr}]
    )

    def logits(batch: hbkit.data.Batch) -> torch.Tensor:
        rows = {}
        for f, bag in bags.items():
            column = batch[f]
            codes = torch.from_numpy(np.searchsorted(known[f], keys(column)))
            starts = column.row_splits[0][:-1] if isinstance(column, hbkit.Ragged) else np.arange(len(column))
            rows[f] = bag(codes, torch.from_numpy(starts))
        return model(torch.zeros(batch.n_rows, 0), rows)

    ours: list[float] = []
    shuffled = dataset(a.train).shuffle(a.seed, cli.SHUFFLE_ROWS)
    trainer.fit(shuffled, on_step=lambda n_rows, loss: ours.append(loss))
    theirs: list[float] = []
    for batch in shuffled:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(batch), torch.from_numpy(batch["label"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    auc, twin = hb.metrics.AUC(), hb.metrics.AUC()
    for label, score, _ in trainer.predict(dataset(a.test)):
        auc.update(label, score)
    with torch.no_grad():
        for batch in dataset(a.test):
            twin.update(batch["label"], torch.sigmoid(logits(batch)))
    apart = np.abs(np.array(ours) - theirs)
    print(
        json.dumps(
            {
                "model": a.model,
                "steps": len(ours),
                "largest loss difference, first 100 steps": float(apart[:100].max()),
                "all steps": float(apart.max()),
                "test AUC": round(float(auc.result()), 5),
                "twin's test AUC": round(float(twin.result()), 5),
            }
        )
    )


if __name__ == "__main__":
    main()

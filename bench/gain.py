"""What collision-free keys, admission and eviction do to accuracy and size, on real data.

``python bench/gain.py SHARED [--seeds 0,1,2] [--only movielens|criteo] [--model deepfm|dlrm]``

The sets, splits, models and learning rates are those of ``accuracy.py``. Each set is trained for one pass with a row
for every key; with keys hashed into 1, 0.5 and 0.1 times as many buckets as the column has keys in the training part;
with keys admitted at their second occurrence; and with at most half and a quarter as many rows, swept every 100 steps.
Prints a JSON line each: rows left, their share, test AUC and log loss with bootstrap intervals, and the difference of
AUC to the first, over rows resampled alike. Caveat: differences
within the intervals mean nothing, and one pass over small sets says little about tables of 10^9 keys.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import BATCH, SETS, intervals

import hbkit
from hbkit import Ragged
from hbkit._ext.hash import hash_ints
from hbkit.cli import building as cli
from hbkit.cli.columns import Columns, choose
from hbkit.data import Dataset
from hbkit.embedding import Adagrad, Collection, CountAdmission, MaxRows, Normal, Table


def hashed(n_buckets: Mapping[str, int]) -> Callable[[Any], Any]:
    """A map of batches: keys of these columns by their bucket, as models without dynamic tables have them."""

    def buckets(keys: np.ndarray, n: int) -> np.ndarray:
        return (hash_ints(np.ascontiguousarray(keys).view(np.int64), 0).view(np.uint64) % np.uint64(n)).astype(
            keys.dtype
        )

    def change(batch: Any) -> Any:
        out = {}
        for name, column in batch.items():
            if name not in n_buckets:
                out[name] = column
            elif isinstance(column, Ragged):
                out[name] = Ragged(buckets(column.values, n_buckets[name]), column.row_splits)
            else:
                out[name] = buckets(column, n_buckets[name])
        return out

    return change


def run(
    train: str,
    test: str,
    columns: Columns,
    options: Mapping[str, Any],
    change: Callable[[Any], Any] | None = None,
    rules: Callable[[str], dict[str, Any]] = lambda name: {},
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Rows of each table after one pass, and labels and scores of the test rows.

    Parameters
    ----------
    change : callable, optional
        Applied to each batch.
    rules : callable
        ``rules(column)`` gives its table's arguments: admission, eviction.
    """
    import hbkit.torch as hb

    make = hb.models.MODELS[options["model"]]
    tables = [
        Table(
            f.name,
            make.row_dim(options["dim"]),
            key_dtype="uint64" if f.dtype is None and f.hash_to is None else "int64",
            initializer=Normal(0.0, cli.INITIAL_STD, seed=options["seed"]),
            optimizer=Adagrad(lr=options["lr"]),
            **rules(f.name),
        )
        for f in columns.fields
        if f.name in columns.sparse
    ]
    hb.training.seed(options["seed"])
    model = make(features=columns.sparse, dim=options["dim"], n_dense=len(columns.dense))
    trainer = hb.training.Trainer(model, Collection(tables, pooling="mean"), optimizer="adagrad", lr=0.01)

    def dataset(path: str, n: int) -> Dataset:
        ds = Dataset.from_parquet(path, columns.fields).supervised("label").batch(n)
        return ds if change is None else ds.map(change)

    trainer.fit(dataset(train, BATCH).shuffle(options["seed"], cli.SHUFFLE_ROWS))
    for table in tables:
        table.evict()
    got = list(trainer.predict(dataset(test, 4096)))
    rows = {t.name: len(t) for t in tables}
    return rows, np.concatenate([g[0] for g in got]), np.concatenate([g[1] for g in got])


def variants(n_keys: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Arguments of `run` by name, for columns of so many keys."""
    out: dict[str, dict[str, Any]] = {}
    for share in (1, 0.5, 0.1):
        out[f"hashed into {share} x"] = {"change": hashed({c: math.ceil(share * n) for c, n in n_keys.items()})}
    out["admitted at 2"] = {"rules": lambda name: {"admission": CountAdmission(2)}}
    for share in (0.5, 0.25):
        out[f"at most {share} x rows"] = {
            "rules": lambda name, share=share: {
                "eviction": [MaxRows(max(1, math.ceil(share * n_keys[name])))],
                "evict_every": 100,
            }
        }
    return out


def main() -> None:
    """Print one JSON line for each set, seed and variant."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("shared", type=Path)
    ap.add_argument("--seeds", default="0")
    ap.add_argument("--only", choices=list(SETS))
    ap.add_argument("--model", choices=cli.MODELS, default="deepfm")
    a = ap.parse_args()
    for name, (convert, lr, _) in SETS.items():
        if a.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as d:
            source, *how = convert
            subprocess.run(
                [sys.executable, "-m", "hbkit.cli", "convert", a.shared / source, d, "--overwrite", *how],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            train, test = f"{d}/train.parquet", f"{d}/test.parquet"
            whole = Dataset.from_parquet(train)
            columns = choose(whole.schema, {}, "label")
            for seed in map(int, a.seeds.split(",")):
                options = {"model": a.model, "dim": 16, "lr": lr, "seed": seed}
                rows, label, best = run(train, test, columns, options)
                for variant, arguments in {"a row a key": None, **variants(rows)}.items():
                    n, score = sum(rows.values()), best
                    if arguments is not None:
                        left, label, score = run(train, test, columns, options, **arguments)
                        n = sum(left.values())
                    line = {"set": name, "model": a.model, "seed": seed, "variant": variant, "rows": n}
                    line["share"] = round(n / sum(rows.values()), 3)
                    line |= intervals(label, score, 300)
                    if arguments is not None:
                        line["auc_less_first"] = against(label, score, best)
                    print(json.dumps(line), flush=True)


def against(label: np.ndarray, score: np.ndarray, other: np.ndarray, n: int = 300) -> list[float]:
    """AUC of `score` less that of `other`, and the 2.5% and 97.5% quantiles of it over rows resampled alike."""
    rng, out = np.random.default_rng(0), []
    for k in range(n + 1):
        weight = np.ones(len(label)) if k == 0 else rng.poisson(1.0, len(label)).astype(np.float64)
        pair = []
        for s in (score, other):
            auc = hbkit.metrics.AUC()
            auc.update(label, s, weight)
            pair.append(float(auc.result()))
        out.append(pair[0] - pair[1])
    return [round(out[0], 4), *np.quantile(out[1:], [0.025, 0.975]).round(4).tolist()]


if __name__ == "__main__":
    main()

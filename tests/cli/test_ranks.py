"""`hbkit train` by several processes: under torchrun, and in a cluster that TF_CONFIG names."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hbkit
from hbkit.cli.building import build

torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
tensorflow = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tensorflow is not installed")
COMMAND = [sys.executable, "-m", "hbkit.cli"]
FEW = ["--label", "label", "--dense", "i1,i2", "--sparse", "c1,c2,c3", "--dim", 4]


def started(command, **environment):
    """The process, the first of a group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    return subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def ended(process, status=0):
    """What it said: standard output, or standard error where it should fail."""
    try:
        out, err = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, out + err
    return err if status else out


def torchrun(n, *args):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, "-m", "hbkit.cli", "train"]
    return started([sys.executable, *launch, *args])


def in_cluster(n, *args):
    """The processes of a TensorFlow cluster."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return [
        started(
            [*COMMAND, "train", "--backend", "tensorflow", *args],
            TF_CONFIG=json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}),
        )
        for i in range(n)
    ]


def figures(output):
    """Numbers by name; those of keys too."""
    return {
        name.strip(): float(x.replace(",", "")) for name, x in re.findall(r"^  (\w.*?) {2,}([\d.,]+)", output, re.M)
    }


def figures_of(path):
    return hbkit.snapshot.load(path, []).state["train"]["figures"]


def contents(path):
    """Dense weights' bytes, where the data stood, and all rows of all tables in the order of their keys."""
    loaded = hbkit.snapshot.load(path, [])
    _, _, collection = build(loaded.state["train"])
    hbkit.snapshot.load(path, list(collection.tables.values()))
    rows = {}
    for name, table in collection.tables.items():
        chunks = list(table.store.scan())
        keys = np.concatenate([c.key for c in chunks])
        rows[name] = [
            np.concatenate([getattr(c, a) for c in chunks])[np.argsort(keys)] for a in ("key", "row", "state")
        ]
    return loaded.state["dense"], loaded.state["cursor"], rows


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Files to train and to evaluate on."""
    out = tmp_path_factory.mktemp("clicks")
    for name, rows, seed in ("train", 10_001, 1), ("test", 3_001, 2):
        command = [*COMMAND, "synth", out / name, "--rows", rows, "--seed", seed, "--row-group-rows", 2000]
        ended(started(command))
    return out


@torch
def test_ranks_under_torchrun_train_evaluate_and_save_as_one_process(clicks, tmp_path):
    common = ["--data", clicks / "train", "--eval-data", clicks / "test", "--group", "c1", "--optimizer", "sgd", *FEW]
    one = ended(started([*COMMAND, "train", *common, "--batch-size", 500, "--save", tmp_path / "one"]))
    two = ended(torchrun(2, *common, "--batch-size", 250, "--save", tmp_path / "two", "--save-every", "3steps"))
    assert len(two.splitlines()) < len(one.splitlines()) + 2  # rank 0 alone speaks
    found, expected = figures(two), figures(one)
    assert found["rows"] == 10_001 and found["evaluated rows"] == 3_001
    for name in expected.keys() - {"samples/s", "saved"}:
        assert found[name] == pytest.approx(expected[name], abs=2e-4), name
    again = figures(ended(started([*COMMAND, "evaluate", tmp_path / "two", "--data", clicks / "test"])))
    assert again["AUC"] == pytest.approx(found["AUC"], abs=1e-6)
    assert len(hbkit.snapshot.log(tmp_path / "two")) > 1  # meanwhile, too


@torch
@pytest.mark.slow
def test_killed_ranks_go_on_exactly_and_another_number_of_them_goes_on_too(clicks, tmp_path):
    common = ["--data", clicks / "train", *FEW, "--batch-size", 25, "--seed", 5, "--epochs", 2]
    ended(torchrun(2, *common, "--save", tmp_path / "whole"))
    saved = ["--save", tmp_path / "cut", "--save-every", "20steps", "--resume"]
    process = torchrun(2, *common, *saved)
    while not list((tmp_path / "cut").glob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out = ended(torchrun(2, *common, *saved))
    assert "continuing from commit" in out
    (dense, cursor, rows), (same, here, others) = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert dense == same and cursor == here
    for name, arrays in rows.items():
        assert all(np.array_equal(a, b) for a, b in zip(arrays, others[name], strict=True))
    out = ended(torchrun(3, *common[:-1], 3, "--eval-data", clicks / "test", *saved))
    assert figures(out)["rows"] == 10_001 and "continuing from commit" in out


def test_a_broken_tf_config_is_named(clicks):
    command = [*COMMAND, "train", "--data", clicks / "test", "--label", "label", "--backend", "tensorflow"]
    assert "hbkit: error: TF_CONFIG is 'worker'" in ended(started(command, TF_CONFIG="worker"), status=2)


@torch
def test_an_error_of_one_rank_ends_all_by_name(clicks, tmp_path):
    pq.write_table(pa.table({"label": [1.0, 5.0, 0.0], "k": [1, 2, 3]}), tmp_path / "fives.parquet")
    err = ended(torchrun(2, "--data", tmp_path / "fives.parquet", "--label", "label"), status=1)
    ours, _, torchruns = err.partition("failed (exitcode")
    assert "hbkit: error: label 5 is not a click probability" in ours and torchruns and "Traceback" not in ours
    err = ended(torchrun(2, "--follow", clicks / "train", "--label", "label", "--save", tmp_path), status=1)
    assert "--follow with several ranks" in err
    err = ended(torchrun(2, "--data", clicks / "train", "--label", "label", "--backend", "tensorflow"), status=1)
    assert "torchrun with --backend tensorflow" in err


@tensorflow
def test_ranks_in_a_tensorflow_cluster_train_and_save_together(clicks, tmp_path):
    common = ["--data", clicks / "train", "--eval-data", clicks / "test", *FEW, "--batch-size", 500, "--wire", "int8"]
    saved = ["--save", tmp_path / "m", "--save-every", "5steps", "--resume"]
    first, second = in_cluster(2, *common, *saved)
    found = figures(ended(first))
    assert found["rows"] == 10_001 and found["evaluated rows"] == 3_001
    assert ended(second) == ""
    again = figures(ended(started([*COMMAND, "evaluate", tmp_path / "m", "--data", clicks / "test"])))
    assert again["AUC"] == pytest.approx(found["AUC"], abs=1e-4)  # the ranks rounded what they sent
    one, other = in_cluster(2, *common, "--timeout", 5)
    time.sleep(0.1)
    other.kill()
    other.communicate()
    assert "hbkit: error:" in ended(one, status=2)
